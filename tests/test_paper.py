"""The papers as data and functions: every figure against its value written out here, the formulas against the model."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM, paper
from hf_llama_repro.errors import InputError
from hf_llama_repro.modeling_llama_repro import CACHE
from hf_llama_repro.paper.formulas import num_parameters
from hf_llama_repro.paper.results import BENCHMARKS, GPT_3_FLOPS, MISTAKES
from hf_llama_repro.paper.sizes import (
    ADAM_BETAS,
    ADAM_EPS,
    BATCH_TOKENS,
    CLUSTER_DAYS,
    CLUSTER_GPUS,
    FINAL_FRACTION,
    GRADIENT_CLIPPING,
    MIXTURE,
    RUNS,
    SIZES,
    TIMELINE,
    TOKENS_PER_SECOND_PER_GPU,
    VOCAB_SIZE,
    WARMUP_STEPS,
    WEIGHT_DECAY,
)
from hf_llama_repro.paper.tables import every_table

# dim, layers, heads, KV heads, FFN, context, norm eps, parameters, shards, dtype
SIZE_ROWS = {
    "llama-7b": (4096, 32, 32, 32, 11008, 2048, 1e-6, 6_738_415_616, 1, "float16"),
    "llama-13b": (5120, 40, 40, 40, 13824, 2048, 1e-6, 13_015_864_320, 2, "float16"),
    "llama-33b": (6656, 60, 52, 52, 17920, 2048, 1e-6, 32_528_943_616, 4, "float16"),
    "llama-65b": (8192, 80, 64, 64, 22016, 2048, 1e-6, 65_285_660_672, 8, "float16"),
    "llama-2-7b": (4096, 32, 32, 32, 11008, 4096, 1e-5, 6_738_415_616, 1, "bfloat16"),
    "llama-2-13b": (5120, 40, 40, 40, 13824, 4096, 1e-5, 13_015_864_320, 2, "bfloat16"),
    "llama-2-70b": (8192, 80, 64, 8, 28672, 4096, 1e-5, 68_976_648_192, 8, "bfloat16"),
}
# tokens, peak learning rate, GPU-hours, MWh, tCO2eq
RUN_ROWS = {
    "llama-7b": (1.0e12, 3e-4, 82_432, 36, 14),
    "llama-13b": (1.0e12, 3e-4, 135_168, 59, 23),
    "llama-33b": (1.4e12, 1.5e-4, 530_432, 233, 90),
    "llama-65b": (1.4e12, 1.5e-4, 1_022_362, 449, 173),
    "llama-2-7b": (2.0e12, 3e-4, 184_320, None, None),
    "llama-2-13b": (2.0e12, 3e-4, 368_640, None, None),
    "llama-2-34b": (2.0e12, 1.5e-4, 1_038_336, None, None),
    "llama-2-70b": (2.0e12, 1.5e-4, 1_720_320, None, None),
}
SIX_N_D = {
    "llama-7b": 4.04e22,
    "llama-13b": 7.81e22,
    "llama-33b": 2.73e23,
    "llama-65b": 5.48e23,
    "llama-2-70b": 8.28e23,
}
MIXTURE_ROWS = [
    ("CommonCrawl", 67.0, 1.10, 3300),
    ("C4", 15.0, 1.06, 783),
    ("GitHub", 4.5, 0.64, 328),
    ("Wikipedia", 4.5, 2.45, 83),
    ("Books", 4.5, 2.23, 85),
    ("ArXiv", 2.5, 1.06, 92),
    ("StackExchange", 2.0, 1.03, 78),
]
RESULTS = {
    "mmlu": {
        "LLaMA 7B": (35.1,),
        "LLaMA 13B": (46.9,),
        "LLaMA 33B": (57.8,),
        "LLaMA 65B": (63.4,),
        "LLaMA 2 7B": (45.3,),
        "LLaMA 2 13B": (54.8,),
        "LLaMA 2 70B": (68.9,),
        "GPT-3 175B": (43.9,),
        "Gopher 280B": (60.0,),
        "Chinchilla 70B": (67.5,),
        "PaLM 62B": (53.7,),
        "PaLM 540B": (69.3,),
    },
    "hellaswag": {
        "LLaMA 7B": (76.1,),
        "LLaMA 13B": (79.2,),
        "LLaMA 33B": (82.8,),
        "LLaMA 65B": (84.2,),
        "GPT-3 175B": (78.9,),
        "Gopher 280B": (79.2,),
        "Chinchilla 70B": (80.8,),
        "PaLM 62B": (79.7,),
        "PaLM 540B": (83.4,),
    },
    "triviaqa": {
        "LLaMA 7B": (50.0, 53.4, 56.3, 57.6),
        "LLaMA 13B": (56.6, 60.5, 63.1, 64.0),
        "LLaMA 33B": (65.1, 67.9, 69.9, 70.4),
        "LLaMA 65B": (68.2, 71.6, 72.6, 73.0),
        "Gopher 280B": (43.5, None, 57.0, 57.2),
        "Chinchilla 70B": (55.4, None, 64.1, 64.6),
    },
    "nq_open": {
        "LLaMA 7B": (16.8, 18.7, 22.0, 26.1),
        "LLaMA 13B": (20.1, 23.4, 28.1, 31.9),
        "LLaMA 33B": (24.9, 28.3, 32.9, 36.0),
        "LLaMA 65B": (23.8, 31.0, 35.0, 39.9),
        "GPT-3 175B": (14.6, 23.0, None, 29.9),
        "Gopher 280B": (10.1, None, 24.5, 28.2),
        "Chinchilla 70B": (16.6, None, 31.5, 35.5),
        "PaLM 62B": (18.1, 26.5, None, 27.6),
        "PaLM 540B": (21.2, 29.3, None, 39.6),
    },
    "humaneval": {
        "LLaMA 7B": (10.5, 36.5),
        "LLaMA 13B": (15.8, 52.5),
        "LLaMA 33B": (21.7, 70.7),
        "LLaMA 65B": (23.7, 79.3),
        "PaLM 62B": (15.9, 46.3),
        "PaLM 540B": (26.2, 76.2),
    },
}
SETTINGS = {
    "mmlu": ("5-shot",),
    "hellaswag": ("0-shot",),
    "triviaqa": ("0-shot", "1-shot", "5-shot", "64-shot"),
    "nq_open": ("0-shot", "1-shot", "5-shot", "64-shot"),
    "humaneval": ("pass@1", "pass@100"),
}
# of, said, right
MISTAKE_ROWS = [
    ("65B, HellaSwag", "79.2", "84.2"),
    ("13B, HellaSwag", "76.1", "79.2"),
    ("65B, TriviaQA", "68.9", "68.2 / 71.6 / 72.6 / 73.0"),
    ("13B, TriviaQA", "61.3", "56.6 / 60.5 / 63.1 / 64.0"),
    ("65B, NaturalQuestions", "33.0", "23.8 / 31.0 / 35.0 / 39.9"),
    ("13B, NaturalQuestions", "26.0", "20.1 / 23.4 / 28.1 / 31.9"),
    ("PaLM 62B, HumanEval pass@1 / @100", "26.2 / 76.2", "15.9 / 46.3"),
    ("65B, training FLOPs", "2.5e23", "5.48e23"),
    ("13B, training tokens", "1.4T", "1.0T"),
    ("13B, training compute against GPT-3's", "about the same", "0.25 of it"),
    ("7B, parameters", "6.61B", "6.74B"),
]
DATES = {
    "LLaMA": "2023-02-27",
    "Alpaca": "2023-03-13",
    "Vicuna": "2023-03-30",
    "Koala": "2023-04-03",
    "WizardLM": "2023-04-24",
    "Orca": "2023-06-05",
    "LLaMA 2": "2023-07-18",
}


def size_row(size):
    names = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "context", "norm_eps")
    return (*(getattr(size, name) for name in names), num_parameters(size), size.num_shards, size.dtype)


def test_sizes():
    assert {name: size_row(size) for name, size in SIZES.items()} == SIZE_ROWS


def test_runs():
    assert {name: dataclasses.astuple(run) for name, run in RUNS.items()} == RUN_ROWS


def test_what_all_runs_share():
    assert (ADAM_BETAS, ADAM_EPS) == ((0.9, 0.95), {"LLaMA": None, "LLaMA 2": 1e-5})
    assert (WEIGHT_DECAY, GRADIENT_CLIPPING) == (0.1, 1.0)
    assert (WARMUP_STEPS, FINAL_FRACTION, BATCH_TOKENS, VOCAB_SIZE) == (2000, 0.1, 4_000_000, 32_000)
    assert (TOKENS_PER_SECOND_PER_GPU, CLUSTER_GPUS, CLUSTER_DAYS) == (380, 2048, 21)


def test_mixture():
    rows = [(source.name, round(100 * source.share, 6), source.epochs, source.disk_gb) for source in MIXTURE]
    assert rows == MIXTURE_ROWS


def test_results():
    assert {name: benchmark.scores for name, benchmark in BENCHMARKS.items()} == RESULTS
    assert {name: benchmark.settings for name, benchmark in BENCHMARKS.items()} == SETTINGS


def test_results_have_their_source():
    sources = {name: benchmark.source for name, benchmark in BENCHMARKS.items()}
    assert sources == {
        "mmlu": "LLaMA, Table 9; LLaMA 2: model card",
        "hellaswag": "LLaMA, Table 3",
        "triviaqa": "LLaMA, Table 5",
        "nq_open": "LLaMA, Table 4",
        "humaneval": "LLaMA, Table 8",
    }


def test_mistakes_and_what_is_right():
    assert [(mistake.of, mistake.said, mistake.right()) for mistake in MISTAKES] == MISTAKE_ROWS
    assert GPT_3_FLOPS == 3.14e23


def test_timeline():
    assert {event.name: event.date for event in TIMELINE} == DATES


@pytest.mark.parametrize("name", SIZE_ROWS)
def test_parameters_by_part_are_the_models(name):
    with torch.device("meta"):
        model = LlamaReproForCausalLM(LlamaReproConfig.from_paper(name))
    parts = dict.fromkeys(paper.parameters(SIZES[name]), 0)
    for key, tensor in model.named_parameters():
        parts[PART_OF[next(word for word in PART_OF if word in key)]] += tensor.numel()
    assert paper.parameters(SIZES[name]) == parts


PART_OF = {
    "embed_tokens": "embedding",
    "q_proj": "attention q",
    "k_proj": "attention k",
    "v_proj": "attention v",
    "o_proj": "attention o",
    "gate_proj": "feed-forward gate",
    "up_proj": "feed-forward up",
    "down_proj": "feed-forward down",
    "norm": "norms",
    "lm_head": "output",
}


SMALL = {
    "a head each": dataclasses.replace(
        SIZES["llama-7b"], dim=64, num_heads=4, num_kv_heads=4, ffn_dim=112, num_layers=3
    ),
    "grouped": dataclasses.replace(
        SIZES["llama-2-70b"], dim=96, num_heads=8, num_kv_heads=2, ffn_dim=112, num_layers=2
    ),
}


def model_of(size, **fields):
    shape = {
        "hidden_size": size.dim,
        "intermediate_size": size.ffn_dim,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
    }
    return LlamaReproForCausalLM(
        LlamaReproConfig.from_paper(size.name, **{"head_dim": size.head_dim, **shape, **fields})
    )


def counted_flops(size, context, *, backward):
    """What PyTorch counts of the model's matrix products; each token is multiplied with every other."""
    model = model_of(size, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(1, context, dtype=torch.long), use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SMALL)
def test_flops_are_those_that_pytorch_counts(name):
    size = SMALL[name]
    forward = paper.forward_flops(size, 96, causal=False)
    assert forward == counted_flops(size, 96, backward=False)
    assert paper.exact_training_flops(size, 96, 96, causal=False) == counted_flops(size, 96, backward=True)
    # The negative control: other K/V heads would be seen.
    assert forward != paper.forward_flops(dataclasses.replace(size, num_kv_heads=1), 96, causal=False)


def test_a_causal_token_meets_itself_and_those_before_it():
    size, context = SIZES["llama-2-70b"], 7
    one_by_one = sum(2 * length * size.num_heads * size.head_dim for length in range(1, context + 1))
    layer = paper.layer_flops(size, context)
    assert layer["attention scores"] == layer["attention values"] == one_by_one


@pytest.mark.parametrize("name", SIX_N_D)
def test_six_n_d(name):
    flops = paper.training_flops(SIZE_ROWS[name][7], RUN_ROWS[name][0])
    assert float(f"{flops:.2e}") == SIX_N_D[name]


def test_time_and_cost():
    taken = paper.cost(312e12 * 3600, num_gpus=1, utilisation=1.0, dollars_per_gpu_hour=2.5)
    assert (taken.gpu_hours, taken.dollars) == (1.0, 2.5)
    taken = paper.cost(312e12 * 3600, num_gpus=4, utilisation=0.5, dollars_per_gpu_hour=2.5)
    assert (taken.gpu_hours, taken.dollars, taken.days) == (2.0, 5.0, 2.0 / 4 / 24)


def test_65b_takes_the_published_time_at_the_published_speed():
    flops_per_token = 6 * 65_285_660_672
    used = paper.model_flops_utilisation(flops_per_token, 380)
    assert used == pytest.approx(0.477, abs=5e-4)
    taken = paper.cost(flops_per_token * 1.4e12, num_gpus=2048, utilisation=used)
    assert round(taken.days) == 21
    assert taken.gpu_hours == pytest.approx(1_022_362, rel=0.002)


@pytest.mark.parametrize("name", [name for name, row in RUN_ROWS.items() if row[3]])
def test_published_energy_and_carbon_follow_from_the_gpu_hours(name):
    _, _, gpu_hours, megawatt_hours, tonnes = RUN_ROWS[name]
    assert paper.energy_mwh(gpu_hours) == pytest.approx(megawatt_hours, abs=1)
    assert paper.carbon_tonnes(gpu_hours) == pytest.approx(tonnes, abs=0.5)


def test_cache_with_and_without_grouped_queries():
    tokens = {
        name: (paper.kv_cache_bytes(size), paper.kv_cache_bytes(size, grouped=False)) for name, size in SIZES.items()
    }
    assert tokens == {
        "llama-7b": (524_288, 524_288),
        "llama-13b": (819_200, 819_200),
        "llama-33b": (1_597_440, 1_597_440),
        "llama-65b": (2_621_440, 2_621_440),
        "llama-2-7b": (524_288, 524_288),
        "llama-2-13b": (819_200, 819_200),
        "llama-2-70b": (327_680, 2_621_440),
    }
    assert paper.kv_cache_bytes(SIZES["llama-7b"], bytes_per_value=4) == 1_048_576


@pytest.mark.parametrize("name", SMALL)
def test_cache_is_what_the_model_keeps(name):
    cache = getattr(model_of(SMALL[name]).to(torch.bfloat16)(torch.zeros(1, 3, dtype=torch.long)), CACHE)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kept == 3 * paper.kv_cache_bytes(SMALL[name])


def test_learning_rate():
    def rate(step):
        return paper.learning_rate(step, peak=3e-4, total_steps=250_000)

    assert rate(0) == 0
    assert rate(1) == 3e-4 / 2000
    assert rate(1000) == 1.5e-4
    assert rate(2000) == 3e-4
    assert rate(126_000) == pytest.approx(1.65e-4)  # half of the cosine: (1 + 0.1) / 2 of the peak
    assert rate(64_000) == pytest.approx(3e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert rate(250_000) == pytest.approx(3e-5)
    assert paper.learning_rate(0, peak=3e-4, total_steps=10, warmup_steps=0) == 3e-4


def test_learning_rate_is_pytorchs_schedule():
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=3e-4)
    schedulers = torch.optim.lr_scheduler
    schedule = schedulers.SequentialLR(
        optimizer,
        [
            schedulers.LambdaLR(optimizer, lambda step: step / 20),
            schedulers.CosineAnnealingLR(optimizer, 80, eta_min=3e-5),
        ],
        [20],
    )
    for step in range(101):
        expected = paper.learning_rate(step, peak=3e-4, total_steps=100, warmup_steps=20)
        assert schedule.get_last_lr()[0] == pytest.approx(expected, rel=1e-9), step
        optimizer.step()
        schedule.step()


def test_steps():
    steps = {name: paper.num_steps(run.tokens) for name, run in RUNS.items()}
    assert [steps[name] for name in ("llama-7b", "llama-65b", "llama-2-70b")] == [250_000, 350_000, 500_000]
    assert paper.num_steps(4_000_001) == 2


def test_tokens_by_source():
    tokens = paper.tokens_by_source(1_400_000_000_000)
    assert tokens["CommonCrawl"] == pytest.approx((938e9, 938e9 / 1.10))
    assert math.fsum(sampled for sampled, _ in tokens.values()) == pytest.approx(1.4e12)


def replaced(index, **changes):
    return [dataclasses.replace(source, **changes) if i == index else source for i, source in enumerate(MIXTURE)]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (replaced(0, share=0.66), "add up to 0.99, not 1: CommonCrawl 0.66, C4 0.15"),
        ([], "add up to 0, not 1: it names no source"),
        (replaced(2, disk_gb=0), "GitHub is empty"),
        (replaced(2, epochs=0.0), "GitHub is empty"),
        ([*replaced(0, share=0.67 - 0.02), MIXTURE[-1]], "names StackExchange 2 times"),
    ],
    ids=["sum", "nothing", "empty source", "no epochs", "twice"],
)
def test_wrong_mixture(mixture, message):
    with pytest.raises(InputError, match=message):
        paper.tokens_by_source(1.4e12, mixture)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paper.size("llama-8b"), "no size named 'llama-8b' in the papers; there are llama-7b, llama-13b"),
        (lambda: paper.cost(1e20, num_gpus=0, utilisation=0.5), "num_gpus=0 is out of range: at least 1"),
        (lambda: paper.cost(1e20, num_gpus=1, utilisation=47), "utilisation=47 is out of range"),
        (lambda: paper.cost(1e20, num_gpus=1, utilisation=float("nan")), "utilisation=nan"),
        (lambda: paper.cost(1e20, num_gpus=1, utilisation=0.4, dollars_per_gpu_hour=-1), "dollars_per_gpu_hour=-1"),
        (
            lambda: paper.learning_rate(11, peak=1e-4, total_steps=10, warmup_steps=1),
            "step=11 is out of range: 0 to 10",
        ),
        (lambda: paper.learning_rate(1, peak=1e-4, total_steps=10), "warmup_steps=2000 is out of range: 0 to 9"),
        (lambda: paper.layer_flops(SIZES["llama-7b"], 0), "context=0"),
        (lambda: BENCHMARKS["mmlu"].score("LLaMA 7B", "64-shot"), "MMLU has no setting '64-shot'; it has 5-shot"),
    ],
)
def test_what_is_out_of_range(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_score_that_was_not_published_is_none():
    assert BENCHMARKS["humaneval"].score("GPT-3 175B", "pass@1") is None
    assert BENCHMARKS["nq_open"].score("PaLM 62B", "5-shot") is None


def test_command_prints_every_table(capsys):
    assert paper.main([]) == 0
    output = capsys.readouterr().out
    assert [table.title for table in every_table() if table.title not in output] == []
    for figure in ("65,285,660,672", "1,022,362", "8.28e23", "327,680", "79.3"):
        assert figure in output


def test_command_of_one_size(capsys, tmp_path):
    file = tmp_path / "paper.json"
    command = ["llama-2-70b", "--gpus", "1000", "--utilisation", "0.4", "--price", "2", "--json", str(file)]
    assert paper.main(command) == 0
    output = capsys.readouterr().out
    exact = paper.exact_training_flops(SIZES["llama-2-70b"], 2e12)
    assert f"{exact / (312e12 * 0.4) / 3600 / 1000 / 24:.1f}" in output
    assert f"{exact / (312e12 * 0.4) / 3600 * 2:,.0f}" in output
    assert json.loads(file.read_text())["tables"]["Sizes"]["rows"][-1][8] == "68,976,648,192"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["llama-30b"], "no size named 'llama-30b' in the papers (the paper's 33B; its files say 30B: llama-33b)"),
        (["llama-2-34b"], "trained and never released"),
        (["llama-7b", "--context", "0"], "context=0 is out of range: at least 1 token"),
        (["llama-7b", "--gpus", "-3"], "num_gpus=-3 is out of range: at least 1"),
        (["llama-7b", "--utilisation", "1.2"], "utilisation=1.2 is out of range"),
        (["--price", "2"], "--price says something of a size: name one"),
        (["--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json cannot be written"),
        (["--page", "/nowhere/at/all"], "--page /nowhere/at/all cannot be written"),
    ],
)
def test_bad_input_is_one_message(command, message, capsys):
    assert paper.main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_module_runs():
    command = [sys.executable, "-m", "hf_llama_repro.paper", "llama-9b"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: no size named 'llama-9b'")

"""On a CUDA device: the same calls compute what stock Llama does, prepared and not, with every attention there is."""

import shutil
import signal

import pytest
import torch
from finetune_runs import adapter, kill_after, losses, metrics, run_command, tiny_recipe
from pretrain_runs import run_to_its_end, tiny_pretraining
from random_models import ARCHITECTURES, random_model, random_tokens, relative_difference, stock_twin, tiny_config
from transformers import BitsAndBytesConfig
from transformers.generation import GenerationConfig

from hf_llama_repro import LlamaReproForCausalLM, optimize, restore
from hf_llama_repro.errors import InputError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GREEDY = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}


def talker(fields=None, dtype=torch.float32):
    return random_model(tiny_config(eos_token_id=None, **(fields or {}))).to("cuda", dtype)


@pytest.mark.parametrize("fields", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_logits_equal_stock_llamas(fields, attn_implementation):
    model = talker(fields)
    model.set_attn_implementation(attn_implementation)
    tokens = random_tokens(model.config).cuda()
    with torch.no_grad():
        assert relative_difference(model(tokens).logits, stock_twin(model).cuda()(tokens).logits) < 1e-5


def test_prepared_tokens_equal_the_ordinary_ones():
    model = talker()
    prompt = random_tokens(model.config, batch=2, seq=40).cuda()
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(optimize(model).generate(prompt, **GREEDY), expected)
    assert restore(model).generation_config.cache_implementation is None
    with pytest.raises(InputError, match="load_in_8bit"):
        optimize(model, int8=True)


def test_prepared_tokens_in_bf16_are_the_likeliest_to_rounding():
    model = talker(dtype=torch.bfloat16)
    prompt = random_tokens(model.config, batch=2, seq=40).cuda()
    tokens = optimize(model).generate(prompt, **GREEDY)
    with torch.no_grad():
        logits = restore(model)(tokens).logits[:, 39:-1].float()
    chosen = logits.gather(-1, tokens[:, 40:, None])[..., 0]
    assert (logits.amax(-1) - chosen).max() < 0.03 * logits.abs().amax()
    other = logits.gather(-1, tokens[:, 40:, None].roll(1, dims=1))[..., 0]
    assert (logits.amax(-1) - other).max() > 0.3 * logits.abs().amax()


def test_int8_of_bitsandbytes_generates(tmp_path):
    talker(dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = LlamaReproForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cuda"
    )
    assert model.generate(random_tokens(model.config).cuda(), **GREEDY).shape[1] == 80 + 32


def test_continuous_batching_gives_the_ordinary_tokens():
    model = talker()
    prompts = [random_tokens(model.config, batch=1, seq=seq)[0].tolist() for seq in (70, 9, 33)]
    settings = {key: value for key, value in GREEDY.items() if key != "pad_token_id"}
    results = model.generate_batch(prompts, GenerationConfig(**settings, eos_token_id=-1, pad_token_id=0))
    assert len(results) == len(prompts)
    for prompt, result in zip(prompts, results.values(), strict=True):
        expected = model.generate(torch.tensor([prompt], device="cuda"), **GREEDY)[0, len(prompt) :]
        assert result.generated_tokens == expected.tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_a_run_learns_and_writes_its_adapter(quantization, dtype, tiny_base, tiny_data, tmp_path):
    recipe = tiny_recipe(tiny_base, tiny_data, tmp_path / "run", quantization=quantization, dtype=dtype)
    result = run_command(recipe)
    assert result.returncode == 0, result.stderr
    assert "the card has" in result.stdout
    assert learned(recipe) > 0.002
    assert all(weight.isfinite().all() for weight in adapter(tmp_path / "run" / "adapter").values())


def test_a_full_run_learns(tiny_base, tiny_data, tmp_path):
    recipe = tiny_recipe(tiny_base, tiny_data, tmp_path / "run", method="full", dtype="bfloat16", lora_dropout=0.0)
    result = run_command(recipe)
    assert result.returncode == 0, result.stderr
    assert learned(recipe) > 0.002


def learned(recipe):
    """By how much the held-out loss fell."""
    before, after = [line["eval_loss"] for line in metrics(recipe) if "eval_loss" in line]
    return before - after


def test_a_killed_run_resumes_with_the_losses_of_one_that_was_not(tiny_base, tiny_data, tmp_path):
    whole = tiny_recipe(tiny_base, tiny_data, tmp_path / "whole")
    killed = tiny_recipe(tiny_base, tiny_data, tmp_path / "killed")
    assert run_command(whole).returncode == 0
    kill_after(killed, 6, signal.SIGKILL)
    result = run_command(killed, "--resume")
    assert result.returncode == 0, result.stderr
    for step, values in losses(whole).items():
        assert losses(killed)[step] == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_pretraining_in_bf16_learns(compiled, text_folder, pretrain_data, tmp_path):
    recipe = tiny_pretraining(
        text_folder, tmp_path / "run", data_dir=str(pretrain_data), dtype="bfloat16", compile=compiled
    )
    losses = run_to_its_end(recipe)
    assert losses[12][0] < losses[1][0] - 0.5


def test_a_resumed_pretraining_is_the_uninterrupted_one(text_folder, pretrain_data, tmp_path):
    recipe = tiny_pretraining(text_folder, tmp_path / "run", data_dir=str(pretrain_data))
    whole = run_to_its_end(recipe)
    for name in ("checkpoint-8", "checkpoint-12", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    resumed = run_to_its_end(recipe, "--resume")
    assert resumed.keys() == whole.keys()
    for step, values in whole.items():
        assert resumed[step] == pytest.approx(values, rel=1e-5)

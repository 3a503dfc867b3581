"""hf-llama-eval: settings of the papers, recognised sizes, bad input; on real weights the scores of stock Llama."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_models import random_model, tiny_config

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

from conversion.convert import convert  # noqa: E402
from conversion.tokenizer import convert_tokenizer  # noqa: E402
from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM, modeling_llama_repro  # noqa: E402
from hf_llama_repro.errors import InputError  # noqa: E402
from hf_llama_repro.evaluation import harness  # noqa: E402
from hf_llama_repro.evaluation.command import main  # noqa: E402
from hf_llama_repro.evaluation.harness import Tasks, run_job, wrapped  # noqa: E402
from hf_llama_repro.evaluation.model import plain_paths, recognised  # noqa: E402
from hf_llama_repro.evaluation.report import Row, draw, rows_of  # noqa: E402
from hf_llama_repro.evaluation.settings import PAPER_TASKS, Job, jobs  # noqa: E402
from hf_llama_repro.llama_folder import architecture  # noqa: E402
from hf_llama_repro.paper import SIZES  # noqa: E402

ROOT = Path(__file__).parent.parent
OWN_TASKS = ROOT / "examples" / "eval_tasks"
LIMIT = 6


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("evaluated") / "smollm2"
    convert(smollm2_gguf, target)
    return target


@pytest.fixture(scope="module")
def stock(smollm2):
    """Stock Llama with these weights; that they are those of transformers' own loader, test_real_weights.py shows."""
    config = LlamaConfig(**architecture(json.loads((smollm2 / "config.json").read_text())))
    model = LlamaForCausalLM.from_pretrained(smollm2, config=config, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers.")
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, smollm2_gguf) -> Path:
    """A model that is opened at once, with a tokenizer of 49,152 pieces."""
    folder = tmp_path_factory.mktemp("tiny")
    random_model(tiny_config(vocab_size=49152, num_hidden_layers=1, max_position_embeddings=512)).save_pretrained(
        folder
    )
    convert_tokenizer(smollm2_gguf, folder, vocab_size=49152, context_length=512)
    return folder


def through_lm_eval(model, tokenizer, tasks, limit):
    """lm-evaluation-harness by itself: the reference."""
    before = Path.cwd()
    os.chdir(OWN_TASKS)
    try:
        return lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
            tasks=tasks,
            limit=limit,
            task_manager=TaskManager(include_path=str(OWN_TASKS), include_defaults=False),
        )
    finally:
        os.chdir(before)


def run(folder, output, *flags):
    """The command's JSON."""
    assert main([str(folder), "--output-dir", str(output), *flags]) == 0
    return json.loads((output / "results.json").read_text())


def metrics_of(results):
    """Every number of every task, without names and settings."""
    return {
        (task, key): value
        for task, measured in results.items()
        for key, value in measured.items()
        if "," in key and isinstance(value, int | float)
    }


def log_likelihoods(results, task):
    return [sample["resps"] for sample in results["samples"][task]]


def test_scores_are_stock_llamas_to_the_last_digit(smollm2, stock, tmp_path, capsys):
    reference = through_lm_eval(stock, AutoTokenizer.from_pretrained(smollm2), ["facts", "prose"], LIMIT)
    flags = ("--tasks", "facts,prose", "--include-path", str(OWN_TASKS), "--limit", str(LIMIT))
    measured = run(smollm2, tmp_path, *flags)
    ours = metrics_of({**measured["metrics"]["facts"]["results"], **measured["metrics"]["prose"]["results"]})
    assert ours == metrics_of(reference["results"])
    assert {key for _, key in ours} >= {"acc,none", "acc_norm,none", "bits_per_byte,none", "word_perplexity,none"}
    output = capsys.readouterr().out
    assert "no size of the papers" in output
    assert "Of the first 6 questions of each task" in output
    assert (tmp_path / "results.png").stat().st_size > 10_000
    # The model is one: it knows more than a guess among four, and needs less than two bits for a byte.
    assert ours["facts", "acc,none"] > 0.4
    assert ours["prose", "bits_per_byte,none"] < 2


def test_every_log_likelihood_is_stock_llamas(smollm2, stock):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    reference = through_lm_eval(stock, tokenizer, ["facts", "prose"], 3)
    with plain_paths():
        ours = AutoModelForCausalLM.from_pretrained(smollm2)
        assert isinstance(ours, LlamaReproForCausalLM)
        measured = through_lm_eval(ours, tokenizer, ["facts", "prose"], 3)
        for task in ("facts", "prose"):
            assert log_likelihoods(measured, task) == log_likelihoods(reference, task)
        # The negative control: 1e-5 more of the last norm is seen in every task.
        ours.model.norm.weight.data *= 1.00001
        changed = through_lm_eval(ours, tokenizer, ["facts", "prose"], 3)
    for task in ("facts", "prose"):
        assert log_likelihoods(changed, task) != log_likelihoods(reference, task)


def test_adapter_is_evaluated_on_its_base(tiny, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    flags = ("--tasks", "prose", "--include-path", str(OWN_TASKS), "--limit", "2")
    with_adapter = run(tiny, tmp_path / "out", *flags, "--adapter", str(tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    with plain_paths():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "adapter")
        reference = through_lm_eval(adapted, tokenizer, ["prose"], 2)
        alone = through_lm_eval(AutoModelForCausalLM.from_pretrained(tiny), tokenizer, ["prose"], 2)
    assert metrics_of(with_adapter["metrics"]["prose"]["results"]) == metrics_of(reference["results"])
    assert metrics_of(alone["results"]) != metrics_of(reference["results"])


def test_fast_paths_are_off_within_and_on_after():
    before = dict(modeling_llama_repro.FAST_PATHS)
    with plain_paths():
        assert modeling_llama_repro.FAST_PATHS == {}
    assert before == modeling_llama_repro.FAST_PATHS
    with plain_paths(False):
        assert before == modeling_llama_repro.FAST_PATHS


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_papers_are_recognised(name):
    assert recognised(LlamaReproConfig.from_paper(name)).name == name


@pytest.mark.parametrize("changed", ["num_hidden_layers", "max_position_embeddings", "num_key_value_heads"])
def test_another_shape_is_not_recognised(changed):
    assert recognised(LlamaReproConfig.from_paper("llama-7b", **{changed: 16})) is None


def test_settings_are_the_papers():
    names = {task: [setting.name for setting in PAPER_TASKS[task].settings] for task in PAPER_TASKS}
    assert names == {
        "mmlu": ["5-shot"],
        "hellaswag": ["0-shot"],
        "triviaqa": ["0-shot", "1-shot", "5-shot", "64-shot"],
        "nq_open": ["0-shot", "1-shot", "5-shot", "64-shot"],
        "humaneval": ["pass@1", "pass@100"],
    }
    one, hundred = PAPER_TASKS["humaneval"].settings
    assert (one.generation["temperature"], one.samples) == (0.1, 1)
    assert (hundred.generation["temperature"], hundred.samples) == (0.8, 100)
    assert Job("hellaswag", PAPER_TASKS["hellaswag"].settings[0]).metric == "acc_norm,none"
    assert [str(job) for job in jobs(["nq_open", "facts"], ["5-shot"])] == ["nq_open 5-shot", "facts"]


def json_task(folder, name, records, **fields):
    """A task whose data is a file beside it."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    splits = {"test": f"{name}.jsonl", "train": f"{name}.jsonl"}
    config = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": splits}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps({**config, **fields}))  # JSON is YAML


@pytest.fixture
def papers_tasks(tmp_path) -> Path:
    """Tasks with the papers' names and local data, asked as lm-evaluation-harness's own are."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    json_task(
        folder,
        "hellaswag",
        [{"query": "The sky is", "choices": ["blue", "a large wooden chair"], "label": 0}] * 3,
        output_type="multiple_choice",
        doc_to_text="{{query}}",
        doc_to_choice="choices",
        doc_to_target="label",
        metric_list=[{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    )
    json_task(
        folder,
        "triviaqa",
        [{"question": f"What is {n} plus one", "answer": [str(n + 1)]} for n in range(9)],
        output_type="generate_until",
        training_split="train",
        doc_to_text="Question: {{question}}?\nAnswer:",
        doc_to_target="answer",
        generation_kwargs={"until": ["\n", ".", ","], "max_gen_toks": 4, "do_sample": False},
        filter_list=[
            {"name": "remove_whitespace", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
        ],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    return folder


def test_published_numbers_of_the_recognised_size_stand_beside(papers_tasks, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_llama_repro.evaluation.model.recognised", lambda config: SIZES["llama-65b"])
    flags = ("--tasks", "hellaswag,triviaqa", "--settings", "0-shot,1-shot,5-shot", "--include-path", str(papers_tasks))
    rows = run(tiny, tmp_path / "out", *flags)["rows"]
    shown = [(row["task"], row["setting"], row["metric"], row["published"], row["num_questions"]) for row in rows]
    exact_match = "exact_match,remove_whitespace"
    assert shown == [
        ("hellaswag", "0-shot", "acc_norm", 84.2, 3),
        ("triviaqa", "0-shot", exact_match, 68.2, 9),
        ("triviaqa", "1-shot", exact_match, 71.6, 9),
        ("triviaqa", "5-shot", exact_match, 72.6, 9),
    ]
    output = capsys.readouterr().out
    assert re.search(r"triviaqa +5-shot +exact_match\S* +9 .* 72.6 %", output)
    assert "LLaMA, Table 3; LLaMA, Table 5" in output


def test_shots_reach_the_prompt(papers_tasks, tiny):
    prompts = {}
    lm = wrapped(AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny), batch_size=1)
    tasks = Tasks(papers_tasks)
    for job in jobs(["triviaqa"], ["0-shot", "5-shot"]):
        results = run_job(lm, job, tasks.load(job), tasks.manager(job.task), limit=1)
        prompts[job.setting.name] = results["samples"]["triviaqa"][0]["arguments"][0][0]
    assert {name: prompt.count("Question:") for name, prompt in prompts.items()} == {"0-shot": 1, "5-shot": 6}


PROBLEMS = [
    {
        "prompt": f'def {name}(a, b):\n    """{text}"""\n',
        "test": f"def check(f):\n    assert f(2, 3) == {answer}\n",
        "entry_point": name,
    }
    for name, text, answer in (("add", "The sum.", 5), ("multiply", "The product.", 6))
]


class Adds(LM):
    """A model that writes the same for every problem; every other time with a mistake."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def generate_until(self, requests, **_):
        self.asked += requests
        wrong = "    return a ++ + b\n    }"
        return ["    return a + b\n" if number % 2 == 0 else wrong for number in range(len(requests))]

    def loglikelihood(self, requests, **_):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def test_human_eval_runs_what_the_model_writes(tmp_path):
    json_task(tmp_path, "humaneval", PROBLEMS, output_type="generate_until", doc_to_text="", doc_to_target="")
    tasks = Tasks(tmp_path)
    one, hundred = jobs(["humaneval"], None)
    model = Adds()
    model.max_length, model.max_gen_toks = 2048, 256
    results = run_job(model, one, tasks.load(one), tasks.manager("humaneval"), limit=None)
    # The first is asked first and right; the second is asked second, and wrong twice over.
    [row] = rows_of(one, results, SIZES["llama-13b"])
    assert (row.metric, row.value, row.published, row.num_questions) == ("pass@1", 0.5, 15.8, 2)
    assert model.asked[0].args[1]["temperature"] == 0.1
    model.asked.clear()
    results = run_job(model, hundred, tasks.load(hundred), tasks.manager("humaneval"), limit=1)
    [row] = rows_of(hundred, results, None)
    assert (row.metric, row.value, len(model.asked)) == ("pass@100", 1.0, 100)
    assert model.asked[0].args[1]["temperature"] == 0.8


def test_generated_code_keeps_its_indentation(llama_tokenizer_model, tmp_path):
    convert_tokenizer(llama_tokenizer_model, tmp_path, vocab_size=32000, context_length=512)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = LlamaReproForCausalLM(tiny_config(vocab_size=32000, num_hidden_layers=1))
    prompt, code = "def f():\n", "    return 1"
    written = tokenizer(prompt + code).input_ids[len(tokenizer(prompt).input_ids) :]
    assert tokenizer.decode(written) == code[1:]  # as of a text's beginning
    assert wrapped(model, tokenizer, batch_size=1).tok_decode(written) == code


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(
            ["--tasks", "facst", "--include-path", str(OWN_TASKS)],
            "no task named 'facst'; near: facts",
            marks=pytest.mark.slow,  # reads the index of all tasks of lm-evaluation-harness
        ),
        (["--tasks", ","], "--tasks ',' names no task"),
        (["--tasks", "humaneval"], "humaneval executes code that the model writes"),
        (["--tasks", "mmlu", "--settings", "7-shot"], "--settings 7-shot: the papers' tables have 5-shot, 0-shot"),
        (["--tasks", "mmlu", "--settings", "64-shot"], "leaves none for mmlu, whose table has 5-shot"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--batch-size", "-1"], "--batch-size -1 must be at least 1"),
        (["--include-path", "/nowhere"], "--include-path /nowhere is no folder"),
        (
            ["--tasks", "facts", "--include-path", str(OWN_TASKS), "--adapter", "/nowhere"],
            "/nowhere is no adapter: it has",
        ),
        (["--tasks", "facts", "--include-path", str(OWN_TASKS), "--output-dir", "/proc/x"], "--output-dir /proc/x"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_flags_are_one_message(flags, message, tiny, tmp_path, capsys):
    assert main([str(tiny), "--output-dir", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_name_that_no_task_has(monkeypatch):
    few = SimpleNamespace(task_index={"hellaswag": None}, all_tasks=["hellaswag"])
    monkeypatch.setattr(harness, "_harness", lambda: few)
    tasks = Tasks(OWN_TASKS)
    tasks.check(["facts", "hellaswag"], execute_code=False)
    for name, message in (
        ("helaswag", "no task named 'helaswag'; near: hellaswag; .* has facts, prose; `lm-eval ls tasks`"),
        ("zzz", "no task named 'zzz'; /.* has facts, prose"),
    ):
        with pytest.raises(InputError, match=message):
            tasks.check(["facts", name], execute_code=False)


def test_folders_that_are_no_model(tiny, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tiny / "config.json").read_text())
    for name, message in (
        ("empty", "is no model: "),
        ("other", "says model_type 'gpt2', not one of ('llama', 'llama_repro')"),
        ("bare", "has no tokenizer.json"),
    ):
        assert main([str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_a_task_without_its_data(tiny, tmp_path, capsys):
    json_task(tmp_path, "lost", [{"text": "x"}], output_type="loglikelihood_rolling", doc_to_target="{{text}}")
    (tmp_path / "lost.jsonl").unlink()
    assert (
        main([str(tiny), "--tasks", "lost", "--include-path", str(tmp_path), "--output-dir", str(tmp_path / "o")]) == 2
    )
    assert "the data of task lost is not here" in capsys.readouterr().err


def test_a_task_that_executes_code_in_this_process_is_refused(tiny, tmp_path, capsys):
    json_task(
        tmp_path,
        "unsafe",
        [{"text": "x"}],
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{text}}",
        unsafe_code=True,
    )
    flags = [
        "--tasks",
        "unsafe",
        "--include-path",
        str(tmp_path),
        "--execute-code",
        "--output-dir",
        str(tmp_path / "o"),
    ]
    assert main([str(tiny), *flags]) == 2
    assert "task unsafe executes code that the model writes inside of this process" in capsys.readouterr().err


def test_no_room_for_a_question(tiny, papers_tasks, tmp_path, capsys):
    config = json.loads((papers_tasks / "triviaqa.yaml").read_text())
    config["generation_kwargs"]["max_gen_toks"] = 512
    (papers_tasks / "triviaqa.yaml").write_text(json.dumps(config))
    flags = ["--tasks", "triviaqa", "--settings", "0-shot", "--include-path", str(papers_tasks)]
    assert main([str(tiny), *flags, "--output-dir", str(tmp_path / "o")]) == 2
    assert "generates up to 512 tokens, and the model's context is 512" in capsys.readouterr().err


def test_without_network_the_message_says_where_data_comes_from(tiny, tmp_path):
    json_task(tmp_path, "far", [], output_type="loglikelihood_rolling", doc_to_target="{{text}}")
    config = json.loads((tmp_path / "far.yaml").read_text())
    (tmp_path / "far.yaml").write_text(json.dumps({**config, "dataset_path": "Rowan/hellaswag", "dataset_kwargs": {}}))
    flags = ["--tasks", "far", "--include-path", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command_line = [sys.executable, "-m", "hf_llama_repro.evaluation", str(tiny), *flags]
    finished = subprocess.run(command_line, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: the data of task far is not here: ")
    assert "--include-path FOLDER" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_harness_that_is_not_installed(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main([str(tiny)]) == 2
    assert "pip install 'hf-llama-repro[eval]'" in capsys.readouterr().err


def test_picture_of_every_kind_of_row(tmp_path):
    rows = [
        Row("mmlu", "5-shot", "acc", 0.343, 0.004, 14042, 35.1),
        Row("facts", "", "acc", 0.8, None, 40, None),
        Row("prose", "", "bits_per_byte", 0.91, None, 6, None),
    ]
    draw(tmp_path / "all.png", "a model", rows, SIZES["llama-7b"])
    draw(tmp_path / "shares.png", "a model", rows[:2], None)
    draw(tmp_path / "others.png", "a model", rows[2:], None)
    assert all(path.stat().st_size > 5_000 for path in tmp_path.glob("*.png"))


def test_the_number_of_questions_of_a_group_is_that_of_its_tasks():
    results = {
        "results": {"mmlu": {"acc,none": 0.25, "acc_stderr,none": 0.1}},
        "n-samples": {"one": {"effective": 3}, "two": {"effective": 4}},
        "group_subtasks": {"mmlu": ["part", "two"], "part": ["one"]},
    }
    [row] = rows_of(Job("mmlu", PAPER_TASKS["mmlu"].settings[0]), results, SIZES["llama-2-70b"])
    assert (row.num_questions, row.value, row.stderr, row.published) == (7, 0.25, 0.1, 68.9)

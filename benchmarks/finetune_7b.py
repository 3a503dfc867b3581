"""One LoRA step of a random LLaMA 7B in int8 on a CPU: the plan's memory beside the peak that was measured.

    python benchmarks/finetune_7b.py --tokenizer tokenizer.model --folder DISK   # writes 13.5 GB, removed at the end

The real command (hf-llama-finetune) in a process of its own: micro-batch 1, 256 tokens, gradient checkpointing.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
TOKENS = 256
LIMIT = 12e9


def write_random_7b(folder: Path, tokenizer: Path) -> None:
    """LLaMA 7B's shapes in bf16, a shard a layer; one block of random values, taken from another place each time."""
    import torch
    from safetensors.torch import save_file

    from conversion.tokenizer import convert_tokenizer
    from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM

    config = LlamaReproConfig.from_paper("llama-7b", dtype="bfloat16", architectures=["LlamaReproForCausalLM"])
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaReproForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    convert_tokenizer(tokenizer, folder, vocab_size=config.vocab_size, context_length=2048)
    noise = (torch.randn(64_000_000, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    shards: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})[name] = shape
    weight_map: dict[str, str] = {}
    for part, content in shards.items():
        tensors = {}
        for number, (name, shape) in enumerate(content.items()):
            count = shape.numel()
            start = number * 1_000_003
            block = noise.repeat(1 + (start + count) // noise.numel())[start : start + count]
            tensors[name] = block.reshape(shape).clone() if len(shape) > 1 else torch.ones(shape, dtype=torch.bfloat16)
        save_file(tensors, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"model-{part}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokenizer", type=Path, default=ROOT.parent / "shared" / "data" / "llama_tokenizer.model", metavar="FILE"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "demo-output" / "random-7b", help="with 14 GB free")
    parser.add_argument("--keep", action="store_true", help="leave the model there")
    arguments = parser.parse_args()
    from finetune.model import read_config
    from finetune.plan import plan
    from finetune.recipe import Recipe

    base = arguments.folder / "base"
    if not base.is_dir():
        write_random_7b(base, arguments.tokenizer)
    data = arguments.folder / "data.json"
    data.write_text(json.dumps([{"instruction": "Count.", "input": "", "output": "one two three " * 200}]))
    settings: dict[str, Any] = {
        "base_model": str(base),
        "data": str(data),
        "output_dir": str(arguments.folder / f"run-{int(time.time())}"),
        "quantization": "int8",
        "gradient_checkpointing": True,
        "max_length": TOKENS,
        "micro_batch_size": 1,
        "batch_size": 1,
        "max_steps": 1,
    }
    planned = plan(Recipe(**settings, dtype="bfloat16"), read_config(base), records=1)
    print("\n".join(planned.lines()), flush=True)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    recipe = arguments.folder / "recipe.yaml"
    recipe.write_text("")
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "finetune.alpaca", str(recipe), *flags],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(
        f"\nplanned {planned.peak / 1e9:.2f} GB; measured {peak / 1e9:.2f} GB, the peak of the whole process; "
        f"{time.perf_counter() - start:.0f} s with loading and all checks"
    )
    if not arguments.keep:
        import shutil

        shutil.rmtree(arguments.folder)
    return 0 if peak <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())

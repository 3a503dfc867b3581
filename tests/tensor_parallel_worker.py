"""One of the processes that `torchrun` starts: its slice of each model, and what the model answers.

torchrun --nproc_per_node 2 tests/tensor_parallel_worker.py RESULTS MODEL...
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from random_models import random_tokens
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import hf_llama_repro
from hf_llama_repro.mapped_pages import mapped_pages_released

NEW_TOKENS = 12


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters that this process holds."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def resident_bytes() -> int:
    """Memory of this process, pages of mapped files among it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def main() -> None:
    results, *folders = map(Path, sys.argv[1:])
    for folder in folders:
        before = resident_bytes()
        plan = {"tp_plan": "auto"} if os.environ["WORLD_SIZE"] != "1" else {}
        with mapped_pages_released(folder):
            model = AutoModelForCausalLM.from_pretrained(folder, **plan).eval()
        tokens = random_tokens(model.config)
        with torch.no_grad():
            logits = model(tokens).logits
        grown = resident_bytes() - before  # every weight has been read by then
        generated = model.generate(tokens[:, :16], max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        found = {"logits": logits, "generated": generated, "held": held_bytes(model), "grown": grown}
        try:
            hf_llama_repro.optimize(model)
        except ValueError as error:
            found["refused"] = str(error)
        torch.save(found, results / f"{folder.name}-{os.environ['RANK']}.pt")
        del model
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

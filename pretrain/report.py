"""What a finished run is shown with: its bits per byte beside those of xz, and what it writes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .held_out import together, xz_bits_per_byte
from .recipe import Recipe

# Tokens of a sample, and the sampling.
SAMPLE_TOKENS = 120
TEMPERATURE = 0.8
TOP_P = 0.95


def comparison(
    recipe: Recipe, found: dict[str, tuple[float, int]], tell: Callable[[str], None]
) -> tuple[list[str], dict[str, float]]:
    """The table in Markdown, and the levels of xz for the picture; without xz unless the recipe wants it."""
    if not found:
        return [], {}
    rows = {name: (num_bytes, rate) for name, (rate, num_bytes) in found.items()}
    rows["all"] = sum(num_bytes for num_bytes, _ in rows.values()), together(found)
    if not recipe.compare_with_xz:
        cells = [(name, f"{num_bytes:,}", f"{rate:.4f}") for name, (num_bytes, rate) in rows.items()]
        return _table(("bits per byte, held out", "bytes", "this model"), cells), {}
    begin = time.perf_counter()
    xz = xz_bits_per_byte(recipe, tell)
    tell(f"xz          {time.perf_counter() - begin:.0f} s")
    table = _table(
        ("bits per byte, held out", "bytes", "this model", "xz -9", "xz -9 after the training text"),
        [(n, f"{b:,}", f"{r:.4f}", f"{xz[n][0]:.4f}", f"{xz[n][1]:.4f}") for n, (b, r) in rows.items()],
    )
    return table, {"xz -9": xz["all"][0], "xz -9 after the training text": xz["all"][1]}


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def samples(folder: Path, prompts: tuple[str, ...]) -> list[str]:
    """What the model in a folder writes after each prompt, as any user of transformers opens it: in Markdown."""
    if not prompts:
        return []
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines: list[str] = []
    for prompt in prompts:
        torch.manual_seed(0)
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **ids, max_new_tokens=SAMPLE_TOKENS, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0
        )
        lines += ["```", str(tokenizer.decode(output[0], skip_special_tokens=True)), "```", ""]
    return lines

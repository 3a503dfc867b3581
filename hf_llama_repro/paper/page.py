"""Writes docs/paper.md, whose every figure is read from the tables, and its pictures.

python -m hf_llama_repro.paper --page docs
"""

from pathlib import Path

from . import tables
from .formulas import exact_training_flops, kv_cache_bytes, num_parameters, training_flops
from .pictures import PICTURES, write_pictures
from .results import BENCHMARKS, NORMALISATION
from .sizes import (
    ADAM_EPS,
    CLUSTER_DAYS,
    CLUSTER_GPUS,
    GPU,
    MIXTURE,
    RUNS,
    SIZES,
    TOKENS_PER_SECOND_PER_GPU,
    VOCAB_SIZE,
)

PAGE = "paper.md"


def page() -> str:
    """The text of docs/paper.md."""
    return "\n\n".join([_begin(), _training(), _computed(), _results(), _llama_2(), _between(), _wrong()]) + "\n"


def write_page(folder: Path) -> list[Path]:
    """Writes page and pictures into `folder`, which must exist, and says what was written."""
    pictures = write_pictures(folder)
    (folder / PAGE).write_text(page(), encoding="utf-8")
    return [folder / PAGE, *pictures]


def _picture(name: str) -> str:
    return f"![{PICTURES[name].alt}]({name})"


def _begin() -> str:
    return f"""# The LLaMA papers in figures

Written by `python -m hf_llama_repro.paper --page docs` from `hf_llama_repro/paper/`; a test keeps both equal.
LLaMA is arXiv 2302.13971, LLaMA 2 is arXiv 2307.09288 and its model card.

```
python -m hf_llama_repro.paper                                  # every table here
python -m hf_llama_repro.paper llama-65b --gpus 512 --price 2   # one size: parts, FLOPs, days and cost on a cluster
python -m hf_llama_repro.paper --json paper.json
```

```python
from hf_llama_repro.paper import cost, exact_training_flops, kv_cache_bytes, learning_rate, parameters, size

parameters(size("llama-7b"))["output"]  # 131,072,000
kv_cache_bytes(size("llama-2-70b"))  # 327,680 bytes a token
learning_rate(1_000, peak=3e-4, total_steps=250_000)  # 1.5e-4: half of the warm-up
cost(exact_training_flops(size("llama-65b"), 1.4e12), num_gpus=2048, utilisation=0.47, dollars_per_gpu_hour=2.0)
```

## Sizes

{tables.sizes().markdown()}

Vocabulary {VOCAB_SIZE:,}, untied embeddings, no biases, two norms a layer and a final one.

{tables.parts().markdown()}"""


def _training() -> str:
    disk = sum(source.disk_gb for source in MIXTURE)
    return f"""## Data

{_picture("paper-mixture.png")}

{tables.mixture().markdown()}

Together {disk / 1000:.1f} TB. The tokenizer is SentencePiece BPE, {VOCAB_SIZE:,} pieces, numbers split into digits,
unknown characters into bytes.

## Pre-training

{_picture("paper-learning-rate.png")}

{tables.runs().markdown()}

LLaMA 65B trained at about {TOKENS_PER_SECOND_PER_GPU} tokens/s on each of {CLUSTER_GPUS:,} {GPU}, which the paper gives
as about {CLUSTER_DAYS} days (section 2.4)."""


def _computed() -> str:
    size = SIZES["llama-7b"]
    tokens = RUNS[size.name].tokens
    more = exact_training_flops(size, tokens) / training_flops(num_parameters(size), tokens) - 1
    return f"""## Costs

{tables.costs().markdown()}

"With attention" counts every matrix product of a sequence of the size's own context, each token seeing itself and those
before it, and no product for the embedding, which is looked up: for LLaMA 7B {100 * more:.1f} % more than 6 N D."""


def _results() -> str:
    parts = [
        "## Results",
        _picture("paper-mmlu.png"),
        _picture("paper-benchmarks.png"),
        _picture("paper-humaneval.png"),
        f"{NORMALISATION} Source: LLaMA, section 3.",
    ]
    for name, benchmark in BENCHMARKS.items():
        parts.append(f"### {benchmark.title}\n\n{benchmark.metric[0].upper()}{benchmark.metric[1:]}.")
        parts.append(tables.benchmark(name).markdown())
    parts.append("`hf-llama-eval` measures a model on these: [evaluation.md](evaluation.md).")
    return "\n\n".join(parts)


def _llama_2() -> str:
    one, two, large = SIZES["llama-7b"], SIZES["llama-2-7b"], SIZES["llama-2-70b"]
    grouped, single = kv_cache_bytes(large), kv_cache_bytes(large, grouped=False)
    saved = 2 * large.num_layers * large.dim * (large.num_heads - large.num_kv_heads) * large.head_dim
    wider = large.ffn_dim / SIZES["llama-65b"].ffn_dim
    rows = [
        ("context", f"{one.context:,}", f"{two.context:,}"),
        ("training tokens", "1.0T (7B, 13B), 1.4T (33B, 65B)", "2.0T"),
        ("attention", "K and V for each head", "grouped in 34B and 70B: 8 heads share K and V in 70B"),
        ("largest FFN", f"{SIZES['llama-65b'].ffn_dim:,} (65B)", f"{large.ffn_dim:,} (70B)"),
        ("norm eps", "1e-6", "1e-5"),
        ("Adam eps", "not stated", f"{ADAM_EPS['LLaMA 2']:.0e}".replace("e-0", "e-")),
        ("files", one.dtype, two.dtype),
        ("data", "the mixture above", "a new mix of public data, not named"),
        ("chat", "none", "chat models of the released sizes, with a template of their own"),
    ]
    table = tables.Table("", "the papers' sections as above", ("what", "LLaMA", "LLaMA 2"), rows)
    return f"""## What changed in LLaMA 2

{table.markdown()}

Tokenizer, norms, SwiGLU, rotary embedding, batch, warm-up, decay and the shape of the schedule stayed; 7B and 13B have
the same tensors as before. 65B became 70B: 8 K/V heads instead of 64 save {saved / 1e9:.1f}B parameters, and an FFN
{wider:.2f} times as wide spends them and more. The cache of a token is {single // grouped} times smaller:

{_picture("paper-kv-cache.png")}

{tables.caches().markdown()}"""


def _between() -> str:
    return f"""## From LLaMA to LLaMA 2

{_picture("paper-timeline.png")}

{tables.timeline().markdown()}

Dates are those of the submission to arXiv, or of the announcement where that came without a paper."""


def _wrong() -> str:
    return f"""## Often repeated, and wrong

{tables.mistakes().markdown()}"""

"""The README of a converted folder: from what it was made, what was decided, how it was checked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import hf_llama_repro

if TYPE_CHECKING:
    from .convert import Conversion

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [llama]
---

# {name}

{made}
The licence of the original weights applies to these.

{usage}

## What it is

| | |
|---|---|
| parameters | {num_parameters:,} |
| layers, hidden size, feed-forward | {layers}, {hidden}, {ffn} |
| heads, K/V heads, head size | {heads}, {kv_heads}, {head_dim} |
| vocabulary | {vocab} |
| context | {context} tokens |
| weights | {dtype}, {gigabytes:.2f} GB in {num_files} file(s) |
| tokenizer | {tokenizer} |

{notes}
## How it was checked

- Names and shapes of all {num_tensors} tensors are those that the configuration asks for;
  none is missing, none left over.
- {finite}
- Weights: {exactness}.
{checks}"""

_USAGE = {
    "llama_repro": """```python
import hf_llama_repro  # or trust_remote_code=True without the package
from transformers import pipeline

print(pipeline("text-generation", model="{name}")("The capital of France is"))
```""",
    "llama": """```python
from transformers import pipeline

print(pipeline("text-generation", model="{name}")("The capital of France is"))
```""",
}


def made_by(command: str) -> str:
    return f"by hf-llama-repro {hf_llama_repro.__version__} (`{command}`)"


def model_card(conversion: "Conversion", made: str, model_type: str, checks: Sequence[str] = ()) -> str:
    """The text of README.md. `made`: a sentence on what it was made from; `checks`: beside those of every folder."""
    config, written, opened = conversion.config, conversion.written, conversion.source
    name = conversion.target.name
    bad = sum(written.nonfinite.values())
    return _CARD.format(
        name=name,
        made=made,
        usage=_USAGE[model_type].format(name=name),
        num_parameters=written.num_parameters,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        dtype=str(config.dtype).removeprefix("torch."),
        gigabytes=written.num_bytes / 1e9,
        num_files=len(written.files),
        tokenizer=conversion.tokenizer,
        notes="".join(f"- Decided: {note}.\n" for note in opened.notes) + ("\n" if opened.notes else ""),
        num_tensors=len(opened.tensors),
        finite="Every value is finite." if not bad else f"**{bad} values are NaN or infinite, as in the source.**",
        exactness=conversion.weights,
        checks="".join(f"- {check}\n" for check in checks),
    )

"""What a pre-training run is: one dataclass, from which the YAML keys, the flags and their help come.

Defaults are those of LLaMA (arXiv 2302.13971, section 2.3 and Table 2), where it states them.
"""

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_llama_repro import recipe_file
from hf_llama_repro.errors import InputError
from hf_llama_repro.paper.formulas import SHARE_TOLERANCE
from hf_llama_repro.recipe_file import check, setting

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Source:
    """One source of the mixture."""

    name: str = setting("", "of its folder, and in what is printed")
    format: Literal["text", "jsonl", "parquet", "dataset", "python_sources", "python_documentation"] = setting(
        "text",
        "text: a file is a document; jsonl, parquet: a line, a row is one; dataset: what `datasets` opens by name or "
        "folder; python_*: of this Python's own library",
    )
    files: tuple[str, ...] = setting((), "paths or patterns (**, *), .gz too; of a dataset: name, configuration")
    text_key: str = setting("text", "key or column that holds a document's text")
    share: float = setting(0.0, "part of the training tokens that come from here; all sources together 1")
    expected_tokens: int = setting(0, "tokens that it is believed to hold, for --plan before it is prepared")

    def __post_init__(self) -> None:
        check(self, "name", self.name != "" and Path(self.name).name == self.name, "a name that a folder can bear")
        check(self, "share", math.isfinite(self.share) and 0 < self.share <= 1, "more than 0 and at most 1")
        check(self, "expected_tokens", self.expected_tokens >= 0, "0 or more")
        own = self.format.startswith("python_")
        if own == bool(self.files):
            raise InputError(
                f"source {self.name}: format={self.format} takes no files: remove the key"
                if own
                else f"source {self.name} names no files: add the key, with paths or patterns"
            )


@dataclass(frozen=True)
class Recipe:
    """One pre-training run. A step is an optimizer step; lengths are tokens."""

    output_dir: str = setting("", "folder for checkpoints, metrics and, in model/, the finished model")
    data_dir: str = setting("", "folder for the tokenizer and the tokens, which runs may share; none: output_dir/data")
    sources: tuple[Source, ...] = setting((), "the mixture")
    held_out: float = setting(0.001, "share of every source's documents that is kept from training")
    tokenizer: str = setting("", "SentencePiece model to use; none: one is trained on the mixture")
    vocab_size: int = setting(32_000, "pieces of the tokenizer that is trained")
    tokenizer_bytes: int = setting(1_000_000_000, "text that it is trained on, from each source by its share")

    model: dict = field(
        default_factory=dict, metadata={"help": "`paper: llama-7b`, or fields of LlamaReproConfig such as hidden_size"}
    )
    context_length: int = setting(2048, "tokens that the model sees at once")

    tokens: int = setting(1_000_000_000_000, "to train on in all")
    batch_tokens: int = setting(4_194_304, "tokens of an optimizer step, over all processes")
    micro_batch_size: int = setting(4, "rows of context_length tokens in a forward pass of one process")
    learning_rate: float = setting(3e-4, "its peak")
    final_lr_ratio: float = setting(0.1, "part of it that the cosine ends at")
    warmup_steps: int = setting(2000, "steps in which it rises from 0")
    beta1: float = setting(0.9, "of AdamW")
    beta2: float = setting(0.95, "of AdamW")
    adam_eps: float = setting(1e-8, "of AdamW (LLaMA does not state it; LLaMA 2: 1e-5)")
    weight_decay: float = setting(0.1, "of AdamW, on matrices; the norms have none")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    seed: int = setting(42, "of the model's start and of the order of documents")

    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of the products; weights and optimizer are in float32. auto: bfloat16 where the device has it"
    )
    gradient_checkpointing: bool = setting(False, "compute activations again in the backward pass: less memory")
    sharding: Literal["none", "fsdp2"] = setting("none", "of weights, gradients and optimizer over the processes")
    compile: bool = setting(False, "let torch.compile fuse the model; needs a C++ compiler on a CPU")

    logging_steps: int = setting(1, "steps between lines of metrics")
    eval_steps: int = setting(1000, "steps between measurements of the bits per byte; 0: only at the end")
    eval_tokens: int = setting(1_000_000, "held-out tokens of a measurement during training")
    final_eval_tokens: int = setting(100_000_000, "held-out tokens of the measurement at the end")
    compare_with_xz: bool = setting(False, "compress the held-out text by xz -9 at the end, to stand beside the model")
    prompts: tuple[str, ...] = setting((), "texts that the finished model continues")
    save_steps: int = setting(1000, "steps between checkpoints")
    save_total_limit: int = setting(3, "checkpoints to keep, at least 2: one to go back to if the newest is damaged")

    gpu: str = setting("", "card that --plan reckons with; none: this machine's processor")
    gpus: int = setting(1, "their number")
    utilisation: float = setting(0.4, "part of the cards' peak that --plan expects")
    gpu_price: float = setting(0.0, "US dollars for an hour of one card")

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "adam_eps", "max_grad_norm", "gpu_price"):
            check(self, name, math.isfinite(getattr(self, name)), "a finite number")
        for name in ("vocab_size", "tokenizer_bytes", "context_length", "tokens", "batch_tokens", "micro_batch_size"):
            check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("logging_steps", "eval_tokens", "final_eval_tokens", "save_steps", "gpus"):
            check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "weight_decay", "eval_steps", "seed", "gpu_price"):
            check(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("learning_rate", "adam_eps", "max_grad_norm"):
            check(self, name, getattr(self, name) > 0, "more than 0")
        for name in ("held_out", "beta1", "beta2"):
            check(self, name, 0 <= getattr(self, name) < 1, "at least 0 and less than 1")
        for name in ("final_lr_ratio", "utilisation"):
            check(self, name, 0 < getattr(self, name) <= 1, "more than 0 and at most 1")
        check(self, "seed", self.seed < 2**32, "less than 2**32")
        check(self, "save_total_limit", self.save_total_limit >= 2, "at least 2")
        self._check_mixture()
        self.accumulation(1)

    def _check_mixture(self) -> None:
        if not self.sources:
            raise InputError("the recipe names no sources: add the key, a list with name, format, files and share")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise InputError(f"sources bear the same name: {', '.join(names)}; give each its own")
        total = sum(source.share for source in self.sources)
        if abs(total - 1) > SHARE_TOLERANCE:
            shares = " + ".join(f"{source.share:g} ({source.name})" for source in self.sources)
            raise InputError(f"the shares of the mixture sum to {total:g} and not to 1: {shares}; change them")

    @property
    def num_rows(self) -> int:
        """Rows of context_length tokens in a step."""
        return self.batch_tokens // self.context_length

    @property
    def num_steps(self) -> int:
        """Steps of the run: the last one may go beyond `tokens`."""
        return math.ceil(self.tokens / self.batch_tokens)

    def accumulation(self, num_processes: int) -> int:
        """Forward passes per step of each of `num_processes`. Raises where they do not come out even."""
        unit = self.context_length * self.micro_batch_size * num_processes
        if self.batch_tokens % unit:
            near = max(1, round(self.batch_tokens / unit)) * unit
            raise InputError(
                f"batch_tokens={self.batch_tokens} does not divide into {num_processes} process"
                f"{'es' if num_processes > 1 else ''} of micro_batch_size={self.micro_batch_size} rows of "
                f"context_length={self.context_length}: choose a multiple of {unit}, such as {near}"
            )
        return self.batch_tokens // unit

    @property
    def data_path(self) -> Path:
        """Folder of the tokenizer and the tokens."""
        return Path(self.data_dir) if self.data_dir else Path(self.output_dir) / "data"


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, or of that name in `recipes/`; `overrides` replace its keys. Raises `InputError`."""
    return recipe_file.load(Recipe, path, RECIPES, overrides)


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """`--key value` for every key that has one value."""
    recipe_file.add_flags(Recipe, parser)

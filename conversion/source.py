"""A checkpoint opened for reading, whatever its format, with our names; and how the format is recognised."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from hf_llama_repro import LlamaReproConfig
from hf_llama_repro.errors import CheckpointError

CONFIG_ERRORS = (ValueError, TypeError, KeyError, AttributeError, OverflowError, StrictDataclassError)
"""What `LlamaReproConfig` raises for fields of a wrong type or value."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that stays on disk until `read` brings it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """What it is written in."""
    read: Callable[[], torch.Tensor]
    """Brings it in `dtype`, or, where it is computed, in a wider one that is to be rounded once."""

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def promoted(tensors: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype that holds every tensor without loss."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


@dataclass(frozen=True)
class Source:
    """What a checkpoint says, in our terms."""

    description: str
    """For people: format, number of shards."""
    config: LlamaReproConfig
    tensors: dict[str, StoredTensor]
    """Our name -> tensor, in the order in which forward uses them; no output matrix when it is tied."""
    tokenizer: Path | None
    """What `convert_tokenizer` takes, if there is one."""
    files: dict[Path, str | None]
    """Every file that was read for it but the tokenizer's, and the md5 that it must have, where there is a list."""
    chat: bool = False
    """Whether this is a LLaMA 2 chat checkpoint."""
    token_ids_from_tokenizer: bool = False
    """Whether the special ids of `config` are only defaults, so that the tokenizer's count."""
    generation_config: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    """For the manifest: what was asked for at the conversion, or decided, that the files do not hold."""
    notes: tuple[str, ...] = ()
    """What was decided where the files leave a choice, and why."""


def is_file(path: Path) -> bool:
    """Whether there is a file; also of a name that no file can have, as a damaged list may hold one."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def open_source(path: Path, *, context_length: int | None = None, chat: bool | None = None) -> Source:
    """Opens an original Meta folder, a Hugging Face Llama or LlamaRepro folder, or a GGUF file.

    `context_length` (tokens) and `chat` answer what a Meta folder may not tell.
    Raises `CheckpointError` when it is none of these, or damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    is_meta = path.is_dir() and ((path / "params.json").exists() or any(path.glob("consolidated.*.pth")))
    if not is_meta and (context_length is not None or chat is not None):
        raise CheckpointError(
            f"{path} is no Meta folder: --context-length and --chat answer what only Meta's files leave open"
        )
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path} is not a GGUF file: give a .gguf file, or the folder of a checkpoint")
        from .gguf_file import open_gguf

        return open_gguf(path)
    if is_meta:
        from .meta import open_meta

        return open_meta(path, context_length=context_length, chat=chat)
    if (path / "config.json").exists():
        from .hugging_face import open_hugging_face

        return open_hugging_face(path)
    raise CheckpointError(
        f"{path} is not a checkpoint: neither params.json with consolidated.NN.pth (Meta) "
        "nor config.json with *.safetensors (Hugging Face) is in it, and it is not a .gguf file"
    )

"""A source as tokens on the disk: what training reads, at any place, without looking at the text again.

A document is BOS, its tokens, EOS. Of each source there are two sets, train and held_out, and of each set three files:
tokens (uint16 or uint32), and per document the end among the tokens and the bytes of its text (int64).
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from hf_llama_repro.durable import rename
from hf_llama_repro.errors import InputError

from .recipe import Recipe, Source
from .sources import documents, fingerprint, is_held_out
from .tokenizer import load_processor, tokenizer_sha256

SETS = ("train", "held_out")
SETTINGS = "settings.json"
# Characters of text that are encoded together.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Tokens:
    """The documents of one set of a source."""

    ids: np.ndarray
    """All tokens, one document after the other."""
    ends: np.ndarray
    """Of each document, in `ids`."""
    num_bytes: np.ndarray
    """Of each document's text, in UTF-8."""

    @classmethod
    def open(cls, folder: Path, name: str, dtype: str) -> "Tokens":
        kinds = {"ids": dtype, "ends": "int64", "num_bytes": "int64"}
        return cls(**{kind: _mapped(folder / f"{name}.{kind}", numbers) for kind, numbers in kinds.items()})

    def __len__(self) -> int:
        return len(self.ends)

    def start(self, document: int) -> int:
        """Of the document, in `ids`."""
        return int(self.ends[document - 1]) if document else 0

    def length(self, document: int) -> int:
        """Tokens of the document, BOS and EOS among them."""
        return int(self.ends[document]) - self.start(document)


@dataclass(frozen=True)
class Prepared:
    """All sources of a recipe as tokens."""

    train: dict[str, Tokens]
    held_out: dict[str, Tokens]
    sha256: dict[str, str | None]
    """Of each source's training documents as tokens, and of the tokenizer."""
    lines: list[str]
    """For people: what each source holds."""

    def identity(self) -> dict[str, dict[str, Any]]:
        """Return what a resumed run compares with that of its start.

        data: documents, tokens and bytes of each source; sha256: of its tokens and of the tokenizer, None where they
        were prepared without.
        """
        sizes = {
            name: [len(tokens), len(tokens.ids), int(tokens.num_bytes.sum())] for name, tokens in self.train.items()
        }
        return {"data": sizes, "sha256": self.sha256}


def _mapped(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def prepare(recipe: Recipe) -> list[str]:
    """Writes every source's tokens that are not there yet, each whole or not at all; lines for humans come back.

    Raises `InputError` for a source that cannot be read or holds nothing to train on.
    """
    processor = load_processor(recipe)
    tokenizer = tokenizer_sha256(recipe)
    lines = []
    for source in recipe.sources:
        what = {"tokenizer": tokenizer, "held_out": recipe.held_out, "files": fingerprint(source), **_spec(source)}
        folder = recipe.data_path / source.name
        found = _settings(folder)
        if found.get("made_of") != what:
            lines.append(f"prepare     {source.name}: {'its files or settings changed' if found else 'not there yet'}")
            _write(folder, source, recipe, processor, what)
        elif not what["files"]:
            lines.append(f"prepare     {source.name}: as it was; whether the dataset has changed is not checked")
    return lines


def open_prepared(recipe: Recipe) -> Prepared:
    """What `prepare` wrote. Raises `InputError` where no document is as long as the context, or none is held out."""
    train, held_out, lines, longest = {}, {}, [], 0
    checksums: dict[str, str | None] = {"the tokenizer": tokenizer_sha256(recipe)}
    for source in recipe.sources:
        folder = recipe.data_path / source.name
        settings = _settings(folder)
        train[source.name] = tokens = Tokens.open(folder, "train", settings["dtype"])
        kept = held_out[source.name] = Tokens.open(folder, "held_out", settings["dtype"])
        longest = max(longest, settings["longest"])
        checksums[source.name] = settings.get("sha256")
        epochs = source.share * recipe.num_steps * recipe.batch_tokens / len(tokens.ids)
        lines.append(
            f"source      {source.name}: {len(tokens):,} documents, {int(tokens.num_bytes.sum()):,} bytes, "
            f"{len(tokens.ids):,} tokens; {len(kept):,} documents, {int(kept.num_bytes.sum()):,} bytes held out; "
            f"share {source.share:.1%}, {epochs:.2f} epochs"
            + (f"; {settings['num_empty']} empty" if settings["num_empty"] else "")
            + (f"; {settings['num_inexact']} not given back exactly" if settings["num_inexact"] else "")
        )
    if longest < recipe.context_length:
        raise InputError(
            f"context_length={recipe.context_length} is longer than any document: the longest has {longest} tokens; "
            "choose a shorter context, or longer documents"
        )
    return Prepared(train, held_out, checksums, lines)


def token_count(recipe: Recipe, source: Source) -> int:
    """Training tokens of a source that was prepared; 0 before."""
    folder = recipe.data_path / source.name
    settings = _settings(folder)
    return len(Tokens.open(folder, "train", settings["dtype"]).ids) if settings else 0


def _spec(source: Source) -> dict[str, Any]:
    """What of a source decides its documents."""
    spec = asdict(source)
    return {name: spec[name] for name in ("format", "text_key")} | {"patterns": list(source.files)}


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(folder: Path, source: Source, recipe: Recipe, processor: SentencePieceProcessor, what: dict) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = "uint16" if len(processor) <= 1 << 16 else "uint32"
    counts = {"longest": 0, "num_empty": 0, "num_inexact": 0}
    sets = {name: _SetWriter(partial, name, dtype) for name in SETS}
    for texts in _blocks(documents(source)):
        encoded = processor.encode(texts, num_threads=-1)
        decoded = processor.decode(encoded)
        for text, ids, back in zip(texts, encoded, decoded, strict=True):
            if not ids:
                counts["num_empty"] += 1
                continue
            counts["longest"] = max(counts["longest"], len(ids) + 2)
            counts["num_inexact"] += back != text
            sets["held_out" if is_held_out(text, recipe.held_out) else "train"].add(
                [processor.bos_id(), *ids, processor.eos_id()], len(text.encode("utf-8", "surrogatepass"))
            )
    for written in sets.values():
        written.close()
    if not sets["train"].end:
        shutil.rmtree(partial)
        raise InputError(f"source {source.name} is empty: it holds no text to train on; remove it from the mixture")
    content = {"made_of": what, "dtype": dtype, "sha256": sets["train"].sha256.hexdigest(), **counts}
    (partial / SETTINGS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    rename(partial, folder)


def _blocks(texts: Iterator[str]) -> Iterator[list[str]]:
    """Some documents at a time, all of them in order."""
    for first in texts:
        block, left = [first], _BLOCK - len(first)
        while left > 0 and (text := next(texts, None)) is not None:
            block.append(text)
            left -= len(text)
        yield block


class _SetWriter:
    """The three files of a set."""

    def __init__(self, folder: Path, name: str, dtype: str):
        self.dtype, self.end = dtype, 0
        self.sha256 = sha256()
        """Of the number of tokens and the tokens of every document."""
        self._files = {kind: (folder / f"{name}.{kind}").open("wb") for kind in ("ids", "ends", "num_bytes")}

    def add(self, ids: list[int], num_bytes: int) -> None:
        self.end += len(ids)
        tokens = np.array(ids, self.dtype).tobytes()
        self.sha256.update(len(ids).to_bytes(8, "little") + tokens)
        self._files["ids"].write(tokens)
        self._files["ends"].write(np.array([self.end], np.int64).tobytes())
        self._files["num_bytes"].write(np.array([num_bytes], np.int64).tobytes())

    def close(self) -> None:
        for file in self._files.values():
            file.close()

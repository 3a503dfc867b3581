"""The documents of a source, one after the other: nothing is held in memory but the document at hand."""

import glob
import gzip
import hashlib
import json
import logging
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_llama_repro.errors import InputError

from .python_library import documentation_documents, source_documents
from .recipe import Source


def documents(source: Source) -> Iterator[str]:
    """Its texts, always in the same order. Raises `InputError` naming file and line of what cannot be read."""
    if source.format == "python_sources":
        yield from source_documents()
    elif source.format == "python_documentation":
        yield from documentation_documents()
    elif source.format in ("parquet", "dataset"):
        yield from _rows(source)
    else:
        for path in files(source):
            yield from _lines(path, source) if source.format == "jsonl" else [_text(path)]


def files(source: Source) -> list[Path]:
    """The source's files in order. Raises `InputError` where a pattern matches none."""
    found: list[Path] = []
    for pattern in source.files:
        matching = sorted(path for name in glob.glob(pattern, recursive=True) if (path := Path(name)).is_file())
        if not matching:
            raise InputError(f"source {source.name} is empty: {pattern} matches no file; correct the path or pattern")
        found += matching
    return found


def fingerprint(source: Source) -> list[list[Any]]:
    """What tells whether a source's files are those that were prepared: names, sizes and times.

    Empty where nothing tells it: of a dataset that `datasets` finds by its name.
    """
    if source.format.startswith("python_"):
        return [[platform.python_version()]]
    found = files(source) if source.format != "dataset" else sorted(Path(source.files[0]).rglob("*"))
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in found if path.is_file()]


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is kept from training: by its content alone, so that equal documents are on one side."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _open(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8", newline="")


def _text(path: Path) -> str:
    try:
        with _open(path) as file:
            return file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}): remove or convert the file") from None


def _lines(path: Path, source: Source) -> Iterator[str]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _document(json.loads(line), source, f"{path}, line {number}")
    except InputError:
        raise
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}, line {number} or the next: not JSON in UTF-8 ({error}): mend the file") from None


def _rows(source: Source) -> Iterator[str]:
    """Rows of Parquet files, or of anything that `datasets` opens, as a stream."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            f"source {source.name}: format={source.format} needs `datasets`: pip install 'hf-llama-repro[pretrain]'"
        ) from None
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs is raised as well
    if source.format == "parquet":
        what: Any = {"path": "parquet", "data_files": [str(path) for path in files(source)]}
    else:
        what = dict(zip(("path", "name"), source.files, strict=False))
    try:
        for number, row in enumerate(load_dataset(**what, split="train", streaming=True), start=1):
            yield _document(row, source, f"source {source.name}, row {number}")
    except InputError:
        raise
    except Exception as error:  # datasets, pyarrow and fsspec have exceptions of their own for what a file may be
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"source {source.name} cannot be read ({type(error).__name__}: {reason})") from None


def _document(record: Any, source: Source, where: str) -> str:
    text = record.get(source.text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{where}: no text under the key {source.text_key!r} (there is: {keys}); set text_key")
    return text

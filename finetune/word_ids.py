"""Encodes texts by looking up their words: the ids of the tokenizer, in a quarter of its time.

A SentencePiece BPE tokenizer merges a whole text as one word, so that `tokenizers` caches nothing. But where no piece
extends beyond the end of a word, no merge crosses from one word to the next: the ids of a text are those of its words,
each with the spaces before it, one after the other.
"""

import re
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

SPACE = "\u2581"
"""What SentencePiece writes for a space."""
_WORDS = re.compile(" *[^ ]+| +")
# Characters; longer ones seldom come again.
_LONGEST = 32
_MOST = 1 << 18


class WordIds(dict[str, list[int]]):
    """Word -> ids, for a tokenizer in the middle of a text of which `encodes_by_words` is true."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> list[int]:
        ids = self._tokenizer.encode(word, add_special_tokens=False).ids
        if len(word) <= _LONGEST and len(self) < _MOST:
            self[word] = ids
        return ids

    def encode(self, text: str) -> list[int]:
        """Return the ids that the tokenizer gives."""
        if SPACE in text:  # would be merged with the spaces around it
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        return list(chain.from_iterable(map(self.__getitem__, _WORDS.findall(text))))


def encodes_by_words(backend: dict[str, Any]) -> bool:
    """Whether the ids of a text are those of its words, one after the other; `backend` is a parsed tokenizer.json."""
    model = backend["model"]
    if model["type"] != "BPE" or model.get("dropout") or not model.get("byte_fallback"):
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or not _only_writes_spaces(backend):
        return False
    # Other added tokens are searched for in the whole text. Without one of the bytes, <unk> is: several become one.
    if not all(token["special"] for token in backend["added_tokens"]):
        return False
    vocab = model["vocab"]
    return all(f"<0x{byte:02X}>" in vocab for byte in range(256)) and not any(
        SPACE in piece.lstrip(SPACE) for piece in vocab
    )


def puts_space_first(backend: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before every text, and does not look at how it begins."""
    steps = _steps(backend, "normalizer", "normalizers")
    return [step for step in steps if step["type"] == "Prepend"] == steps[:1] == [{"type": "Prepend", "prepend": SPACE}]


def _only_writes_spaces(backend: dict[str, Any]) -> bool:
    """Whether all that is done to a text is that spaces become SPACE."""
    normalizers = _steps(backend, "normalizer", "normalizers")
    pre_tokenizers = _steps(backend, "pre_tokenizer", "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}
    return (normalizers, pre_tokenizers) in (([replace], []), ([], [metaspace]))


def _steps(backend: dict[str, Any], part: str, key: str) -> list[dict[str, Any]]:
    found = backend[part]
    return [] if found is None else found[key] if found["type"] == "Sequence" else [found]

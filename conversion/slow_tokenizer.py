"""Token ids as the slow LlamaTokenizer of transformers 4 gives them: SentencePiece between the added tokens.

Folders without a tokenizer.json were trained and served with that class, so it is the reference for their ids:
https://github.com/huggingface/transformers/blob/v4.57.1/src/transformers/models/llama/tokenization_llama.py, `tokenize`
https://github.com/huggingface/transformers/blob/v4.57.1/src/transformers/tokenization_python.py, `tokenize`
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from .awkward_texts import AWKWARD_TEXTS

SPACE = "▁"
# Appended to a serialized ModelProto, a field is merged into the message: normalizer_spec.add_dummy_prefix = false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_MAX_PROBED = 500
"""Added tokens that are probed; some models reserve a thousand alike."""


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that is cut out of a text before SentencePiece sees the rest."""

    id: int
    content: str
    special: bool
    lstrip: bool = False
    """Takes the white space on its left with it."""
    rstrip: bool = False


class SlowTokenizer:
    """`legacy`: every stretch between added tokens gets SentencePiece's leading space, not only the first."""

    def __init__(self, model: Path, added: Iterable[AddedToken], *, legacy: bool, prefix: bool = True):
        from sentencepiece import SentencePieceProcessor

        self._added = {token.content: token for token in added}
        self._legacy, self._prefix = legacy, prefix
        content = model.read_bytes() + (b"" if legacy else _NO_DUMMY_PREFIX)
        self._processor = SentencePieceProcessor(model_proto=content)
        contents = sorted(self._added, key=len, reverse=True)  # the longest of those that begin alike
        self._pattern = re.compile("(" + "|".join(map(re.escape, contents)) + ")") if contents else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS and EOS."""
        parts = [self._parts(text) for text in texts]
        plain = {part for listed in parts for part in listed if part not in self._added}
        ids = dict(zip(plain, self._processor.encode(list(plain)), strict=True))
        ids |= {content: [token.id] for content, token in self._added.items()}
        return [[index for part in listed for index in ids[part]] for listed in parts]

    def _parts(self, text: str) -> list[str]:
        """Added tokens, and what lies between them for SentencePiece."""
        if not text:
            return []
        if not self._legacy:
            text = (SPACE if self._prefix else "") + text.replace(SPACE, " ")
        parts = self._pattern.split(text) if self._pattern else [text]
        self._strip(parts)
        if not self._legacy and parts[0] == SPACE and len(parts) > 1:
            parts[0] = ""  # no leading space before an added token
        return [part for part in parts if part]

    def _strip(self, parts: list[str]) -> None:
        """Remove the white space that added tokens take with them. Odd places are added tokens."""
        for place in range(1, len(parts), 2):
            token = self._added[parts[place]]
            if token.rstrip:
                parts[place + 1] = parts[place + 1].lstrip()
            if token.lstrip:
                parts[place - 1] = parts[place - 1].rstrip()


def texts_with(added: Iterable[AddedToken]) -> Iterator[str]:
    """Texts in which added tokens meet words, spaces, newlines, punctuation and one another."""
    contents = [token.content for token in added][:_MAX_PROBED]
    for content in contents:
        for text in ("{0}", "a{0}b", "a {0} b", " {0}", "  {0}  a  {0}", "{0}{0}a", "a.{0}\n a\n", "{0}user\n  a{0}\n"):
            yield text.replace("{0}", content)
    yield from (first + second + "a" for first, second in pairwise(contents))
    yield from (content + text + content for content in contents[:2] for text in AWKWARD_TEXTS)

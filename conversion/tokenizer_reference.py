"""The tokenizer that a source holds, as another package than this one encodes with it: the measure of a conversion.

Encoders are the `sentencepiece` package for SentencePiece models (those in GGUF files are put together again), and the
`tokenizers` package for tokenizer.json.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .hugging_face import read_json
from .tokenizer import SPACE, USER_DEFINED

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

    from .tokenizer import TokenTable

Ids = list[list[int]]
Frame = tuple[list[int], list[int]]
"""Ids in front of every text and behind it."""
# Appended to a serialized ModelProto, a field is merged into the message: normalizer_spec.add_dummy_prefix = false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The source's own tokenizer. Where `encode` is None, nothing but this package knows its encoding."""

    name: str
    tokens: Sequence[str | None]
    """By id."""
    encode: Callable[[list[str], bool], Ids] | None
    """Ids of texts, without a frame. The second argument: control tokens that are spelt stay text."""
    knows_control: bool = False
    """Whether it also takes control tokens out of text."""
    matched: frozenset[str] = frozenset()
    """Tokens that it takes out of text, beside what its encoding of text makes."""
    texts: tuple[str, ...] = ()
    """To compare on, beside the awkward ones: all its pieces."""
    frames: tuple[Frame, ...] = ()
    """What may be put around a text: one, or two where the source's files contradict each other."""
    added: dict[str, int] = field(default_factory=dict)
    """Tokens that other files add to it."""
    special: dict[str, int | None] = field(default_factory=dict)
    """Ids of "bos", "eos" and "unk"; without a key what it does not say."""
    templates: dict[str, str] = field(default_factory=dict)
    """Chat templates; "default" is the one that is used without a name."""


def references(source: Path) -> list[Reference]:
    """The tokenizers in a source, the most telling first: a Hugging Face folder may hold two."""
    if source.is_dir():
        folder = _HuggingFace(source)
        readers = {"tokenizer.json": folder.tokenizer_json, "tokenizer.model": folder.sentencepiece}
        return [read() for name, read in readers.items() if (source / name).is_file()]
    if source.suffix == ".json":
        return [_HuggingFace(source.parent).tokenizer_json(source.name)]
    with source.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    return [_gguf(source) if is_gguf else _sentencepiece_file(source)]


def _sentencepiece_file(source: Path) -> Reference:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(source))
    special = _sentencepiece_special(processor)
    return _sentencepiece("SentencePiece", processor, _frame(special["bos"], None), special=special)


def _frame(front: int | None, end: int | None) -> Frame:
    return [] if front is None else [front], [] if end is None else [end]


def _sentencepiece(name: str, processor: "SentencePieceProcessor", frame: Frame, **fields: Any) -> Reference:
    tokens = [processor.id_to_piece(index) for index in range(len(processor))]
    plain = (
        piece.replace(SPACE, " ")
        for index, piece in enumerate(tokens)
        if not (processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index))
    )
    return Reference(
        **{"name": name, "tokens": tokens, "frames": (frame,), "texts": tuple(plain), **fields},
        encode=lambda texts, _: processor.encode(texts),
    )


def _sentencepiece_special(processor: "SentencePieceProcessor") -> dict[str, int | None]:
    ids = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id()}
    return {name: index if index >= 0 else None for name, index in ids.items()}


def _gguf(source: Path) -> Reference:
    from sentencepiece import SentencePieceProcessor

    from .gguf_tokenizer import read_gguf_metadata, read_gguf_tokenizer

    _, table, _ = read_gguf_tokenizer(source)
    metadata = read_gguf_metadata(source)
    frame = _frame(table.bos_id if table.add_bos else None, table.eos_id if table.add_eos else None)
    fields: dict[str, Any] = {
        "special": {"bos": table.bos_id, "eos": table.eos_id, "unk": table.unk_id},
        "templates": {} if table.chat_template is None else {"default": table.chat_template},
    }
    if metadata["tokenizer.ggml.model"] != "llama":
        return Reference(name=source.name, tokens=list(table.tokens), encode=None, frames=(frame,), **fields)
    dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    model = sentencepiece_model(table, metadata["tokenizer.ggml.scores"], dummy_prefix=dummy_prefix)
    return _sentencepiece(
        "SentencePiece with the file's pieces",
        SentencePieceProcessor(model_proto=model),
        frame,
        matched=frozenset(token for token, kind in zip(table.tokens, table.kinds, strict=True) if kind == USER_DEFINED),
        **fields,
    )


def sentencepiece_model(table: "TokenTable", scores: Sequence[float], *, dummy_prefix: bool) -> bytes:
    """A ModelProto of the pieces, of the type BPE, as the protocol buffer that the package reads.

    Numbers of the fields: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """

    def number(field: int, value: int) -> bytes:
        return _varint(field << 3) + _varint(value)

    def block(field: int, content: bytes) -> bytes:
        return _varint(field << 3 | 2) + _varint(len(content)) + content

    pieces = b"".join(
        block(1, block(1, token.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, kind))
        for token, score, kind in zip(table.tokens, scores, table.kinds, strict=True)
    )
    none = 1 << 64  # -1, in two's complement
    ids = [(40, table.unk_id), (41, table.bos_id), (42, table.eos_id), (43, table.pad_id)]
    trainer = number(3, 2) + number(35, 1)  # BPE, byte_fallback
    trainer += b"".join(number(field, none - 1 if index is None else index) for field, index in ids)
    normalizer = block(1, b"identity") + number(3, dummy_prefix) + number(4, 0) + number(5, 1)
    return pieces + block(2, trainer) + block(3, normalizer)


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


class _HuggingFace:
    """The tokenizer's files of a Hugging Face folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = {**self._json("special_tokens_map.json"), **self._json("tokenizer_config.json")}
        listed = self.config.get("added_tokens_decoder") or {}
        self.added = {
            **self._json("added_tokens.json"),
            **{_content(token): int(index) for index, token in listed.items()},
        }

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json(path) if path.is_file() else {}

    def _templates(self) -> dict[str, str]:
        given = self._json("chat_template.json").get("chat_template") or self.config.get("chat_template") or {}
        if isinstance(given, list):
            given = {template["name"]: template["template"] for template in given}
        templates = {"default": given} if isinstance(given, str) else dict(given)
        files = {path.stem: path for path in (self.folder / "additional_chat_templates").glob("*.jinja")}
        if (self.folder / "chat_template.jinja").is_file():
            files["default"] = self.folder / "chat_template.jinja"
        return templates | {name: path.read_text(encoding="utf-8") for name, path in files.items()}

    def _special(self, id_of: Callable[[str], int | None]) -> dict[str, int | None]:
        """Of BOS, EOS and UNK those that are named; None where the files say that there is none."""
        # An empty name, as in the first public conversions, says nothing.
        named = {name: self.config.get(f"{name}_token", "") for name in ("bos", "eos", "unk")}
        return {
            name: None if token is None else id_of(_content(token))
            for name, token in named.items()
            if token is None or _content(token)
        }

    def tokenizer_json(self, name: str = "tokenizer.json") -> Reference:
        from tokenizers import Tokenizer

        raw = Tokenizer.from_file(str(self.folder / name))
        by_id = {index: token for token, index in raw.get_vocab(with_added_tokens=True).items()}

        def encode(texts: list[str], split: bool) -> Ids:
            raw.encode_special_tokens = split
            return [encoding.ids for encoding in raw.encode_batch(texts, add_special_tokens=False)]

        special = self._special(raw.token_to_id)
        return Reference(
            name=name,
            tokens=[by_id.get(index) for index in range(max(by_id, default=-1) + 1)],
            encode=encode,
            knows_control=not self.config.get("split_special_tokens"),
            matched=frozenset(token.content for token in raw.get_added_tokens_decoder().values()),
            texts=tuple(raw.decode([index], skip_special_tokens=False) for index in by_id),
            frames=self._frames(raw, special),
            added={token: index for token, index in self.added.items() if index not in by_id},
            special=special,
            templates=self._templates(),
        )

    def _frames(self, raw: Any, special: dict[str, int | None]) -> tuple[Frame, ...]:
        """What tokenizer.json puts around texts, and what the flags of tokenizer_config.json ask for."""
        bare, full = (raw.encode("a", add_special_tokens=framed).ids for framed in (False, True))
        start = next((place for place in range(len(full)) if full[place : place + len(bare)] == bare), 0)
        own = full[:start], full[start + len(bare) :]
        asked = [self.config.get(f"add_{name}_token") for name in ("bos", "eos")]
        ids = [special.get(name) for name in ("bos", "eos")]
        flagged = [
            part if flag is None else [index] if flag and index is not None else []
            for part, flag, index in zip(own, asked, ids, strict=True)
        ]
        return own, (flagged[0], flagged[1])

    def sentencepiece(self) -> Reference:
        from sentencepiece import SentencePieceProcessor

        content = (self.folder / "tokenizer.model").read_bytes()
        without_prefix = self.config.get("add_prefix_space") is False
        processor = SentencePieceProcessor(model_proto=content + (_NO_DUMMY_PREFIX if without_prefix else b""))
        pieces = [processor.id_to_piece(index) for index in range(len(processor))]

        def id_of(token: str) -> int | None:
            return self.added.get(token, processor.piece_to_id(token) if token in pieces else None)

        special = {**_sentencepiece_special(processor), **self._special(id_of)}
        flags = {name: self.config.get(f"add_{name}_token") for name in ("bos", "eos")}
        # A piece that no text contains may bear another name.
        named = {index: token for token, index in self.added.items()}
        return _sentencepiece(
            "SentencePiece",
            processor,
            _frame(special["bos"] if flags["bos"] in (None, True) else None, special["eos"] if flags["eos"] else None),
            tokens=[named.get(index, piece) for index, piece in enumerate(pieces)],
            added=self.added,
            special=special,
            templates=self._templates(),
        )


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)

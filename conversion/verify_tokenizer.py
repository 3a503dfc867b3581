"""Compares the tokenizer of a converted folder with its source's own, and with one that is made of the source again.

The latter comes first: what the converter refuses is not read here.

The source's own encoder is the `sentencepiece` package for SentencePiece models (those in GGUF files are put together
again), and the `tokenizers` package for tokenizer.json. Text that spells control tokens is compared twice: taken as
text, which is what SentencePiece always does, and as the folder itself takes it.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .awkward_texts import AWKWARD_TEXTS, control_texts
from .checks import Check, compared
from .hugging_face import read_json
from .tokenizer import SPACE

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

    from .tokenizer import TokenTable

SPECIAL = ("bos", "eos", "unk", "pad")
_SETTINGS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "split_special_tokens",
    "clean_up_tokenization_spaces",
)
Ids = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The source's own tokenizer. Where `encode` is None, nothing but this package knows its encoding."""

    name: str
    tokens: Sequence[str | None]
    """By id; those that were added to it are in `added`."""
    encode: Callable[[list[str], bool], Ids] | None
    """Ids of texts with what is put around each. The second argument: control tokens that are spelt stay text."""
    knows_control: bool = False
    """Whether it also takes control tokens out of text."""
    texts: tuple[str, ...] = ()
    """To compare on, beside the awkward ones: all its pieces."""
    added: dict[str, int] = field(default_factory=dict)
    special: dict[str, int | None] = field(default_factory=dict)
    """Ids of "bos", "eos" and "unk"; without a key what it does not say."""
    template: Any = None


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
    front = [] if special["bos"] is None else [special["bos"]]
    return _sentencepiece("SentencePiece", processor, front, [], special=special)


def _sentencepiece(
    name: str, processor: "SentencePieceProcessor", front: list[int], end: list[int], **fields: Any
) -> Reference:
    tokens = [processor.id_to_piece(index) for index in range(len(processor))]
    plain = (
        piece.replace(SPACE, " ")
        for index, piece in enumerate(tokens)
        if not (processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index))
    )
    return Reference(
        name=name,
        tokens=tokens,
        encode=lambda texts, _: [[*front, *ids, *end] for ids in processor.encode(texts)],
        texts=tuple(plain),
        **fields,
    )


def _sentencepiece_special(processor: "SentencePieceProcessor") -> dict[str, int | None]:
    ids = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id()}
    return {name: index if index >= 0 else None for name, index in ids.items()}


def _gguf(source: Path) -> Reference:
    from sentencepiece import SentencePieceProcessor

    from .gguf_tokenizer import read_gguf_metadata, read_gguf_tokenizer

    _, table, _ = read_gguf_tokenizer(source)
    metadata = read_gguf_metadata(source)
    fields: dict[str, Any] = {
        "special": {"bos": table.bos_id, "eos": table.eos_id, "unk": table.unk_id},
        "template": table.chat_template,
    }
    if metadata["tokenizer.ggml.model"] != "llama":
        return Reference(name=source.name, tokens=list(table.tokens), encode=None, **fields)
    dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    model = sentencepiece_model(table, metadata["tokenizer.ggml.scores"], dummy_prefix=dummy_prefix)
    front, end = ([index] if wanted else [] for index, wanted in _frame(table))
    return _sentencepiece(
        "SentencePiece with the file's pieces", SentencePieceProcessor(model_proto=model), front, end, **fields
    )


def _frame(table: "TokenTable") -> list[tuple[Any, bool]]:
    return [(table.bos_id, table.add_bos), (table.eos_id, table.add_eos)]


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
        template = folder / "chat_template.jinja"
        given = self.config.get("chat_template") or self._json("chat_template.json").get("chat_template")
        self.template = template.read_text(encoding="utf-8") if template.is_file() else given

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json(path) if path.is_file() else {}

    def _special(self, id_of: Callable[[str], int | None]) -> dict[str, int | None]:
        named = {name: self.config.get(f"{name}_token") for name in ("bos", "eos", "unk")}
        return {name: id_of(_content(token)) for name, token in named.items() if token is not None}

    def tokenizer_json(self, name: str = "tokenizer.json") -> Reference:
        from tokenizers import Tokenizer

        raw = Tokenizer.from_file(str(self.folder / name))
        vocabulary = raw.get_vocab(with_added_tokens=True)
        by_id = {index: token for token, index in vocabulary.items()}

        def encode(texts: list[str], split: bool) -> Ids:
            raw.encode_special_tokens = split
            return [encoding.ids for encoding in raw.encode_batch(texts)]

        return Reference(
            name=name,
            tokens=[by_id.get(index) for index in range(max(by_id, default=-1) + 1)],
            encode=encode,
            knows_control=not self.config.get("split_special_tokens"),
            texts=tuple(raw.decode([index], skip_special_tokens=False) for index in by_id),
            added={token: index for token, index in self.added.items() if index not in by_id},
            special=self._special(raw.token_to_id),
            template=self.template,
        )

    def sentencepiece(self) -> Reference:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(self.folder / "tokenizer.model"))

        def id_of(token: str) -> int | None:
            index = self.added.get(token, processor.piece_to_id(token))
            return index if token in self.added or processor.id_to_piece(index) == token else None

        special = {**_sentencepiece_special(processor), **self._special(id_of)}
        ids = [
            (special["bos"], self.config.get("add_bos_token", True)),
            (special["eos"], self.config.get("add_eos_token", False)),
        ]
        front, end = ([index] if wanted and index is not None else [] for index, wanted in ids)
        return _sentencepiece(
            "SentencePiece", processor, front, end, added=self.added, special=special, template=self.template
        )


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def compare_tokenizer(source: Path, found: Any, again: Any) -> Check:
    """Of `found`, the folder's tokenizer: vocabulary, ids and settings. `again` was made of the source once more."""
    outcomes = [(reference, _differences(reference, found, again)) for reference in references(source)]
    reference, differences = next((pair for pair in outcomes if not pair[1]), outcomes[0])
    texts = len(_texts(reference, found))
    right = (
        f"{len(found):,} tokens, and the ids of {texts:,} texts, are those of {reference.name}"
        if reference.encode
        else f"{len(found):,} tokens are the source's; ids of {texts:,} texts are those of its tokenizer made again"
    )
    return compared("tokenizer", differences, right, {"texts": texts, "differing": differences})


def _texts(reference: Reference, found: Any) -> list[str]:
    """Without those in which the folder finds tokens that were added to SentencePiece's, as text or not."""
    texts = [*AWKWARD_TEXTS, *reference.texts]
    pieces = set(reference.tokens)
    added = [
        str(token)
        for token in found.added_tokens_decoder.values()
        if not token.special and str(token) not in pieces and str(token)
    ]
    return [text for text in texts if not any(token in text for token in added)] if added else texts


def _differences(reference: Reference, found: Any, again: Any) -> list[str]:
    return [
        *_other_tokens(reference, found, again),
        *_other_ids(reference, found, again),
        *(
            f"{name} is {getattr(found, name)}, not {getattr(again, name)}"
            for name in _SETTINGS
            if getattr(found, name, None) != getattr(again, name, None)
        ),
    ]


def _other_tokens(reference: Reference, found: Any, again: Any) -> Iterator[str]:
    # Not convert_ids_to_tokens, which gives what an added token is normalized to.
    tokens = {index: token for token, index in found.get_vocab().items()}
    differing = [
        (index, tokens.get(index), expected)
        for index, expected in enumerate(reference.tokens)
        if expected is not None and tokens.get(index) != expected
    ]
    if differing:
        index, token, expected = differing[0]
        yield f"{len(differing)} tokens differ, the first is {index}: {token!r}, not {expected!r}"
    for token, index in reference.added.items():
        if found.get_vocab().get(token) != index:
            yield f"the added token {token!r} is {found.get_vocab().get(token)}, not {index}"
    if found.get_vocab() != again.get_vocab():
        yield f"{len(set(found.get_vocab().items()) ^ set(again.get_vocab().items()))} entries of the vocabulary differ"
    ours, theirs = found.added_tokens_decoder, again.added_tokens_decoder
    for index in sorted(ours.keys() | theirs.keys()):
        if repr(ours.get(index)) != repr(theirs.get(index)):
            yield f"the added token {index} is {ours.get(index)!r}, not {theirs.get(index)!r}"


def _other_ids(reference: Reference, found: Any, again: Any) -> Iterator[str]:
    texts = _texts(reference, found)
    if reference.encode is not None:
        yield from _parting(texts, _encode(found, texts, True), reference.encode(texts, True))
        if reference.knows_control:
            yield from _parting(texts, _encode(found, texts, None), reference.encode(texts, False))
    else:
        yield from _parting(texts, _encode(found, texts, True), _encode(again, texts, True))
    added = [str(token) for token in found.added_tokens_decoder.values()]
    spelling = [*AWKWARD_TEXTS, *control_texts(added)]
    ids = _encode(found, spelling, None)
    yield from _parting(spelling, ids, _encode(again, spelling, None))
    if found.batch_decode(ids) != again.batch_decode(ids):
        yield "ids are decoded to other texts"


def _encode(tokenizer: Any, texts: list[str], split: bool | None) -> Ids:
    """`split` None: as the folder takes control tokens that are spelt."""
    return tokenizer(texts, split_special_tokens=split, verbose=False).input_ids


def _parting(texts: list[str], found: Ids, expected: Ids) -> Iterator[str]:
    differing = [
        number for number, (ids, right) in enumerate(zip(found, expected, strict=True)) if list(ids) != list(right)
    ]
    if differing:
        first = differing[0]
        yield (
            f"{len(differing)} of {len(texts)} texts have other ids, the first {texts[first][:60]!r}: "
            f"{found[first][:10]}, not {expected[first][:10]}"
        )


def compare_template(said: Any, found: Any, again: Any, *, chat: bool) -> Check:
    """`said`: the source's; `again`: what would be written. `chat`: a source without one is given LLaMA 2's."""
    differences = []
    if found != again:
        differences = [f"{_length(found)}, not {_length(again)}"]
    elif found != said and not (said is None and chat):
        differences = [f"{_length(found)}, but the source has {_length(said)}"]
    own = "LLaMA 2's, as for a chat model" if said is None else "the source's"
    return compared("chat template", differences, "none, as in the source" if found is None else own)


def _length(template: Any) -> str:
    return (
        "none"
        if template is None
        else f"a template of {len(template)} characters"
        + (f" ({template[:30]!r} ...)" if isinstance(template, str) else "")
    )

"""From LLaMA's SentencePiece model (or a GGUF's, or a Hugging Face folder's tokenizer) to a folder for AutoTokenizer.

The result is `tokenizer.json` for the class PreTrainedTokenizerFast, whose ids equal SentencePiece's on every text:
LlamaTokenizer would rebuild its own pre-tokenizer and differ. Before anything is written, ids are compared with the
`sentencepiece` package's, which is also the reference for how the byte-pair encoding works: of all neighbours whose
concatenation is a piece, the one with the best score is merged first, and of equal scores the leftmost.
"""

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hf_llama_repro.errors import CheckpointError

from .awkward_texts import AWKWARD_TEXTS
from .slow_tokenizer import SPACE, AddedToken

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

NO_TOKENIZER = "Give another file with `--tokenizer FILE`, or convert without one: `--no-tokenizer`."
_SHOWN = 4
_MAX_PIECE = 1000
"""Characters; LLaMA's longest piece has 16, and all ways to cut one in two are looked at."""

# Kinds of pieces, numbered as in SentencePiece's ModelProto and in GGUF's `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# In Meta's code each finished turn is a text of its own with its own BOS and EOS, and so are the pieces between two
# control tokens here: SentencePiece's leading space comes back after each of them.
# https://github.com/meta-llama/llama/blob/main/llama/generation.py, `Llama.chat_completion`
LLAMA2_CHAT_TEMPLATE = r"""
{%- for message in messages -%}
  {%- if message['content'] is not string -%}
    {{- raise_exception('LLaMA 2 chat: the content of every message must be text') -}}
  {%- endif -%}
  {%- for tag in REFUSED_TAGS -%}
    {%- if tag in message['content'] -%}
      {{- raise_exception('LLaMA 2 chat: a message must not contain the special tag ' ~ tag) -}}
    {%- endif -%}
  {%- endfor -%}
{%- endfor -%}
{%- set system = '' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = '<<SYS>>\n' ~ messages[0]['content'] ~ '\n<</SYS>>\n\n' -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- if not turns -%}
  {{- raise_exception('LLaMA 2 chat: there is no message of the user') -}}
{%- endif -%}
{%- for message in turns -%}
  {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('LLaMA 2 chat: roles must be [system,] user, assistant, user, ...') -}}
  {%- elif message['role'] == 'user' -%}
    {{- bos_token ~ '[INST] ' ~ ((system if loop.first else '') ~ message['content']).strip() ~ ' [/INST]' -}}
  {%- else -%}
    {{- ' ' ~ message['content'].strip() ~ ' ' ~ eos_token -}}
  {%- endif -%}
{%- endfor -%}
""".lstrip("\n")


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """What every kind of tokenizer has: the index into `tokens` and `kinds` is the id."""

    tokens: Sequence[str]
    kinds: Sequence[int]
    unk_id: int | None
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str | None
    splits_special_tokens: bool
    """Text that spells a control token stays text; a chat template could not write control tokens then."""
    added: tuple[AddedToken, ...] | None = None
    """What is matched in texts; None: the control and user-defined tokens."""

    @property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How text becomes tokens and back: the parts of tokenizer.json that do not name control tokens."""

    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    decoder: dict[str, Any]
    model: dict[str, Any]


def convert_tokenizer(
    source: Path,
    target: Path,
    *,
    vocab_size: int,
    context_length: int,
    chat: bool = False,
    decide: Callable[[str], None] = lambda line: None,
) -> str:
    """Write into the existing folder `target` a tokenizer for stock AutoTokenizer; return one line for humans.

    `source` is a SentencePiece model, a GGUF file, a Hugging Face folder or its tokenizer.json. `vocab_size` is the
    number of rows of the model's embedding, `context_length` is in tokens. `chat` gives LLaMA 2's chat template to a
    tokenizer of LLaMA's kind that has none. `decide` is given a line on each choice between contradicting files, and
    on what is not used.

    Text that spells `<s>` stays text, as in SentencePiece (`split_special_tokens`), except where there is a chat
    template, which writes BOS and EOS as text (LLaMA 2's refuses messages that spell them), and in a Hugging Face
    folder that does not ask for it.

    Raise CheckpointError where the source is not a tokenizer, has more tokens than the embedding has rows, or cannot
    be brought over with equal ids.
    """
    if not source.exists():
        raise CheckpointError(f"{source}: no such file. {NO_TOKENIZER}")
    if source.is_dir() or source.suffix == ".json":
        from .hugging_face_tokenizer import convert_folder, is_bare

        if not is_bare(source):
            return convert_folder(
                source, target, vocab_size=vocab_size, context_length=context_length, chat=chat, decide=decide
            )
        source = source / "tokenizer.model"
    if source.suffix == ".gguf" or _first_bytes(source, 4) == b"GGUF":
        from .gguf_tokenizer import read_gguf_tokenizer

        kind, table, pipeline = read_gguf_tokenizer(source)
        if chat:
            table = with_llama2_chat(table, source, decide, byte_fallback=pipeline.model["byte_fallback"])
        spare_rows = describe_spare_rows(table.ids, vocab_size, source)
        write_tokenizer(target, table, build_tokenizer(table, pipeline, source), context_length=context_length)
        return summary(kind, table) + spare_rows

    table, scores, dummy_prefix = read_sentencepiece(source)
    spare_rows = describe_spare_rows(table.ids, vocab_size, source)
    if chat:
        table = with_llama2_chat(table, source, decide)
    tokenizer = build_tokenizer(table, score_pipeline(table, scores, dummy_prefix=dummy_prefix), source)
    texts = proof_texts(table, scores)
    tokenizer.encode_special_tokens = True  # the state of this object only: it is not saved
    check_ids(tokenizer, texts, _load_sentencepiece(source).encode(texts), source)
    tokenizer.encode_special_tokens = False
    write_tokenizer(target, table, tokenizer, context_length=context_length)
    shutil.copyfile(source, target / "tokenizer.model")
    return f"{summary('SentencePiece BPE', table)}; ids equal SentencePiece's on {len(texts):,} texts{spare_rows}"


def score_pipeline(table: TokenTable, scores: Sequence[float], *, dummy_prefix: bool) -> Pipeline:
    """SentencePiece's byte-pair encoding. `dummy_prefix`: a space is put before every text, and removed in decoding."""
    if not all(map(math.isfinite, scores)) or max(map(len, table.tokens)) > _MAX_PIECE:
        raise CheckpointError(
            f"the SentencePiece model has a score that is no number, or a piece of more than {_MAX_PIECE:,} "
            f"characters. Download it again. {NO_TOKENIZER}"
        )
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - set(_pieces(table, BYTE))
    if missing:
        raise CheckpointError(
            f"the SentencePiece model lacks {len(missing)} of the 256 byte pieces (trained without byte_fallback?), "
            f"which LLaMA's has. {NO_TOKENIZER}"
        )
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    unescape = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return Pipeline(
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, escape] if dummy_prefix else [escape],
        },
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if dummy_prefix else [])],
        },
        model={
            "type": "BPE",
            "dropout": None,
            "unk_token": None if table.unk_id is None else table.tokens[table.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": table.ids,
            "merges": [[left, right] for _, left, right in merges_by_score(table, scores)],
        },
    )


def merges_by_score(table: TokenTable, scores: Sequence[float]) -> list[tuple[float, str, str]]:
    """All pairs of pieces that make a third, as (score, left, right), the first to be merged first.

    A list of merges cannot say "equal, so the leftmost". For runs of one character (LLaMA's whitespace pieces, all of
    score -1e9) it comes to the same if the longer piece goes first: what is already merged on the left grows, before
    a new pair is begun on its right.
    """
    normal = _pieces(table, NORMAL)
    merges = [
        (scores[index], piece[:cut], piece[cut:])
        for piece, index in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return sorted(merges, key=lambda merge: (-merge[0], -len(merge[1] + merge[2]), -len(merge[1])))


def _pieces(table: TokenTable, kind: int) -> dict[str, int]:
    return {table.tokens[index]: index for index, found in enumerate(table.kinds) if found == kind}


def _load_sentencepiece(source: Path) -> "SentencePieceProcessor":
    from sentencepiece import SentencePieceProcessor

    if source.stat().st_size == 0:  # which sentencepiece takes for "no file given"
        raise CheckpointError(f"{source}: the file is empty. Download it again. {NO_TOKENIZER}")
    try:
        return SentencePieceProcessor(model_file=str(source))
    except (RuntimeError, OSError, UnicodeDecodeError) as error:  # the last where its own message quotes the damage
        raise CheckpointError(
            f"{source}: not a SentencePiece model; it looks like {_looks_like(source)}. {NO_TOKENIZER}"
        ) from error


def _first_bytes(source: Path, count: int) -> bytes:
    with source.open("rb") as file:
        return file.read(count)


def _looks_like(source: Path) -> str:
    head = _first_bytes(source, 4096)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: the file itself was not downloaded (`git lfs pull`)"
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", head):
        return "Llama 3's tiktoken file, which only its Hugging Face tokenizer.json can stand in for"
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "a web page (an error page saved under this name?); download it again"
    if head.lstrip().startswith(b"{"):
        return "JSON; a Hugging Face tokenizer must be named tokenizer.json"
    return "a damaged or foreign file; download it again"


def read_sentencepiece(source: Path) -> tuple[TokenTable, list[float], bool]:
    """Return the pieces, their scores, and whether a space is put before every text."""
    processor = _load_sentencepiece(source)
    try:
        table = _sentencepiece_table(processor)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source}: a piece is not UTF-8 ({error}). Download it again. {NO_TOKENIZER}") from error
    scores = [processor.get_score(index) for index in range(len(processor))]
    return table, scores, processor.normalize("a").startswith(SPACE)


def _sentencepiece_table(processor: "SentencePieceProcessor") -> TokenTable:
    def kind(index: int) -> int:
        if processor.is_unknown(index):
            return UNKNOWN
        if processor.is_control(index):
            return CONTROL
        if processor.is_byte(index):
            return BYTE
        # The API does not tell user-defined pieces from normal ones: `check_ids` finds them out.
        return UNUSED if processor.is_unused(index) else NORMAL

    def id_or_none(index: int) -> int | None:
        return index if index >= 0 else None

    bos_id = id_or_none(processor.bos_id())
    return TokenTable(
        tokens=[processor.id_to_piece(index) for index in range(len(processor))],
        kinds=[kind(index) for index in range(len(processor))],
        unk_id=id_or_none(processor.unk_id()),
        bos_id=bos_id,
        eos_id=id_or_none(processor.eos_id()),
        pad_id=id_or_none(processor.pad_id()),
        add_bos=bos_id is not None,
        add_eos=False,
        chat_template=None,
        splits_special_tokens=True,
    )


def with_llama2_chat(
    table: TokenTable, source: Path, decide: Callable[[str], None], *, byte_fallback: bool = True
) -> TokenTable:
    """Add LLaMA 2's chat template, unless there is one; only LLaMA's kind of tokenizer has `byte_fallback`."""
    if table.chat_template is not None:
        decide("chat template: the tokenizer's own, not LLaMA 2's")
        return table
    if not byte_fallback or table.bos_id is None or table.eos_id is None:
        raise CheckpointError(
            f"{source}: a chat model's tokenizer without a chat template, and LLaMA 2's template is for LLaMA's "
            "SentencePiece tokenizer with BOS and EOS, which this is not: name one that has a template by "
            "--tokenizer, or convert with --no-chat"
        )
    control = [table.tokens[index] for index in (table.bos_id, table.eos_id, table.unk_id) if index is not None]
    return replace(table, chat_template=llama2_template(control), splits_special_tokens=False)


def llama2_template(control: Sequence[str]) -> str:
    """Return LLaMA 2's chat template, which refuses the tags and the `control` tokens in messages."""
    refused = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", *control]
    return LLAMA2_CHAT_TEMPLATE.replace("REFUSED_TAGS", json.dumps(refused))


def describe_spare_rows(ids: Mapping[str, int], vocab_size: int, source: Path) -> str:
    """Return nothing, or a clause on an embedding that was padded or enlarged. Raise where tokens have no row."""
    count = max(ids.values(), default=-1) + 1
    if count > vocab_size:
        without = [token for token, index in ids.items() if index >= vocab_size]
        cause = (
            f"{', '.join(map(repr, without))} {'has' if len(without) == 1 else 'have'} no row (added without resizing "
            "the embedding?): remove from the tokenizer's files what the model was not trained with"
            if len(without) <= _SHOWN
            else "the tokenizer belongs to another model"
        )
        raise CheckpointError(
            f"{source}: {count:,} tokens, but the model's embedding has {vocab_size:,} rows: {cause}. {NO_TOKENIZER}"
        )
    spare = vocab_size - count
    return f"; the embedding has {spare:,} row{'s' if spare > 1 else ''} more, without tokens" if spare else ""


def build_tokenizer(table: TokenTable, pipeline: Pipeline, source: Path) -> "Tokenizer":
    """Return what tokenizer.json describes."""
    from tokenizers import Tokenizer

    added = table.added
    if added is None:
        added = tuple(
            AddedToken(id=index, content=table.tokens[index], special=kind != USER_DEFINED)
            for index, kind in enumerate(table.kinds)
            if kind in (CONTROL, USER_DEFINED) or (kind == UNKNOWN and index == table.unk_id)
        )
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        # Matched in the text as it is: the normalizer would put a space before a token's name, too.
        "added_tokens": [{**asdict(token), "single_word": False, "normalized": False} for token in added],
        "normalizer": pipeline.normalizer,
        "pre_tokenizer": pipeline.pre_tokenizer,
        "post_processor": build_post_processor(
            dict(enumerate(table.tokens)), (table.add_bos, table.bos_id), (table.add_eos, table.eos_id), source
        ),
        "decoder": pipeline.decoder,
        "model": pipeline.model,
    }
    return loaded(lambda: Tokenizer.from_str(json.dumps(description)), source)


def load_tokenizer(folder: Path, source: Path) -> Any:
    """transformers' tokenizer of a folder, which was made of `source`; code that a folder brings is not run."""
    from transformers import AutoTokenizer

    return loaded(lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False), source)


def loaded(load: Callable[[], Any], source: Path) -> Any:
    """What `load` brings. Raises `CheckpointError` where it cannot."""
    try:
        return load()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises Exception itself, and where it is surprised, not even that
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source}: not a tokenizer that can be loaded ({reason}). {NO_TOKENIZER}") from None


def build_post_processor(
    names: Mapping[int, str], bos: tuple[bool, int | None], eos: tuple[bool, int | None], source: Path
) -> dict[str, Any]:
    """One BOS in front of each text and EOS behind it, as far as (wanted, id) say so. `names`: id -> token."""
    front, end = ([index] if wanted else [] for wanted, index in (bos, eos))
    ids = [index for index in front + end if index is not None]
    if len(ids) < len(front + end):
        raise CheckpointError(f"{source}: wants BOS or EOS to be added, but names no id for it. {NO_TOKENIZER}")

    def part(letter: str, number: int) -> list[dict[str, Any]]:
        special = [{"SpecialToken": {"id": names[index], "type_id": number}} for index in ids]
        return [*special[: len(front)], {"Sequence": {"id": letter, "type_id": number}}, *special[len(front) :]]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": part("A", 0) + part("B", 1),
        "special_tokens": {
            names[index]: {"id": names[index], "ids": [index], "tokens": [names[index]]} for index in ids
        },
    }


def proof_texts(table: TokenTable, scores: Sequence[float]) -> list[str]:
    """Return the texts on which ids are compared: awkward ones, every piece, and where the order of merges shows."""
    pieces = (piece for kind in (NORMAL, UNUSED) for piece in _pieces(table, kind))
    contested = islice(_contested_texts(merges_by_score(table, scores)), 20_000)  # LLaMA has some 700
    return [*AWKWARD_TEXTS, *(text.replace(SPACE, " ") for text in (*pieces, *contested))]


def check_ids(tokenizer: "Tokenizer", texts: list[str], expected: list[list[int]], source: Path) -> None:
    """Raise CheckpointError at the first text on which the ids are not the `expected` ones, BOS and EOS apart."""
    found = (encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    for text, ids, right in zip(texts, found, expected, strict=True):
        if ids != right:
            raise CheckpointError(
                f"{source}: this SentencePiece model cannot be brought over exactly: {text[:80]!r} should give "
                f"{right[:20]}, not {ids[:20]}. LLaMA's is of the type BPE, with byte fallback, and normalises "
                f"nothing; this one looks like {_deviation(_load_sentencepiece(source))}. {NO_TOKENIZER}"
            )


def _contested_texts(merges: Sequence[tuple[float, str, str]]) -> Iterator[str]:
    """Texts in which two merges of equal score want the same middle piece: there the order among equals shows."""
    rights_of: dict[tuple[float, str], list[str]] = defaultdict(list)
    for score, left, right in merges:
        rights_of[score, left].append(right)
    return (left + right + third for score, left, right in merges for third in rights_of.get((score, right), ()))


def _deviation(processor: "SentencePieceProcessor") -> str:
    if any(processor.normalize(character).strip(SPACE) != character for character in "ﬁ①Å"):
        return "one that normalises Unicode (nmt_nfkc or the like)"
    if processor.normalize("a  b").strip(SPACE) != f"a{SPACE}{SPACE}b":
        return "one that removes extra spaces"
    scores = (processor.get_score(index) for index in range(len(processor)))
    if any(score != int(score) for score in scores):  # BPE numbers its merges, unigram has log probabilities
        return "one of the type unigram"
    return "one with user-defined pieces or pieces of equal score"


def write_tokenizer(
    target: Path,
    table: TokenTable,
    tokenizer: "Tokenizer",
    *,
    context_length: int,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write tokenizer.json, its configuration for AutoTokenizer with the `settings`, and the chat template."""
    tokenizer.save(str(target / "tokenizer.json"))
    named = {"bos": table.bos_id, "eos": table.eos_id, "unk": table.unk_id, "pad": table.pad_id}
    config = {
        "add_bos_token": table.add_bos,
        "add_eos_token": table.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "split_special_tokens": table.splits_special_tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",  # transformers 4 has no TokenizersBackend
        **{f"{name}_token": table.tokens[index] for name, index in named.items() if index is not None},
        **settings,
    }
    write_json(target / "tokenizer_config.json", config)
    if table.chat_template is not None:
        (target / "chat_template.jinja").write_text(table.chat_template, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def summary(kind: str, table: TokenTable) -> str:
    """Return the line for humans."""
    bos = f"BOS {table.tokens[table.bos_id]}" if table.add_bos and table.bos_id is not None else "no BOS"
    template = "no chat template" if table.chat_template is None else "chat template"
    return f"{kind}, {len(table.tokens):,} tokens, {bos}, {'' if table.add_eos else 'no '}EOS, {template}"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise CheckpointError where the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(f"{path}: not readable as JSON ({error}). Download it again. {NO_TOKENIZER}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: should hold a JSON object, not a {type(content).__name__}. {NO_TOKENIZER}")
    return content

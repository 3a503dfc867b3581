"""Tokenizers of Hugging Face folders: with tokenizer.json, with tokenizer.model and the files beside it, or with both.

Whatever the class is that the folder names, what is written opens with AutoTokenizer to the ids of its tokenizer.json,
and these are SentencePiece's where there is a SentencePiece model.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llama_repro.errors import CheckpointError

from .slow_tokenizer import SPACE, AddedToken, SlowTokenizer, texts_with
from .tokenizer import (
    BYTE,
    CONTROL,
    NO_TOKENIZER,
    NORMAL,
    USER_DEFINED,
    Pipeline,
    TokenTable,
    build_tokenizer,
    check_ids,
    describe_spare_rows,
    load_tokenizer,
    loaded,
    proof_texts,
    read_json,
    read_sentencepiece,
    score_pipeline,
    summary,
    with_llama2_chat,
    write_json,
    write_tokenizer,
)
from .tokenizer_settings import (
    ADDED_FILE,
    CONFIG_FILE,
    TokenizerSettings,
    named_tokens,
    read_settings,
    settings_files,
    write_templates,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

JSON_FILE, MODEL_FILE = "tokenizer.json", "tokenizer.model"
FAITHFUL_CLASS = "PreTrainedTokenizerFast"
"""Opens tokenizer.json as it is, in transformers 4 as well."""
_NO_LIMIT = 10**9
"""tokens; transformers writes 1e30 where a model has no length."""


def is_bare(source: Path) -> bool:
    """Whether a folder holds nothing of a tokenizer but tokenizer.model. Raise where it holds no tokenizer."""
    if not source.is_dir() or (source / JSON_FILE).is_file():
        return False
    if not (source / MODEL_FILE).is_file():
        raise CheckpointError(f"{source}: holds neither tokenizer.json nor tokenizer.model. {NO_TOKENIZER}")
    return not settings_files(source)


def convert_folder(
    source: Path, target: Path, *, vocab_size: int, context_length: int, chat: bool, decide: Callable[[str], None]
) -> str:
    """Write the tokenizer of a folder, or of its tokenizer.json; see `convert_tokenizer`."""
    folder, file = (source, source / JSON_FILE) if source.is_dir() else (source.parent, source)
    settings = read_settings(folder, decide)
    if file.is_file():
        from .tokenizer_json import JsonConversion

        return JsonConversion(file, target, settings, vocab_size, decide, is_named=file == source).convert(chat=chat)
    return _convert_model(settings, target, vocab_size, context_length, chat, decide)


def count_tokens(folder: Path) -> int:
    """Return how many rows the tokenizer of a folder needs."""
    if (folder / JSON_FILE).is_file():
        tokenizer = raw_tokenizer(read_json(folder / JSON_FILE), folder / JSON_FILE)
        return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    pieces, _, _ = read_sentencepiece(folder / MODEL_FILE)
    ignored: list[str] = []  # decided, and reported, when it is converted
    return len(_with_settings(pieces, read_settings(folder, ignored.append), ignored.append).tokens)


def _convert_model(
    settings: TokenizerSettings,
    target: Path,
    vocab_size: int,
    context_length: int,
    chat: bool,
    decide: Callable[[str], None],
) -> str:
    model = settings.folder / MODEL_FILE
    pieces, scores, dummy_prefix = read_sentencepiece(model)
    table = _with_settings(pieces, settings, decide)
    spare_rows = describe_spare_rows(table.ids, vocab_size, model)
    if chat:
        table = with_llama2_chat(table, model, decide)
    spaces = Spaces.of(settings, decide, table.added or ())
    tokenizer = build_tokenizer(table, spaces.pipeline(table, scores, dummy_prefix=dummy_prefix), model)
    texts, expected = expected_ids(model, table, scores, spaces)
    tokenizer.encode_special_tokens = table.splits_special_tokens
    check_ids(tokenizer, texts, expected, model)
    limit = settings.options.get("model_max_length")
    named = {f"{name}_token": token["content"] for name, token in settings.special.items() if token}
    write_tokenizer(
        target,
        table,
        tokenizer,
        context_length=context_length,
        settings=named
        | (
            {"additional_special_tokens": [token["content"] for token in settings.more_special]}
            if settings.more_special
            else {}
        )
        | settings.kept()
        | ({} if isinstance(limit, int) and limit < _NO_LIMIT else {"model_max_length": context_length}),
    )
    write_templates({name: text for name, text in settings.templates.items() if name != "default"}, target)
    shutil.copyfile(model, target / MODEL_FILE)
    check_opened(target, texts, model)
    if unused := settings.unused():
        decide(f"{CONFIG_FILE}: {', '.join(unused)} {'is' if len(unused) == 1 else 'are'} not used")
    added = [token for token in table.added or () if token.id >= len(pieces.tokens)]
    return (
        f"{summary('SentencePiece BPE', table)}"
        + (f", {len(added)} added token{'s' if len(added) > 1 else ''}" if added else "")
        + class_clause(settings.options.get("tokenizer_class"), FAITHFUL_CLASS)
        + f"; ids equal SentencePiece's on {len(texts):,} texts{spare_rows}"
    )


def class_clause(before: Any, now: str) -> str:
    return "" if before in (None, now) else f", class {before} replaced by {now}"


def _with_settings(pieces: TokenTable, settings: TokenizerSettings, decide: Callable[[str], None]) -> TokenTable:
    own = {"bos": pieces.bos_id, "eos": pieces.eos_id, "unk": pieces.unk_id}
    added, ids = named_tokens(settings, pieces.ids, decide, own)
    table = with_added(pieces, added, settings.folder)
    return replace(
        table,
        unk_id=ids["unk"],
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["pad"],
        add_bos=settings.option("add_bos_token", ids["bos"] is not None),
        add_eos=settings.option("add_eos_token", False),
        chat_template=settings.chat_template,
        splits_special_tokens=settings.option("split_special_tokens", False),
    )


def with_added(pieces: TokenTable, added: list[AddedToken], folder: Path) -> TokenTable:
    """Append the tokens that SentencePiece does not have. A piece that no text contains may bear another name."""
    tokens, kinds = list(pieces.tokens), list(pieces.kinds)
    for token in added:
        if token.id > len(tokens):
            raise CheckpointError(
                f"{folder}: the added token {token.content!r} has the id {token.id}, and no token has the ids from "
                f"{len(tokens)} on: name those in {ADDED_FILE}, too. {NO_TOKENIZER}"
            )
        if token.id == len(tokens):
            tokens.append(token.content)
            kinds.append(CONTROL if token.special else USER_DEFINED)
        elif tokens[token.id] != token.content:
            if kinds[token.id] in (NORMAL, BYTE):
                raise CheckpointError(
                    f"{folder}: the added token {token.content!r} has the id {token.id}, which is the piece "
                    f"{tokens[token.id]!r} of tokenizer.model: one of the two files is not the model's. {NO_TOKENIZER}"
                )
            tokens[token.id] = token.content
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise CheckpointError(f"{folder}: the token {twice!r} has two ids: remove one of them. {NO_TOKENIZER}")
    return replace(pieces, tokens=tokens, kinds=kinds, added=tuple(added))


@dataclass(frozen=True)
class Spaces:
    """Where LlamaTokenizer puts a space before text: `legacy`, after every added token; else at the start alone."""

    legacy: bool
    prefix: bool = True

    @classmethod
    def of(
        cls, settings: TokenizerSettings, decide: Callable[[str], None], added: tuple[AddedToken, ...] = ()
    ) -> "Spaces":
        spaces = cls(settings.option("legacy", True), settings.option("add_prefix_space", True))
        if spaces.legacy and not spaces.prefix:
            raise CheckpointError(
                f"{settings.folder / CONFIG_FILE}: add_prefix_space is false and legacy is not: transformers' slow "
                "and fast classes disagree on what that means; set legacy to false, or remove add_prefix_space"
            )
        if not spaces.legacy and not spaces.prefix:
            decide(
                "a space before a special token at the start of a text is kept (the slow class of transformers 4 drops "
                "it)"
            )
        elif not spaces.legacy and any(not token.special for token in added):
            decide(
                "no space is put before an added token at the start of a text, as by LlamaTokenizerFast (the slow "
                "class of transformers 4 puts one before a token that is not special)"
            )
        return spaces

    def pipeline(self, table: TokenTable, scores: list[float], *, dummy_prefix: bool) -> Pipeline:
        if self.legacy or not self.prefix:
            return score_pipeline(table, scores, dummy_prefix=dummy_prefix and self.legacy)
        pipeline = score_pipeline(table, scores, dummy_prefix=True)
        _prepend, escape = pipeline.normalizer["normalizers"] if pipeline.normalizer else (None, None)
        # The first puts a space before the text even where it begins with one, which is "▁" by then.
        steps = [(" ", "first"), (SPACE, "never")]
        return replace(
            pipeline,
            normalizer=escape,
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme, "split": False}
                    for replacement, scheme in steps
                ],
            },
        )


def expected_ids(
    model: Path, table: TokenTable, scores: list[float], spaces: Spaces
) -> tuple[list[str], list[list[int]]]:
    """Return texts with and without added tokens, and their ids by the reference."""
    added = table.added or ()
    reference = SlowTokenizer(
        model, () if table.splits_special_tokens else added, legacy=spaces.legacy, prefix=spaces.prefix
    )
    texts = [*proof_texts(table, scores), *texts_with(added)]
    return texts, reference.encode(texts)


def check_opened(target: Path, texts: list[str], source: Path) -> Any:
    """Return AutoTokenizer's tokenizer of the folder. Raise where its ids are not those of the tokenizer.json there."""
    found = opened(target, source)
    if (differing := first_differing(found, target, texts)) is not None:
        raise CheckpointError(
            f"{source}: opened with AutoTokenizer ({type(found).__name__}), {differing[:80]!r} has other ids than in "
            f"its tokenizer.json: a setting of {CONFIG_FILE} contradicts that file. {NO_TOKENIZER}"
        )
    return found


def opened(target: Path, source: Path) -> Any:
    """As beside a Llama's config.json, which has a say in the class."""
    config = target / "config.json"
    write_json(config, {"model_type": "llama"})
    try:
        return load_tokenizer(target, source)
    finally:
        config.unlink()


def first_differing(found: Any, target: Path, texts: list[str]) -> str | None:
    """Return the first text whose ids, with special tokens, are not those of tokenizer.json."""
    raw = raw_tokenizer(json.loads((target / JSON_FILE).read_text(encoding="utf-8")), target)
    raw.encode_special_tokens = found.split_special_tokens
    expected = (encoding.ids for encoding in raw.encode_batch(texts))
    try:
        ids = found(texts)["input_ids"]
    except Exception:  # whatever the class raises
        return texts[0]
    return next((text for text, one, other in zip(texts, ids, expected, strict=True) if one != other), None)


def raw_tokenizer(content: Mapping[str, Any], source: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    tokenizer = loaded(lambda: Tokenizer.from_str(json.dumps(content)), source)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

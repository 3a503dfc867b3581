"""The tokenizer that a GGUF file carries in its metadata, read with the `gguf` package and brought over as it is.

Names of the metadata: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer
Defaults that a file may leave out: llama.cpp, src/llama-vocab.cpp, `llama_vocab::impl::load`.
"""

from pathlib import Path
from typing import Any

from hf_llama_repro.errors import CheckpointError

from .gguf_header import check_header
from .tokenizer import CONTROL, NO_TOKENIZER, USER_DEFINED, Pipeline, TokenTable, score_pipeline

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# `tokenizer.ggml.pre` -> pre-tokenizer. The name stands for a regular expression that is not in the file itself.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    },
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _LLAMA3_REGEX}, "behavior": "Isolated", "invert": False},
            {**_BYTE_LEVEL, "use_regex": False},
        ],
    },
}
# Takes a word that is in the vocabulary whole, without asking the merges, and begins with BOS unless told not to.
_LIKE_LLAMA3 = "llama-bpe"


def read_gguf_tokenizer(source: Path) -> tuple[str, TokenTable, Pipeline]:
    """Kind of tokenizer for humans, its tokens, and its text processing.

    Raises CheckpointError where the file is damaged, has no tokenizer, or one of a kind that is not known here.
    """
    metadata = read_gguf_metadata(source)
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("llama", "gpt2"):
        found = "no tokenizer" if model is None else f"a tokenizer of the kind {model!r}"
        raise CheckpointError(f"{source}: holds {found}; known are 'llama' (SentencePiece) and 'gpt2'. {NO_TOKENIZER}")
    table = _token_table(metadata, source)
    if model == "llama":
        scores = _required(metadata, "tokenizer.ggml.scores", source)
        if len(scores) != len(table.tokens) or not all(isinstance(score, int | float) for score in scores):
            raise CheckpointError(f"{source}: {len(table.tokens)} tokens, but {len(scores)} scores. {NO_TOKENIZER}")
        dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
        return "SentencePiece BPE from GGUF", table, score_pipeline(table, scores, dummy_prefix=dummy_prefix)
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{source}: its pre-tokenizer is {pre!r} (tokenizer.ggml.pre); known are {', '.join(PRE_TOKENIZERS)}, "
            f"and with another one the ids would be wrong. {NO_TOKENIZER}"
        )
    return f"byte-level BPE ({pre}) from GGUF", table, _byte_level_pipeline(table, metadata, pre, source)


def read_gguf_metadata(source: Path) -> dict[str, Any]:
    """What the file says of its tokenizer. Raises `CheckpointError` where it cannot be read."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(f"{source}: reading GGUF needs `pip install hf-llama-repro[gguf]`") from error
    check_header(source)
    try:
        fields = GGUFReader(source).fields
        return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    except Exception as error:  # the reader raises whatever the damage leads to
        raise CheckpointError(f"{source}: not a readable GGUF file ({error}); download it again") from error


def _required(metadata: dict[str, Any], key: str, source: Path) -> list[Any]:
    value = metadata.get(key)
    if not value or not isinstance(value, list):
        raise CheckpointError(f"{source}: the metadata has no {key}, which is a list. {NO_TOKENIZER}")
    return value


def _token_table(metadata: dict[str, Any], source: Path) -> TokenTable:
    tokens = _required(metadata, "tokenizer.ggml.tokens", source)
    kinds = _required(metadata, "tokenizer.ggml.token_type", source)
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError(
            f"{source}: {len(tokens)} tokens, {len(set(tokens))} of them distinct, and {len(kinds)} token types; "
            f"the three numbers must be equal. {NO_TOKENIZER}"
        )
    if not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{source}: tokenizer.ggml.tokens are no texts. {NO_TOKENIZER}")
    is_scored = metadata["tokenizer.ggml.model"] == "llama"
    begins_with_bos = is_scored or metadata.get("tokenizer.ggml.pre") == _LIKE_LLAMA3
    # A SentencePiece model that names none has LLaMA's ids.
    default_ids = {"unknown": 0, "bos": 1, "eos": 2} if is_scored else {}
    ids = {
        name: metadata.get(f"tokenizer.ggml.{name}_token_id", default_ids.get(name))
        for name in ("unknown", "bos", "eos", "padding")
    }
    for name, index in ids.items():
        if index is not None and not (isinstance(index, int) and 0 <= index < len(tokens)):
            raise CheckpointError(f"{source}: {name}_token_id is {index}, but there are {len(tokens)} tokens")
    chat_template = metadata.get("tokenizer.chat_template")
    if not isinstance(chat_template, str | None):
        raise CheckpointError(f"{source}: tokenizer.chat_template is no text. {NO_TOKENIZER}")
    return TokenTable(
        tokens=tokens,
        kinds=kinds,
        unk_id=ids["unknown"],
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["padding"],
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", begins_with_bos),
        add_eos=metadata.get("tokenizer.ggml.add_eos_token", False),
        chat_template=chat_template,
        splits_special_tokens=is_scored and chat_template is None,
    )


def _byte_level_pipeline(table: TokenTable, metadata: dict[str, Any], pre: str, source: Path) -> Pipeline:
    merges = [str(merge).split(" ") for merge in _required(metadata, "tokenizer.ggml.merges", source)]
    added = {token for token, kind in zip(table.tokens, table.kinds, strict=True) if kind in (CONTROL, USER_DEFINED)}
    vocabulary = {token: index for index, token in enumerate(table.tokens)}
    mergeable = vocabulary.keys() - added
    for merge in merges:
        if len(merge) != 2 or not mergeable.issuperset((*merge, "".join(merge))):
            raise CheckpointError(f"{source}: the merge {' '.join(merge)!r} is not of two known tokens to a third")
    return Pipeline(
        normalizer=None,
        pre_tokenizer=PRE_TOKENIZERS[pre],
        decoder=_BYTE_LEVEL,
        model={
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == _LIKE_LLAMA3,
            "vocab": vocabulary,
            "merges": merges,
        },
    )

"""The token ids that an adapter was trained with: a fingerprint beside it, compared with the base's tokenizer."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import CheckpointError

FILE_NAME = "token_ids.json"
# Spaces, line ends, digits, accents, other scripts, bytes, names of control tokens: where tokenizers of one vocabulary
# part. A text that is changed or added makes every fingerprint that lies with an adapter look different.
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  leading,   several and trailing spaces  ",
    "def f(x):\n\treturn [x,\n\n            1_000]\r\n",
    "1234567890 3.14159 ½ ² ٣",
    "Zoë, naïve; déjà vu. Привет, мир! 你好，世界。 مرحبا 👩‍👩‍👧‍👦",
    "### Instruction:\nName three colours.\n\n### Response:\n",
    "<s>[INST] <<SYS>>\nx\n<</SYS>>\n\n [/INST] </s><unk> <0x0A>",
)
_IDS = {"bos_token_id": "BOS", "eos_token_id": "EOS"}


def fingerprint(tokenizer: Any, num_tokens: int | None = None) -> dict[str, Any]:
    """What identifies the ids that a fast tokenizer of transformers gives.

    `num_tokens`: only the tokens with the lowest ids, as many, count for the vocabulary.
    """
    table = sorted((index, token) for token, index in tokenizer.get_vocab().items())[:num_tokens]
    # Control tokens that a text spells are text, as in training.
    ids = tokenizer(list(TEXTS), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return {
        "num_tokens": len(table),
        "vocabulary": _sha256(table),
        "texts": _sha256(ids),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def save_token_ids(tokenizer: Any, folder: Path) -> None:
    """Writes the fingerprint that `differences` and `choose_tokenizer` read."""
    (folder / FILE_NAME).write_text(json.dumps(fingerprint(tokenizer), indent=2) + "\n", encoding="utf-8")


def read_token_ids(folder: Path) -> dict[str, Any] | None:
    """The fingerprint beside an adapter; None for one that another program trained."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(saved["num_tokens"], int) and saved.keys() >= {"vocabulary", "texts", *_IDS}:
            return saved
        reason = "keys are missing"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise CheckpointError(f"{path} holds no fingerprint of token ids ({reason}): copy the adapter again, or remove it")


def differences(saved: dict[str, Any], tokenizer: Any) -> list[str]:
    """In what a tokenizer departs from a fingerprint, in words; tokens that it has besides are no difference."""
    found = fingerprint(tokenizer, saved["num_tokens"])
    if found["num_tokens"] < saved["num_tokens"]:
        return [f"{found['num_tokens']} tokens in place of {saved['num_tokens']}"]
    told = {"vocabulary": "other tokens under the same ids", "texts": "other ids for the same texts"}
    return [described for name, described in told.items() if found[name] != saved[name]] + [
        f"{described} {found[name]} in place of {saved[name]}"
        for name, described in _IDS.items()
        if found[name] != saved[name]
    ]


def check_token_ids(folder: Path, tokenizer: Any, where: Path) -> None:
    """Raises `CheckpointError` where `folder` was trained with other ids than the tokenizer of `where` gives."""
    saved = read_token_ids(folder)
    if saved is not None and (told := differences(saved, tokenizer)):
        raise _trained_otherwise(folder, where, told)


def _trained_otherwise(adapter: Path, where: Path, told: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{adapter} was trained with other token ids than {where} has ({'; '.join(told)}): name the base that it was "
        "trained on, with the tokenizer that it had"
    )


def choose_tokenizer(
    adapter: Path, base: Path, tokenizer: Any, *, load: Callable[[Path], Any], rows: Callable[[], int]
) -> tuple[Any, str]:
    """The tokenizer that an adapter is asked with, and a note if that needs one.

    `tokenizer` is that of `base`, `load` opens the one beside the adapter, `rows` counts those of the embedding with
    the adapter on it. Raises `CheckpointError` where the adapter was trained with other ids than the base has.
    """
    saved = read_token_ids(adapter)
    told = [] if saved is None else differences(saved, tokenizer)
    own = load(adapter) if (told or saved is None) and (adapter / "tokenizer.json").is_file() else None
    if own is None:
        if told:
            raise _trained_otherwise(adapter, base, told)
        return tokenizer, ""
    if saved is None:
        told = differences(fingerprint(own), tokenizer)
        if not told:
            return tokenizer, ""
        if len(own) > rows():
            return tokenizer, f"tokenizer of the base: the adapter's has {len(own)} tokens, the model {rows()}"
    elif differences(saved, own) or differences(fingerprint(tokenizer), own) or len(own) > rows():
        raise _trained_otherwise(adapter, base, told)
    return own, f"tokenizer of the adapter, which the base's departs from: {'; '.join(told)}"

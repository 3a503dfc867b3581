"""Paths that a command is given: what looks like a name on the Hugging Face Hub is recognised and explained."""

import argparse
import re
from pathlib import Path

from .errors import InputError

# A name as the Hub allows it, or the address of its page, of which Path leaves one slash after "https:".
_HUB_NAME = re.compile(
    r"(?:https?:/+(?:huggingface\.co|hf\.co)/+)?(?P<kind>datasets/)?"
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?:tree|blob|resolve)/.*)?/?"
)
# What the folder of a run holds, which may be mistyped as well.
_IN_A_RUN = re.compile(r"adapter|model|tokenizer|checkpoint-\d+")
_FILES = (".bin", ".gguf", ".json", ".jsonl", ".model", ".pt", ".pth", ".safetensors", ".txt", ".yaml", ".yml")


def hub_hint(path: str | Path, *, dataset: bool = False) -> str:
    """What to do about `path` if it can only be a name on the Hub; "" for what exists or looks like a local path."""
    text = str(path)
    found = _HUB_NAME.fullmatch(text)
    if found is None or found["name"].endswith(_FILES) or _IN_A_RUN.fullmatch(found["name"].rpartition("/")[2]):
        return ""
    is_address = text.startswith("http")
    if not is_address and (Path(text).exists() or Path(text).parent.exists()):
        return ""
    name = found["name"]
    flag = " --repo-type dataset" if dataset or found["kind"] else ""
    target = name.rpartition("/")[2]
    what = "a file of that folder" if flag else "that folder"
    return (
        f"{text} does not exist here; names on the Hugging Face Hub are not supported yet: download it first with "
        f"`hf download {name}{flag} --local-dir {target}`, and give {what}"
    )


def refuse_hub_name(path: str | Path, *, key: str, dataset: bool = False) -> None:
    """Raises `InputError` naming `key` where `path` can only be a name on the Hub."""
    if hint := hub_hint(path, dataset=dataset):
        raise InputError(f"{key}: {hint}")


def input_path(text: str) -> Path:
    """The type of a flag for a file or folder that is read."""
    if hint := hub_hint(text):
        raise argparse.ArgumentTypeError(hint)
    return Path(text)

"""What a Hugging Face folder says about its tokenizer outside tokenizer.json and tokenizer.model.

Read as transformers 4 reads it for a slow LlamaTokenizer, with which folders without tokenizer.json were made:
https://github.com/huggingface/transformers/blob/v4.57.1/src/transformers/tokenization_utils_base.py, `_from_pretrained`
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_llama_repro.errors import CheckpointError

from .slow_tokenizer import AddedToken
from .tokenizer import read_json

CONFIG_FILE, SPECIAL_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE_FILE, OLD_TEMPLATE_FILE, TEMPLATE_FOLDER = (
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# LlamaTokenizer's own, for a token that no file names.
_DEFAULT_TOKENS = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_FLAGS = ("lstrip", "rstrip", "single_word")

_READ = {*(f"{name}_token" for name in NAMES), *_LISTS, "added_tokens_decoder", "chat_template"} | {
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "legacy",
    "split_special_tokens",
    "tokenizer_class",
}
# Settings of the class that is written, taken over as they are.
_KEPT = (
    "clean_up_tokenization_spaces",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "truncation_side",
)
# Where the files came from, and who wrote them.
_WITHOUT_MEANING = {
    "_commit_hash",
    "backend",
    "from_slow",
    "is_local",
    "local_files_only",
    "name_or_path",
    "processor_class",
    "special_tokens_map_file",
    "tokenizer_file",
    "transformers_version",
    "use_fast",
    "vocab_file",
}


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The files' content; a token without an id gets one from `named_tokens`."""

    folder: Path
    added: tuple[AddedToken, ...]
    """By their ids."""
    special: Mapping[str, dict[str, Any] | None]
    """"bos", "eos", … -> fields of the token; None where the files say that there is none, no entry where they are
    silent."""
    more_special: tuple[dict[str, Any], ...]
    options: Mapping[str, Any]
    """tokenizer_config.json."""
    templates: Mapping[str, str]
    """Name -> chat template; "default" is the one that is used without a name."""

    @property
    def chat_template(self) -> str | None:
        return self.templates.get("default")

    def option(self, name: str, default: bool) -> bool:
        """Return a yes or no of tokenizer_config.json; null is no answer."""
        value = self.options.get(name)
        if not isinstance(value, bool | None):
            raise CheckpointError(
                f"{self.folder / CONFIG_FILE}: {name} is {value!r}, neither true nor false: correct it"
            )
        return default if value is None else value

    def kept(self) -> dict[str, Any]:
        """Return the settings that are taken over as they are."""
        return {name: self.options[name] for name in _KEPT if self.options.get(name) is not None}

    def unused(self) -> list[str]:
        """Return the keys of tokenizer_config.json that say something and are not read."""
        known = {*_READ, *_KEPT, *_WITHOUT_MEANING}
        return sorted(
            name for name, value in self.options.items() if name not in known and value not in (None, False, "", [], {})
        )


def settings_files(folder: Path) -> list[str]:
    """Return the names of the files that say more on a tokenizer than its vocabulary."""
    names = (CONFIG_FILE, SPECIAL_FILE, ADDED_FILE, TEMPLATE_FILE, OLD_TEMPLATE_FILE, TEMPLATE_FOLDER)
    return [name for name in names if (folder / name).exists()]


def read_settings(folder: Path, decide: Callable[[str], None]) -> TokenizerSettings:
    """Read the files that are there. `decide` is given a line where two of them contradict each other.

    Raise CheckpointError where one cannot be read, or two tokens claim the same id.
    """
    options, special_map, listed = (_read_optional(folder / name) for name in (CONFIG_FILE, SPECIAL_FILE, ADDED_FILE))
    decoder = options.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE}: added_tokens_decoder is no object: correct it")
    special: dict[str, dict[str, Any] | None] = {}
    for name in NAMES:
        special |= _special_token(f"{name}_token", name, options, special_map, folder, decide, prefer_map=not decoder)
    more = [
        token
        for source, file in ((options, CONFIG_FILE), (special_map, SPECIAL_FILE))
        for key in _LISTS
        for token in _token_list(source.get(key), f"{folder / file}: {key}")
    ]
    more = list({token["content"]: token for token in more}.values())
    specials = {token["content"] for token in [*special.values(), *more] if token}
    added = [_added(index, token, folder / CONFIG_FILE, specials) for index, token in decoder.items()]
    in_decoder = {(token.id, token.content) for token in added}
    added += [
        _added(index, {"content": content}, folder / ADDED_FILE, specials)
        for content, index in listed.items()
        if (index, content) not in in_decoder
    ]
    _check_ids(added, folder)
    return TokenizerSettings(
        folder=folder,
        added=tuple(sorted(added, key=lambda token: token.id)),
        special=special,
        more_special=tuple(more),
        options=options,
        templates=_templates(folder, options, decide),
    )


def named_tokens(
    settings: TokenizerSettings,
    pieces: Mapping[str, int],
    decide: Callable[[str], None],
    own: Mapping[str, int | None] | None = None,
) -> tuple[list[AddedToken], dict[str, int | None]]:
    """Return all added tokens, and the ids of "bos", "eos" and the others that have one.

    `pieces`: token -> id of the vocabulary. `own`: the ids that a SentencePiece model names, for what the settings do
    not; without it such tokens do not exist.
    """
    by_content = {token.content: token for token in settings.added}
    free = max([*pieces.values(), *(token.id for token in settings.added)]) + 1
    ids: dict[str, int | None] = {}

    def give_id(fields: Mapping[str, Any], where: str) -> int:
        nonlocal free
        content = fields["content"]
        if content not in by_content:
            index = pieces.get(content)
            if index is None:
                index, free = free, free + 1
                decide(f"{where} {content!r} has no id in the files: {index}, the next that is free")
            by_content[content] = _added(index, fields, settings.folder / CONFIG_FILE, {content})
        return by_content[content].id

    for name in NAMES:
        fields = settings.special.get(name)
        if own is not None and name not in settings.special and name in _DEFAULT_TOKENS:
            content = _DEFAULT_TOKENS[name]
            # A model that names its control pieces otherwise has them under its own names.
            index = pieces.get(content, own.get(name))
            content = next((piece for piece, found in pieces.items() if found == index), "")
            fields = {"content": content} if content else None
        ids[name] = give_id(fields, f"{name}_token") if fields else None
    for fields in settings.more_special:
        give_id(fields, "special token")
    return sorted(by_content.values(), key=lambda token: token.id), ids


def _special_token(
    key: str,
    name: str,
    options: Mapping[str, Any],
    special_map: Mapping[str, Any],
    folder: Path,
    decide: Callable[[str], None],
    *,
    prefer_map: bool,
) -> dict[str, dict[str, Any] | None]:
    """Return the one entry of a special token, or none. Newer folders keep them in tokenizer_config.json alone."""
    found: dict[str, dict[str, Any] | None] = {}
    for file, source in ((CONFIG_FILE, options), (SPECIAL_FILE, special_map)):
        if key in source:
            token = _fields(source[key], f"{folder / file}: {key}")
            if token is not None and not token["content"]:
                # As the first public conversions of LLaMA have it.
                decide(f"{key} is empty in {file}, and taken as not given")
                continue
            found[file] = token
    if not found:
        return {}
    chosen = SPECIAL_FILE if SPECIAL_FILE in found and (prefer_map or CONFIG_FILE not in found) else CONFIG_FILE
    contents = {file: token["content"] if token else None for file, token in found.items()}
    if len(set(contents.values())) > 1:
        decide(f"{key} {contents[chosen]!r}, as {chosen} says and transformers reads; " + _others(contents, chosen))
    return {name: found[chosen]}


def _others(contents: Mapping[str, str | None], chosen: str) -> str:
    return ", ".join(f"{file} has {content!r}" for file, content in contents.items() if file != chosen)


def _fields(value: Any, where: str) -> dict[str, Any] | None:
    """Return a token's fields, out of a string or an object."""
    if value is None:
        return None
    token = {"content": value} if isinstance(value, str) else value
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise CheckpointError(f"{where} is {value!r}, which is no token: a text, or an object with content")
    return token


def _token_list(value: Any, where: str) -> list[dict[str, Any]]:
    listed: Iterable[Any] = value.values() if isinstance(value, dict) else value or []
    if not isinstance(value, list | dict | None):
        raise CheckpointError(f"{where} is {value!r}, which is no list of tokens: correct it")
    return [token for item in listed if (token := _fields(item, where)) and token["content"]]


def _added(index: Any, value: Any, file: Path, specials: set[str]) -> AddedToken:
    token = _fields(value, f"{file}: the token of id {index}")
    if token is None or not token["content"] or not str(index).isdecimal():
        raise CheckpointError(f"{file}: {value!r} with the id {index!r} is no token: correct it")
    flags = {flag: token.get(flag, False) for flag in _FLAGS}
    if not all(isinstance(flag, bool) for flag in flags.values()) or flags.pop("single_word"):
        raise CheckpointError(
            f"{file}: the token {token['content']!r} has a flag that cannot be kept (single_word): transformers' "
            "classes disagree on what it matches; save the folder with its tokenizer.json"
        )
    special = bool(token.get("special")) or token["content"] in specials
    return AddedToken(id=int(index), content=token["content"], special=special, **flags)


def _check_ids(added: Iterable[AddedToken], folder: Path) -> None:
    by_id: dict[int, str] = {}
    by_content: dict[str, int] = {}
    for token in added:
        if (
            by_id.setdefault(token.id, token.content) != token.content
            or by_content.setdefault(token.content, token.id) != token.id
        ):
            raise CheckpointError(
                f"{folder}: {CONFIG_FILE} and {ADDED_FILE} contradict each other on the token {token.content!r} and "
                f"the id {token.id}: remove the file that is not the model's"
            )


def _templates(folder: Path, options: Mapping[str, Any], decide: Callable[[str], None]) -> dict[str, str]:
    """Return the chat templates by name; of two defaults the file of its own counts, as in transformers."""
    found: dict[str, dict[str, str]] = {}
    if (folder / OLD_TEMPLATE_FILE).is_file():
        found[OLD_TEMPLATE_FILE] = _named(_read_optional(folder / OLD_TEMPLATE_FILE).get("chat_template"), folder)
    found[CONFIG_FILE] = _named(options.get("chat_template"), folder)
    if (folder / TEMPLATE_FILE).is_file():
        found[TEMPLATE_FILE] = {"default": _read_text(folder / TEMPLATE_FILE)}
    if (folder / TEMPLATE_FOLDER).is_dir():
        found[TEMPLATE_FOLDER] = {path.stem: _read_text(path) for path in (folder / TEMPLATE_FOLDER).glob("*.jinja")}
    templates: dict[str, str] = {}
    for file, named in found.items():
        if templates.get("default", named.get("default")) != named.get("default", templates.get("default")):
            decide(f"chat template of {file}; another one, in an older place, is not used")
        templates |= named
    return templates


def _named(value: Any, folder: Path) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        named = value if isinstance(value, dict) else {item["name"]: item["template"] for item in value}
        # The names become files' names.
        if all(re.fullmatch(r"\w[\w.-]*", name) and isinstance(text, str) for name, text in named.items()):
            return named
    except (TypeError, KeyError):
        pass
    raise CheckpointError(f"{folder}: chat_template is neither a text nor a list of name and template: correct it")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as text ({error})") from error


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def write_templates(templates: Mapping[str, str], target: Path) -> None:
    """Write chat_template.jinja, and the others where transformers looks for them."""
    for name, template in templates.items():
        file = target / TEMPLATE_FILE if name == "default" else target / TEMPLATE_FOLDER / f"{name}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(template, encoding="utf-8")

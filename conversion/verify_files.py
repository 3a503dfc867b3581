"""Compares what a converted folder says beside its weights: configuration, context, special ids, generation.

Twice: with the source's own files, read by stock transformers or by hand, and with what the converter would write of
the source now, so that whatever it decides is what the folder must hold.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llama_repro.errors import CheckpointError

from .checks import Check, compared
from .hugging_face import read_json
from .manifest import recorded_options, recorded_sha256
from .source import CONFIG_ERRORS

if TYPE_CHECKING:
    from .source import Source

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Says how the folder is opened, or is compared apart: dtype, context, ids.
_NOT_COMPARED = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"),
    *("max_position_embeddings", *TOKEN_IDS),
}
# Keys of rope_parameters with an effect; stock transformers warns about any other, and computes without it.
_ROPE_KEYS = {
    *("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
_GENERATION_NOT_COMPARED = {"_from_model_config", "transformers_version", *TOKEN_IDS}


def open_with_options(source: Path, options: dict[str, Any]) -> "tuple[Source, CheckpointError | None]":
    """The source as it was converted, and why its context is not known, if it is not: then it has a context of 1.

    `options`: what was asked for at the conversion, `context_length` and `chat`.
    """
    from .source import is_meta_folder, open_source

    is_meta = is_meta_folder(source)
    asked = {name: options[name] for name in ("context_length", "chat") if is_meta and name in options}
    try:
        return open_source(source, **asked), None
    except CheckpointError as error:
        if not is_meta or "context_length" in asked:
            raise
        # Raises again where it is something else that is wrong.
        return open_source(source, **asked, context_length=1), error


def options_of(folder: Path, source: Path, context_length: int | None) -> dict[str, Any]:
    """What the folder's manifest records, or the caller says, of how it was converted."""
    from .source import is_meta_folder

    options = recorded_options(folder)
    if context_length is not None:
        if not is_meta_folder(source):
            raise CheckpointError(f"--context-length is for Meta's folders: {source} says its own context")
        options["context_length"] = context_length
    return options


@contextlib.contextmanager
def written_again(opened: "Source", target: Path) -> Iterator[Path]:
    """A folder with what the converter would write of the source now, but for the weights."""
    from .convert import write_beside_weights

    model_type = read_json(target / "config.json").get("model_type", "")
    with tempfile.TemporaryDirectory() as name:
        write_beside_weights(opened, Path(name), model_type)
        yield Path(name)


def load_config(folder: Path) -> Any:
    """The configuration as transformers opens it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, *CONFIG_ERRORS) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from None


def compare_configuration(source: Path, found: Any, again: Any, shapes: dict[str, Any], dtypes: set[Any]) -> Check:
    """`shapes`: what a Meta folder's files say, read by the reference; `dtypes`: that may stand there."""
    ours, theirs = found.to_dict(), again.to_dict()
    said = {**ours, "rope_theta": (ours.get("rope_parameters") or {}).get("rope_theta")}
    differing = {name: (said.get(name), value) for name, value in shapes.items() if said.get(name) != value}
    for name in sorted((ours.keys() | theirs.keys()) - _NOT_COMPARED):
        if ours.get(name) != theirs.get(name):
            differing.setdefault(name, (ours.get(name), theirs.get(name)))
    for name, value in _own(source, ours).items():
        other = _rope(ours[name]) if name == "rope_parameters" else ours.get(name)
        if other != value:
            differing.setdefault(name, (other, value))
    if found.dtype not in dtypes:
        differing["dtype"] = (found.dtype, " or ".join(sorted(map(str, dtypes))))
    told = [f"{name} is {value}, not {expected}" for name, (value, expected) in differing.items()]
    fits = not differing.keys() & (shapes.keys() - {"rms_norm_eps", "rope_theta"})
    count = len(ours.keys() - _NOT_COMPARED)
    return compared(
        "configuration",
        told,
        f"{count} values are the source's",
        {"differing": {name: str(value) for name, (value, _) in differing.items()}, "shapes_fit": fits},
    )


def _own(source: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """What the source's config.json says, as stock transformers reads it; nothing of another source.

    Without what only stock Llama's configuration has, where it has its default.
    """
    from transformers import LlamaConfig

    if not (source / "config.json").is_file():
        return {}
    fields = read_json(source / "config.json")
    if fields.get("model_type") != "llama":
        return {}
    own = LlamaConfig.from_dict(fields).to_dict()
    own["rope_parameters"] = _rope(own["rope_parameters"])
    defaults = LlamaConfig().to_dict()
    return {
        name: own[name]
        for name in defaults.keys() - _NOT_COMPARED - {"tie_word_embeddings"}
        if name in ours or own[name] != defaults[name]
    }


def _rope(parameters: Any) -> Any:
    if not isinstance(parameters, dict):
        return parameters
    return {name: value for name, value in parameters.items() if name in _ROPE_KEYS and value is not None}


def samples(folder: Path) -> bool:
    """Whether generation samples, as a conversion sets it for chat models."""
    return bool(_generation(folder).get("do_sample"))


def compare_code(folder: Path) -> Check:
    """The Python files that `trust_remote_code=True` runs: what is computed here is computed by the package's."""
    import hf_llama_repro

    from .refresh import CODE
    from .sums import file_sums

    own = Path(hf_llama_repro.__file__)
    others = [
        name
        for name in CODE
        if (folder / name).is_file() and (folder / name).read_bytes() != own.with_name(name).read_bytes()
    ]
    edited = [
        f"{name} was edited after it was written"
        for name in others
        if (noted := recorded_sha256(folder, name)) is not None and noted != file_sums(folder / name)["sha256"]
    ]
    if others and not edited:
        why = f"{' and '.join(others)} of another version: renew with hf-llama-convert --refresh-code {folder}"
        return Check("code", "not compared", why)
    return compared("code", edited, "that of this package")


def compare_generation(folder: Path, again: Path) -> Check:
    ours, theirs = (_generation(place) for place in (folder, again))
    names = sorted((ours.keys() | theirs.keys()) - _GENERATION_NOT_COMPARED)
    differences = [
        f"{name} is {ours.get(name)}, not {theirs.get(name)}" for name in names if ours.get(name) != theirs.get(name)
    ]
    held = ", ".join(f"{name} {ours[name]}" for name in names if name in ours)
    return compared("generation", differences, held or "no sampling values, as in the source")


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def compare_special_ids(
    folder: Path,
    again: Path,
    source: Path,
    tokenizers: tuple[Any, Any] = (None, None),
    said: dict[str, int | None] | None = None,
) -> Check:
    """Ids of config.json, of generation_config.json and of the tokenizer.

    `tokenizers`: that of the folder and the one made again; `said`: the ids of BOS, EOS and UNK by the source's.
    """
    places = [(load_config(place).to_dict(), _generation(place)) for place in (folder, again)]
    known = _source_ids(source, said or {})
    differences: list[str] = []
    held: dict[str, Any] = {}
    for name in ("bos", "eos", "unk", "pad"):
        key = f"{name}_token_id"
        sides = {
            "config.json": [config.get(key) for config, _ in places],
            "generation_config.json": [generation.get(key) for _, generation in places],
            "the tokenizer": [getattr(tokenizer, key, None) for tokenizer in tokenizers],
        }
        for place, (ours, theirs) in sides.items():
            if ours is not None:
                held.setdefault(name, ours)
            if ours != theirs:
                differences.append(f"{name} of {place} is {ours}, not {theirs}")
            elif ours is not None and known.get(name) and not known[name].issuperset(_listed(ours)):
                differences.append(f"{name} of {place} is {ours}, which no file of the source says")
    told = ", ".join(f"{name} {value}" for name, value in held.items())
    return compared("special ids", differences, told or "none, as in the source")


def _listed(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [ids]


def _source_ids(source: Path, said: dict[str, int | None]) -> dict[str, set[Any]]:
    """What the files of the source say that BOS, EOS and UNK are; padding may be decided otherwise."""
    known: dict[str, set[Any]] = {name: {index} for name, index in said.items() if index is not None}
    # Defaults of Llama's configuration.
    for file, defaults in (("config.json", {"bos": 1, "eos": 2}), ("generation_config.json", {})):
        content = read_json(source / file) if (source / file).is_file() else {}
        for name in ("bos", "eos") if content else ():
            if (index := content.get(f"{name}_token_id", defaults.get(name))) is not None:
                known.setdefault(name, set()).update(_listed(index))
    return known

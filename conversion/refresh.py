"""Renews the two Python files of a folder converted earlier, so that it runs under the transformers of today.

python -m conversion.convert --refresh-code FOLDER
"""

import json
from pathlib import Path
from typing import Any

import hf_llama_repro
from hf_llama_repro.durable import rename
from hf_llama_repro.errors import CheckpointError

from .manifest import MANIFEST
from .sums import file_sums

CODE = ("configuration_llama_repro.py", "modeling_llama_repro.py")


def refresh_code(folder: Path) -> list[str]:
    """Replace the code in a `llama_repro` folder by this package's; return a line for each file.

    Weights, configuration and tokenizer stay as they are; the manifest gets the new checksums. Raises
    `CheckpointError` for a folder without code of ours, and for a file that was edited after it was written.
    """
    _check_folder(folder)
    manifest = _read_manifest(folder)
    lines = []
    for name in CODE:
        ours = Path(hf_llama_repro.__file__).with_name(name).read_bytes()
        if (folder / name).read_bytes() == ours:
            lines.append(f"up to date  {folder / name}")
            continue
        _check_unedited(folder / name, manifest)
        aside = folder / f".{name}.partial"
        aside.write_bytes(ours)
        rename(aside, folder / name)
        lines.append(f"renewed     {folder / name}")
    if manifest is not None:
        _write_checksums(folder, manifest)
    return lines


def _check_folder(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no config.json that can be read ({error}): name a converted folder"
        ) from None
    if not isinstance(config, dict) or config.get("model_type") != "llama_repro":
        raise CheckpointError(f"{folder} is not of the model type llama_repro: it carries no code to renew")
    if missing := [name for name in CODE if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} has no {' and no '.join(missing)}: it runs by the installed package, with no code to renew"
        )


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}): convert the folder again, or remove the file") from None


def _entries(manifest: dict[str, Any]) -> dict[str, Any]:
    """File name -> its checksum; a training run's manifest is that alone."""
    return manifest.get("files", manifest)


def _check_unedited(path: Path, manifest: dict[str, Any] | None) -> None:
    entry = _entries(manifest).get(path.name) if manifest is not None else None
    noted = entry["sha256"] if isinstance(entry, dict) else entry
    if noted is not None and noted != file_sums(path)["sha256"]:
        raise CheckpointError(
            f"{path} was edited after it was written, and would be replaced: move it away, "
            "and copy this package's file of that name there"
        )


def _write_checksums(folder: Path, manifest: dict[str, Any]) -> None:
    entries = _entries(manifest)
    for name in CODE:
        sums = file_sums(folder / name)
        entries[name] = sums if isinstance(entries.get(name), dict) else sums["sha256"]
    aside = folder / f".{MANIFEST}"
    aside.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    rename(aside, folder / MANIFEST)

"""The tokenizer of a run: SentencePiece BPE as LLaMA has it, and its folder for AutoTokenizer.

Digits are split, unknown characters become bytes, spaces are kept and nothing is normalised (arXiv 2302.13971, section
2.1; the settings are those that LLaMA's own tokenizer.model records). It is trained line by line: a newline is a byte.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from hf_llama_repro.checkpoints import sha256_of
from hf_llama_repro.errors import InputError

from .recipe import Recipe
from .sources import documents, fingerprint, is_held_out

LLAMA_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "character_coverage": 0.99995,
    "split_digits": True,
    "byte_fallback": True,
    "allow_whitespace_only_pieces": True,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "minloglevel": 2,
}
# 256 bytes, <unk>, <s>, </s>.
FEWEST_PIECES = 259
FOLDER = "tokenizer"
SETTINGS = "tokenizer-settings.json"
"""Beside the folder, which is copied whole with every model."""


def prepare_tokenizer(recipe: Recipe) -> str:
    """Makes `tokenizer/` in the recipe's data folder, or finds it; a line for humans comes back.

    Raises `InputError` where it cannot be trained or brought over with equal ids, or exists with other settings.
    """
    target, settings = recipe.data_path / FOLDER, recipe.data_path / SETTINGS
    if recipe.tokenizer and not Path(recipe.tokenizer).is_file():
        raise InputError(f"tokenizer={recipe.tokenizer} is no file: give a SentencePiece model, or remove the key")
    if target.is_dir():
        return f"{len(load_processor(recipe)):,} pieces, from {target}{_check_settings(recipe, target, settings)}"
    recipe.data_path.mkdir(parents=True, exist_ok=True)
    settings.unlink(missing_ok=True)
    model = recipe.data_path / "tokenizer.model.partial"
    if recipe.tokenizer:
        shutil.copyfile(recipe.tokenizer, model)
    else:
        model.write_bytes(train_tokenizer(recipe))
    try:
        line = _convert(model, target, recipe.context_length)
    finally:
        model.unlink()
    settings.write_text(json.dumps(_made_with(recipe), indent=2) + "\n", encoding="utf-8")
    return line


def _made_with(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that determine the tokenizer."""
    if recipe.tokenizer:
        return {"tokenizer": sha256_of(Path(recipe.tokenizer))}
    sources = [{**asdict(source), "fingerprint": fingerprint(source)} for source in recipe.sources]
    for source in sources:
        del source["expected_tokens"]
    text = json.dumps([recipe.held_out, sources], sort_keys=True)
    return {
        "tokenizer": "trained",
        "vocab_size": recipe.vocab_size,
        "tokenizer_bytes": recipe.tokenizer_bytes,
        "mixture": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
    }


def _check_settings(recipe: Recipe, target: Path, settings: Path) -> str:
    """Describe how an existing tokenizer differs from the recipe's. Raises `InputError` where its settings differ.

    Changed files of the mixture are reported only: runs with several mixtures may share a tokenizer.
    """
    wanted = _made_with(recipe)
    try:
        made: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # made before settings were recorded
        made = {"vocab_size": len(load_processor(recipe))}
    if recipe.tokenizer:
        made["tokenizer"] = tokenizer_sha256(recipe)
    known = [name for name in wanted if name in made and name != "mixture"]
    differing = [f"{name} was {made[name]} and is {wanted[name]}" for name in known if made[name] != wanted[name]]
    if differing:
        raise InputError(
            f"{target} was made with other settings ({'; '.join(differing)}): choose another data_dir, or remove "
            f"{recipe.data_path}, whose tokens every run on it needs"
        )
    if wanted.keys() - made.keys():
        return "; how it was trained is not recorded"
    changed = made.get("mixture") != wanted.get("mixture")
    return "; files or settings of the mixture have changed since it was trained" if changed else ""


def save_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Copy the prepared tokenizer, which runs may share, with this run's context length."""
    for path in (recipe.data_path / FOLDER).iterdir():
        shutil.copyfile(path, folder / path.name)
    path = folder / "tokenizer_config.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), "model_max_length": recipe.context_length}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tokenizer_sha256(recipe: Recipe) -> str:
    """Return the checksum of the prepared tokenizer's model."""
    return sha256_of(recipe.data_path / FOLDER / "tokenizer.model")


def load_processor(recipe: Recipe) -> SentencePieceProcessor:
    """SentencePiece's own view of the prepared tokenizer."""
    return SentencePieceProcessor(model_file=str(recipe.data_path / FOLDER / "tokenizer.model"))


def train_tokenizer(recipe: Recipe) -> bytes:
    """A SentencePiece model of the mixture's training documents. Raises `InputError` where they are too few."""
    if recipe.vocab_size <= FEWEST_PIECES:
        raise InputError(f"vocab_size={recipe.vocab_size} must be more than {FEWEST_PIECES}: 256 bytes and 3 marks")
    model = io.BytesIO()
    failures: list[BaseException] = []

    def lines() -> Iterator[str]:
        nothing = True
        try:
            for line in _lines(recipe):
                nothing = False
                yield line
            if nothing:
                raise InputError("the mixture is empty: it holds no text to train on; correct files, or lower held_out")
        except BaseException as error:  # SentencePiece makes a RuntimeError of whatever happens in here
            failures.append(error)
            raise

    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, vocab_size=recipe.vocab_size, **LLAMA_SETTINGS
        )
    except RuntimeError as error:
        if failures and not isinstance(failures[0], GeneratorExit):
            raise failures[0] from None
        reason = " ".join(str(error).split())[-200:]
        raise InputError(
            f"no tokenizer of vocab_size={recipe.vocab_size} can be trained on this text ({reason}): "
            "choose a smaller vocab_size, or more text"
        ) from None
    return model.getvalue()


def _lines(recipe: Recipe) -> Iterator[str]:
    """Lines of each source's training documents, until its share of tokenizer_bytes is reached."""
    for source in recipe.sources:
        left = source.share * recipe.tokenizer_bytes
        for text in documents(source):
            if not is_held_out(text, recipe.held_out):
                # NUL ends a string inside of the trainer.
                yield from (line for line in text.replace("\0", " ").split("\n") if line)
                left -= len(text.encode("utf-8", "surrogatepass"))
            if left <= 0:
                break


def _convert(model: Path, target: Path, context_length: int) -> str:
    """By the converter, which compares its ids with SentencePiece's: a program of its own, in whichever package."""
    package = (__package__ or "").rpartition("pretrain")[0]  # "" in the checkout, "hf_llama_repro." when installed
    root = Path(__file__).parents[1 + package.count(".")]
    command = [sys.executable, "-m", f"{package}conversion.tokenizer_folder", str(model), str(target)]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, "--context-length", str(context_length)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise InputError(done.stderr.strip().removeprefix("error: ") or f"{' '.join(command)} failed")
    return done.stdout.strip()

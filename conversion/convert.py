"""Makes a folder that `from_pretrained` opens, out of an original LLaMA checkpoint or another format of it.

python -m conversion.convert SOURCE TARGET
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llama_repro.command import DONE, PARTIAL, add_version, run
from hf_llama_repro.errors import CheckpointError, NotItsSourceError

# torch and transformers are imported where they are used, so that --help answers at once.
if TYPE_CHECKING:
    import torch

    from hf_llama_repro import LlamaReproConfig

    from .checks import Check
    from .source import Source
    from .target import Written

DTYPES = ("auto", "float16", "bfloat16", "float32")
# Sampling that Meta recommends for the chat models (LLaMA 2 reference code); base models get none.
CHAT_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
_VERIFIED = {"ok": "verified  ", "not compared": "not proved"}


@dataclass(frozen=True)
class Conversion:
    """What `convert` made."""

    target: Path
    source: "Source"
    config: "LlamaReproConfig"
    written: "Written"
    tokenizer: str
    """One line on the tokenizer."""
    weights: str
    """One line on whether the values are those of the source."""
    checks: "tuple[Check, ...]" = ()
    """What was proved of the folder, and what of it could not be compared."""

    def lines(self) -> list[str]:
        """What a person wants to know of it."""
        written = self.written
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.source.tensors.values()})
        lines = [
            f"source     {self.source.description}, {written.num_parameters:,} parameters, {', '.join(dtypes)}",
            *(f"decided    {note}" for note in self.source.notes),
            f"tokenizer  {self.tokenizer}",
            f"weights    {self.weights}",
            *(f"{_VERIFIED[check.outcome]} {check.name}: {check.found}" for check in self.checks),
        ]
        if written.nonfinite:
            named = ", ".join(f"{name} ({count})" for name, count in list(written.nonfinite.items())[:5])
            lines.append(f"WARNING    NaN or infinite values in {len(written.nonfinite)} tensors: {named}")
        files = f"{len(written.files)} file{'s' if len(written.files) > 1 else ''}"
        return [*lines, f"written    {self.target}: {files}, {written.num_bytes / 1e9:.2f} GB of weights"]

    @property
    def exit_code(self) -> int:
        """`PARTIAL` where a proof was asked for and something could not be compared."""
        return PARTIAL if any(check.outcome != "ok" for check in self.checks) else DONE


def dtype_line(written: "Written", config: "LlamaReproConfig") -> str:
    """Whether the values are those of the source."""
    if not written.num_cast:
        return "every value bit for bit that of the source"
    share = written.num_changed / written.num_cast
    loss = f"{share:.2%} of the values lost bits" if written.num_changed else "without loss"
    return f"cast to {str(config.dtype).removeprefix('torch.')}, {loss}"


def convert(
    source: Path,
    target: Path,
    *,
    model_type: str = "llama_repro",
    dtype: str = "auto",
    tokenizer: Path | None = None,
    with_tokenizer: bool = True,
    max_shard_size: str = "5GB",
    context_length: int | None = None,
    chat: bool | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    resume: bool | None = None,
    verify: bool = False,
    ollama: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Conversion:
    """Writes `target` from `source`, whole or not at all; in memory are two tensors at a time, whatever their number.

    `model_type` "llama_repro" runs with this package (or with trust_remote_code=True), "llama" with stock transformers.
    `dtype` "auto" keeps the source's. `tokenizer` replaces the one found with the source. `max_shard_size` in decimal
    units. `context_length` (tokens) and `chat` answer what the files of a Meta folder may not tell. `resume` True goes
    on with what an interrupted conversion finished, False begins it anew; None refuses where there is such a thing.
    `verify` proves the folder before it gets its name. `ollama` writes a Modelfile into it. `tell` is given a line on
    the space needed, before anything is written.
    Raises `CheckpointError`; the source is never changed.
    """
    import torch

    from .model_card import made_by, model_card
    from .source import open_source
    from .target import check_target, parse_size

    if ollama and (model_type != "llama" or not with_tokenizer):
        raise CheckpointError(
            "--ollama writes a template for a folder that llama.cpp converts: it needs --as llama, and a tokenizer"
        )
    max_shard_bytes = parse_size(max_shard_size)
    check_target(target, source, overwrite=overwrite)
    opened = open_source(source, context_length=context_length, chat=chat)
    opened = replace(opened, tokenizer=_choose_tokenizer(opened, source, tokenizer) if with_tokenizer else None)
    opened = replace(opened, options=_options(opened, context_length))
    with new_folder(
        opened,
        target,
        sources=(source,),
        model_type=model_type,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        max_shard_bytes=max_shard_bytes,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        ollama=ollama,
        resumable=True,
        resume=resume,
        tell=tell,
    ) as (folder, conversion):
        conversion = replace(conversion, checks=_verified(source, folder, tokenizer, opened) if verify else ())
        checks = [f"{check.name}, {check.outcome}: {check.found}" for check in conversion.checks]
        made = f"Converted {made_by('hf-llama-convert')} from `{source.name}`: {opened.description}."
        (folder / "README.md").write_text(model_card(conversion, made, model_type, checks), encoding="utf-8")
    return conversion


def _choose_tokenizer(opened: "Source", source: Path, tokenizer: Path | None) -> Path:
    """The one that is named, else the source's own."""
    chosen = tokenizer or opened.tokenizer
    if chosen is None:
        raise CheckpointError(f"no tokenizer was found with {source}: name one by --tokenizer, or say --no-tokenizer")
    return chosen


def _options(opened: "Source", context_length: int | None) -> dict[str, Any]:
    """What was asked for, or decided, that the source's files do not hold; for the manifest."""
    options: dict[str, Any] = {"tokenizer": opened.tokenizer is not None}
    if context_length is not None:
        options["context_length"] = context_length
    if opened.token_ids_from_tokenizer:
        options["chat"] = opened.chat
    return options


def _verified(source: Path, folder: Path, tokenizer: Path | None, opened: "Source") -> "tuple[Check, ...]":
    from .checks import failed, table
    from .verify import verify

    checks = verify(source, folder, tokenizer=tokenizer, options=opened.options)
    if wrong := failed(checks):
        raise NotItsSourceError(
            f"what was written is not its source: {table(wrong)}; this is a fault of hf-llama-convert, "
            "not of the files: please report it"
        )
    return tuple(checks)


@contextlib.contextmanager
def new_folder(
    opened: "Source",
    target: Path,
    *,
    sources: tuple[Path, ...],
    model_type: str,
    dtype: "torch.dtype | None",
    max_shard_bytes: int,
    allow_nonfinite: bool,
    overwrite: bool,
    ollama: bool = False,
    resumable: bool = False,
    resume: bool | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> "Iterator[tuple[Path, Conversion]]":
    """Yields a folder with all of `opened` but its README, which becomes `target` when the block ends.

    `sources`: folders that it may not lie in. `dtype` None keeps each tensor's own. Where the block raises, nothing
    is left, but for the finished files of a `resumable` folder that was interrupted.
    """
    from .manifest import Manifest
    from .sums import summed
    from .target import num_target_bytes, whole_or_nothing, write_weights

    config = opened.config
    config.dtype = dtype or config.dtype
    options = [model_type, str(dtype), max_shard_bytes, allow_nonfinite]
    request = _request(opened, options) if resumable else None
    num_bytes = num_target_bytes(opened.tensors, dtype)
    with (
        whole_or_nothing(
            target,
            *sources,
            overwrite=overwrite,
            num_bytes=num_bytes,
            request=request,
            resume=resume,
            tell=tell,
        ) as folder,
        summed(_read_files(opened)) as sums,
    ):
        manifest = Manifest(folder, request)
        # The tokenizer first: it may be refused, and that is better known before hours of writing.
        tokenizer_line, opened = write_beside_weights(opened, folder, model_type)
        if ollama:
            _write_modelfile(folder, opened)
        written = write_weights(
            opened,
            manifest,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            allow_nonfinite=allow_nonfinite,
            advance=sums.advance,
        )
        source_sums = sums.result()
        yield folder, Conversion(target, opened, config, written, tokenizer_line, dtype_line(written, config))
        manifest.complete(source_sums, opened.options)


def write_beside_weights(opened: "Source", folder: Path, model_type: str) -> tuple[str, "Source"]:
    """Tokenizer and configurations of a converted folder, which a proof writes again.

    A line on the tokenizer comes back, and the source with what was decided.
    """
    line = "none" if opened.tokenizer is None else _write_tokenizer(opened.tokenizer, folder, opened)
    _write_configuration(folder, opened.config, model_type)
    _write_generation_config(folder, opened)
    return line, opened


def _read_files(opened: "Source") -> dict[Path, Any]:
    """The source's files, and the tokenizer where it is another file."""
    files = dict(opened.files)
    if opened.tokenizer is not None and opened.tokenizer.is_file():
        files.setdefault(opened.tokenizer, None)
    return files


def _request(opened: "Source", options: list[Any]) -> dict[str, Any]:
    """What must be the same where an interrupted conversion is gone on with."""
    from .model_card import made_by

    return {
        "source": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in opened.files],
        "options": [*options, str(opened.tokenizer), opened.chat, opened.config.max_position_embeddings],
        "version of hf-llama-repro": made_by("hf-llama-convert"),
    }


def _write_tokenizer(tokenizer: Path, folder: Path, opened: "Source") -> str:
    from .tokenizer import convert_tokenizer, load_tokenizer

    config = opened.config
    line = convert_tokenizer(
        tokenizer,
        folder,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        chat=opened.chat,
    )
    if opened.token_ids_from_tokenizer:
        loaded = load_tokenizer(folder, tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(loaded, name))
    return line


def _write_modelfile(folder: Path, opened: "Source") -> None:
    from .ollama import modelfile
    from .tokenizer import load_tokenizer

    text = modelfile(
        load_tokenizer(folder, folder),
        context_length=opened.config.max_position_embeddings,
        sampling=opened.generation_config or (CHAT_SAMPLING if opened.chat else {}),
    )
    (folder / "Modelfile").write_text(text, encoding="utf-8")


def _write_configuration(folder: Path, config: "LlamaReproConfig", model_type: str) -> None:
    """config.json; for llama_repro also the two modeling files, so that the folder runs without this package."""
    from .target import write_json

    fields = config.to_diff_dict()
    if model_type == "llama":
        from transformers import LlamaConfig

        stock = LlamaConfig(**{name: value for name, value in fields.items() if name not in ("model_type", "auto_map")})
        # The field is a property of ours; older readers look for it at the top level.
        write_json(
            folder / "config.json",
            {**stock.to_diff_dict(), "architectures": ["LlamaForCausalLM"], "rope_theta": config.rope_theta},
        )
        return
    import shutil

    import hf_llama_repro
    from hf_llama_repro.configuration_llama_repro import AUTO_MAP

    for name in ("configuration_llama_repro.py", "modeling_llama_repro.py"):
        shutil.copyfile(Path(hf_llama_repro.__file__).parent / name, folder / name)
    write_json(folder / "config.json", {**fields, "architectures": ["LlamaReproForCausalLM"], "auto_map": AUTO_MAP})


def _write_generation_config(folder: Path, opened: "Source") -> None:
    from transformers import GenerationConfig

    from .target import write_json

    if opened.generation_config:
        # As it is: transformers 5 refuses to save some that it opens (sampling values without do_sample).
        write_json(folder / "generation_config.json", opened.generation_config)
        return
    config = opened.config
    token_ids: dict[str, Any] = {
        name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    sampling = CHAT_SAMPLING if opened.chat else {}
    GenerationConfig(**{**token_ids, **sampling}).save_pretrained(folder)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-llama-convert",
        description="Make a folder that from_pretrained and pipeline open out of a LLaMA checkpoint.",
        epilog="The target appears under its name only when it is whole. Exit code 2: the message says what to mend. "
        "With --verify, 1: what was written is not the source, and nothing is left of it; 3: written, proved in part.",
    )
    parser.add_argument("source", type=Path, help="Meta folder, Hugging Face Llama folder, or .gguf file")
    parser.add_argument("target", type=Path, nargs="?", help="folder to make")
    parser.add_argument(
        "--as",
        dest="model_type",
        choices=("llama_repro", "llama"),
        default="llama_repro",
        help="classes that open it: ours (default), or stock transformers' Llama",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto (default): the source's")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.model, tokenizer.json or .gguf to use"
    )
    parser.add_argument("--no-tokenizer", dest="with_tokenizer", action="store_false", help="write none")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights (default: 5GB)")
    parser.add_argument(
        "--context-length",
        type=int,
        metavar="TOKENS",
        help="2048 (LLaMA 1), 4096 (LLaMA 2): where the files do not tell",
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="LLaMA 2 chat template and sampling; default: where a Meta folder's name says chat",
    )
    parser.add_argument("--allow-nonfinite", action="store_true", help="convert weights with NaN or infinite values")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it is a checkpoint")
    parser.add_argument("--verify", action="store_true", help="prove the result, as hf-llama-verify does")
    parser.add_argument("--ollama", action="store_true", help="write a Modelfile with the chat template for Ollama")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="go on with what an interrupted conversion finished; --no-resume begins it anew",
    )
    parser.add_argument(
        "--refresh-code",
        action="store_true",
        help="make nothing: renew the Python files in SOURCE, converted earlier, for newer versions of transformers",
    )
    add_version(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.refresh_code:
        given = [name for name, value in vars(arguments).items() if value != parser.get_default(name)]
        if others := sorted({*given} - {"source", "refresh_code"}):
            parser.error(f"--refresh-code takes a folder and nothing else, not {', '.join(others)}")
        return _refresh(arguments.source)
    if arguments.target is None:
        parser.error("the following arguments are required: target")
    del arguments.refresh_code

    def work() -> int:
        conversion = convert(**vars(arguments), tell=print)
        print("\n".join(conversion.lines()))
        return conversion.exit_code

    return run(
        work,
        interrupted=f"{arguments.target} was not made; --resume goes on from the files that are finished",
    )


def _refresh(folder: Path) -> int:
    from .refresh import refresh_code

    return run(
        lambda: print("\n".join(refresh_code(folder))), interrupted="each of the files is the old one or the new one"
    )


if __name__ == "__main__":
    sys.exit(main())

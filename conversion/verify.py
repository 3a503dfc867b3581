"""Proves that a converted folder is its source: weights, computation, configuration, tokenizer, chat template.

python -m conversion.verify SOURCE TARGET
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llama_repro.command import Parser, add_version, run
from hf_llama_repro.errors import CheckpointError
from hf_llama_repro.local_path import input_path
from hf_llama_repro.outputs import check_output_file, write_output

from .checks import Check, compared, ending, table

# torch and transformers are imported where they are used, so that --help answers at once.
if TYPE_CHECKING:
    import torch

    from .reference import MetaReference
    from .source import Source, StoredTensor

NUM_TOKENS = 256
# Both sides compute in float32. A right conversion of 4 layers of 7B, random: 2e-6 relative, KL 2e-12; the tests hold
# small models to 1e-5 and 1e-8.
MAX_HIDDEN, MAX_KL, MIN_TOP_1 = 1e-3, 1e-5, 0.99
_ROWS = 1024
"""Rows of a matrix compared together."""


def verify(
    source: Path,
    target: Path,
    *,
    tokenizer: Path | None = None,
    num_tokens: int = NUM_TOKENS,
    layers: int | None = None,
    context_length: int | None = None,
    options: dict[str, Any] | None = None,
) -> list[Check]:
    """Compares a converted folder with what it was made of, in the memory of one layer.

    Everything that is written, with the source's own files and with what the converter makes of them now; of a Meta
    folder also the hidden states and logits of `num_tokens` random tokens after each of the first `layers` layers
    (None: all), by an implementation of its own. `tokenizer` and `context_length` (tokens): as they were given at the
    conversion. `options`: what the folder's manifest records of it (None: is read from there).
    Raises `CheckpointError` for folders that cannot be read at all.
    """
    from hf_llama_repro.mapped_pages import release_mapped_pages

    from .hugging_face import open_hugging_face
    from .reference import MetaReference
    from .source import is_meta_folder
    from .verify_files import load_config, open_with_options, options_of, samples

    written = open_hugging_face(target)
    options = options_of(target, source, context_length) if options is None else options
    opened, unknown_context = open_with_options(source, options)
    opened = replace(opened, tokenizer=tokenizer or opened.tokenizer)
    cast = _cast(opened, written)
    reference = MetaReference(source, cast) if is_meta_folder(source) else None
    expected = opened.config.max_position_embeddings
    found = load_config(target).max_position_embeddings
    if unknown_context is not None:
        opened.config.max_position_embeddings = found
    # Where nothing records it, the folder tells whether it was made for chat, and the source's name may contradict.
    by_name, chat = opened.chat, options.get("chat", samples(target) if reference is not None else opened.chat)
    opened = replace(opened, chat=chat)
    checks, fits = _beside_weights(source, target, opened, options, reference, cast)
    if chat != by_name and "chat" not in options:
        checks = [_doubted(check, chat) for check in checks]
    checks.insert(1, _context(found, expected, options, opened, unknown_context))
    checks.append(_weights(opened, written, reference))
    if reference is not None and fits:
        checks.append(_computed(reference, written, target, num_tokens, layers))
    elif reference is not None:
        checks.append(Check("computation", "FAILED", "not run: the configuration asks for other shapes"))
    release_mapped_pages([*opened.files, *written.files])
    return checks


def _beside_weights(
    source: Path,
    target: Path,
    opened: "Source",
    options: dict[str, Any],
    reference: "MetaReference | None",
    cast: "torch.dtype | None",
) -> tuple[list[Check], bool]:
    """The checks of all files but those of weights, and whether the shapes of the weights can be the source's."""
    from .hugging_face import read_json
    from .verify_files import (
        compare_code,
        compare_configuration,
        compare_generation,
        compare_special_ids,
        load_config,
        written_again,
    )

    has_tokenizer = (target / "tokenizer.json").is_file()
    dtypes = {opened.config.dtype, *([] if cast is None else [cast])}
    tokenizer = opened.tokenizer
    opened = replace(opened, tokenizer=tokenizer if has_tokenizer else None)
    with written_again(opened, target) as again:
        shapes = {} if reference is None else _shapes(reference)
        checks = [
            compare_configuration(source, load_config(target), load_config(again), shapes, dtypes),
            compare_generation(target, again),
        ]
        if has_tokenizer and tokenizer is not None:
            checks += _tokenizer_of(tokenizer, source, target, again, opened)
        elif has_tokenizer:
            why = "the source has no tokenizer: name the one that was used by --tokenizer"
            checks += [Check(name, "not compared", why) for name in ("special ids", "tokenizer", "chat template")]
        else:
            checks += [compare_special_ids(target, again, source), _without_tokenizer(tokenizer, options)]
    if read_json(target / "config.json").get("model_type") == "llama_repro":
        checks.append(compare_code(target))
    return checks, checks[0].figures["shapes_fit"]


def _cast(source: "Source", target: "Source") -> "torch.dtype | None":
    """The dtype that the source was cast to, if it was."""
    dtypes = {tensor.dtype for tensor in target.tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes != {t.dtype for t in source.tensors.values()} else None


def _doubted(check: Check, chat: bool) -> Check:
    """What hangs on the decision for chat, where the folder has another than the source's name tells."""
    if check.outcome != "ok" or check.name not in ("generation", "chat template"):
        return check
    kind = "a chat model" if chat else "a base model"
    return replace(check, outcome="not compared", found=f"as for {kind}, which the files of the source do not tell")


def _context(
    found: int, expected: int, options: dict[str, Any], opened: "Source", unknown: CheckpointError | None
) -> Check:
    if unknown is not None:
        return Check("context", "not compared", f"{found} tokens, and {unknown}")
    why = next((note for note in opened.notes if note.startswith("context of ")), "the source says so")
    if "context_length" not in options and found != expected and "context of" in why:
        why += f"; if another was asked for at the conversion, say --context-length {found}"
    differences = [] if found == expected else [f"{found} tokens, not {expected}: {why}"]
    return compared("context", differences, f"{found} tokens: {why}", {"context_length": found})


def _shapes(reference: "MetaReference") -> dict[str, Any]:
    """The configuration that a Meta folder's files have, as the reference reads them."""
    q, gate = (reference.pieces(f"layers.0.{name}") for name in ("attention.wq", "feed_forward.w1"))
    return {
        "vocab_size": reference.vocab_size,
        "hidden_size": q[0].shape[1],
        "intermediate_size": sum(len(piece) for piece in gate),
        "num_hidden_layers": reference.num_layers,
        "num_attention_heads": reference.num_heads,
        "num_key_value_heads": reference.num_kv_heads,
        "head_dim": sum(len(piece) for piece in q) // reference.num_heads,
        "rms_norm_eps": reference.eps,
        "rope_theta": reference.theta,
    }


def _weights(source: "Source", target: "Source", reference: "MetaReference | None") -> Check:
    from tqdm import tqdm

    from hf_llama_repro.mapped_pages import release_mapped_pages

    from .keys import EMBEDDING, OUTPUT, expand
    from .target import num_target_bytes

    rows = {ours: (row, meta) for row, meta, ours in expand(source.config)}
    # The output matrix may be tied on either side.
    names = list(dict.fromkeys([*source.tensors, *target.tensors, *([] if reference is None else [OUTPUT])]))
    # What the source does not have at all: more layers, biases.
    extra = [name for name in target.tensors if name not in {*source.tensors, OUTPUT}]
    differing = {name: target.tensors[name].num_bytes // target.tensors[name].dtype.itemsize for name in extra}
    num_values = num_cast = 0
    total = num_target_bytes({name: target.tensors.get(name, target.tensors[EMBEDDING]) for name in names}, None)
    with tqdm(total=total, unit="B", unit_scale=True, desc="comparing weights", disable=None) as progress:
        for name in (name for name in names if name not in differing):
            written = target.tensors.get(name, target.tensors[EMBEDDING]).read()
            if reference is None:
                expected = source.tensors.get(name, source.tensors[EMBEDDING]).read()
            else:
                row, meta = rows[name]
                expected = _joined(reference.pieces(meta.removesuffix(".weight")), row.cut)
                if row.heads is not None:
                    written = written[_meta_order(len(written), getattr(target.config, row.heads))]
            if found := _num_differing(expected, written):
                differing[name] = found
            num_values += written.numel()
            num_cast += written.numel() * (written.dtype != expected.dtype)
            release_mapped_pages([*source.files, *target.files])
            progress.update(written.nbytes)
    cast = f", after the cast of {num_cast:,} to {str(target.config.dtype).removeprefix('torch.')}" if num_cast else ""
    return compared(
        "weights",
        [f"{name} ({count:,})" for name, count in differing.items()],
        f"{num_values:,} values in {len(names)} tensors are bit for bit the source's{cast}",
        {"values": num_values, "cast": num_cast, "differing": differing},
        heading=f"{len(differing)} of {len(names)} tensors differ (values): ",
    )


def _joined(pieces: "list[torch.Tensor]", cut: int | None) -> "torch.Tensor":
    import torch

    return pieces[0] if cut is None or len(pieces) == 1 else torch.cat(pieces, dim=cut)


def _meta_order(num_rows: int, heads: int) -> "torch.Tensor":
    """Where in our matrix the rows of Meta's are: its row 2 i + half of a head is our row i of that half."""
    import torch

    row = torch.arange(num_rows)
    head_dim = num_rows // heads
    head, channel = row // head_dim, row % head_dim
    return head * head_dim + channel % 2 * (head_dim // 2) + channel // 2


def _num_differing(expected: "torch.Tensor", written: "torch.Tensor") -> int:
    import torch

    if expected.shape != written.shape:
        return max(expected.numel(), written.numel())
    count = 0
    for one, other in zip(expected.split(_ROWS), written.split(_ROWS), strict=True):
        one, other = (part.contiguous().view(torch.uint8) for part in (one.to(other.dtype), other))
        if not torch.equal(one, other):
            size = written.dtype.itemsize
            count += int((one != other).view(-1, size).any(dim=-1).sum())
    return count


def _computed(reference: "MetaReference", target: "Source", folder: Path, num_tokens: int, layers: int | None) -> Check:
    import torch
    from tqdm import tqdm

    from hf_llama_repro.mapped_pages import release_mapped_pages

    num_layers = min(layers or reference.num_layers, reference.num_layers)
    tokens = torch.randint(reference.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))
    hidden: list[float] = []
    first = None
    with torch.inference_mode():
        ours = _states(folder, target, tokens, num_layers)
        expected = reference.embedding(tokens)
        for number in tqdm(range(-1, num_layers), desc="comparing layers", disable=None):
            if number >= 0:
                expected = reference.layer(number, expected)
            hidden.append(_relative(next(ours), expected))
            if first is None and not hidden[-1] <= MAX_HIDDEN:
                first = "the embedding" if number < 0 else f"layer {number}"
            release_mapped_pages([*reference.files, *target.files])
        logits = _compared(next(ours), reference.logits(expected))
    if first is None and not (logits["kl_mean"] <= MAX_KL and logits["top_1_agreement"] >= MIN_TOP_1):
        first = "the output matrix"
    figures = {
        "tokens": num_tokens,
        "layers": num_layers,
        "hidden_relative": hidden,
        **logits,
        "parts_at": first,
    }
    told = (
        f"{num_tokens} tokens, {num_layers} layers: hidden states within {max(hidden):.1e}, logits of up to "
        f"{logits['logits_max']:.1f} within {logits['logits_max_difference']:.1e}, mean KL {logits['kl_mean']:.1e}, "
        f"top-1 {logits['top_1_agreement']:.1%}"
    )
    if logits["tokens_compared"] < num_tokens:
        told += f"; {num_tokens - logits['tokens_compared']} tokens have no finite logits in the source either"
    return compared("computation", [] if first is None else [f"parts at {first}", told], told, figures)


def _relative(found: "torch.Tensor", expected: "torch.Tensor") -> float:
    """The norm of the difference over the norm; of what is finite, which must be the same on both sides."""
    finite = expected.isfinite()
    if not finite.equal(found.isfinite()):
        return math.inf
    # NaN in the weights makes all of it NaN after a layer.
    return float((found - expected)[finite].norm() / expected[finite].norm()) if finite.any() else 0.0


def _compared(found: "torch.Tensor", expected: "torch.Tensor") -> dict[str, Any]:
    """Figures on two sides' logits (tokens, vocabulary), of the tokens whose logits are finite in the source.

    The divergence is infinite where others are finite than in the source.
    """
    rows = expected.isfinite().all(dim=-1)
    figures: dict[str, Any] = {"tokens_compared": int(rows.sum())}
    if not expected.isfinite().equal(found.isfinite()):
        figures |= {
            "logits_max_difference": math.inf,
            "logits_max": math.inf,
            "kl_mean": math.inf,
            "top_1_agreement": 0.0,
        }
    elif not rows.any():
        figures |= {"logits_max_difference": 0.0, "logits_max": 0.0, "kl_mean": 0.0, "top_1_agreement": 1.0}
    else:
        found, expected = found[rows], expected[rows]
        ours, right = (values.double().log_softmax(dim=-1) for values in (found, expected))
        figures |= {
            "logits_max_difference": float((found - expected).abs().max()),
            "logits_max": float(expected.abs().max()),
            "kl_mean": float((right.exp() * (right - ours)).sum(dim=-1).mean()),
            "top_1_agreement": float((found.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean()),
        }
    return figures


def _states(folder: Path, target: "Source", tokens: "torch.Tensor", num_layers: int) -> "Iterator[torch.Tensor]":
    """transformers' model of the folder: hidden states before the layers, after each, and the logits, in float32.

    Each layer is in memory only while it runs.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from .keys import EMBEDDING, OUTPUT

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = target.tensors
    x = tensors[EMBEDDING].read()[tokens].float()[None]
    yield x[0]
    positions = torch.arange(len(tokens))[None]
    turns = type(model.model.rotary_emb)(config)(x, positions)
    for number in range(num_layers):
        layer = model.model.layers[number]
        _fill(layer, f"model.layers.{number}.", tensors)
        x = layer(x, position_embeddings=turns, position_ids=positions, attention_mask=None)
        layer.to("meta")
        yield x[0]
    _fill(model.model.norm, "model.norm.", tensors)
    normed = model.model.norm(x)[0]
    output = tensors[OUTPUT if OUTPUT in tensors else EMBEDDING].read()
    yield torch.cat([normed @ rows.float().T for rows in output.split(_ROWS)], dim=-1)


def _fill(module: Any, prefix: str, tensors: "dict[str, StoredTensor]") -> None:
    content = {
        name.removeprefix(prefix): stored.read().float() for name, stored in tensors.items() if name.startswith(prefix)
    }
    module.load_state_dict(content, assign=True)


def _tokenizer_of(tokenizer: Path, source: Path, target: Path, again: Path, opened: "Source") -> list[Check]:
    """Checks of special ids, tokenizer and chat template. `again`: the folder with the tokenizer made once more."""
    from .tokenizer import load_tokenizer
    from .tokenizer_reference import references
    from .verify_files import compare_special_ids
    from .verify_tokenizer import compare_template, compare_tokenizer

    found, expected = load_tokenizer(target, target), load_tokenizer(again, tokenizer)
    said = references(tokenizer)[0]
    return [
        compare_special_ids(target, again, source, (found, expected), said.special),
        compare_tokenizer(tokenizer, found, expected),
        compare_template(said.templates, found.chat_template, expected.chat_template, chat=opened.chat),
    ]


def _without_tokenizer(tokenizer: Path | None, options: dict[str, Any]) -> Check:
    if tokenizer is None:
        return Check("tokenizer", "ok", "none, as in the source")
    if options.get("tokenizer") is False:
        return Check("tokenizer", "ok", "none, as was asked for at the conversion")
    return Check("tokenizer", "not compared", f"the folder has none, the source has {tokenizer}")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hf-llama-verify",
        description="Prove that a converted folder is its source: weights, computation, configuration, tokenizer.",
        epilog="Exit code 0: it is; 1: it is not, and the table says where; 2: something cannot be read; "
        "3: what was compared is, but something could not be compared.",
    )
    parser.add_argument("source", type=input_path, help="Meta folder, Hugging Face Llama folder, or .gguf file")
    parser.add_argument("target", type=input_path, help="folder that was made of it")
    parser.add_argument("--tokens", dest="num_tokens", type=int, default=NUM_TOKENS, metavar="N", help="to run (256)")
    parser.add_argument("--layers", type=int, metavar="N", help="to run (all)")
    parser.add_argument("--tokenizer", type=input_path, metavar="FILE", help="tokenizer that was used")
    parser.add_argument(
        "--context-length", type=int, metavar="TOKENS", help="as given at the conversion, if the folder does not say"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    add_version(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = vars(build_parser().parse_args(argv))
    json_file = arguments.pop("json")

    def work() -> int:
        for name, flag in (("num_tokens", "tokens"), ("layers", "layers"), ("context_length", "context-length")):
            if arguments[name] is not None and arguments[name] < 1:
                raise CheckpointError(f"--{flag} {arguments[name]}: at least 1")
        check_output_file("--json", json_file)
        checks = verify(**arguments)
        line, code = ending(checks)
        print(table(checks), line, sep="\n")
        if json_file is not None:
            write_output("--json", json_file, json.dumps([asdict(check) for check in checks], indent=2) + "\n")
        return code

    return run(work, interrupted="nothing was found out")


if __name__ == "__main__":
    sys.exit(main())

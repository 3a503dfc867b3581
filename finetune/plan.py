"""Says before a run, and without the weights, what memory it takes, on which cards it fits, and what to change if not.

python -m finetune.plan llama-7b --quantization int8 --gpu 12GB
python -m finetune.plan RECIPE [--key value ...]
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llama_repro.command import ANSWER_IS_NO, DONE, add_version, run
from hf_llama_repro.errors import InputError
from hf_llama_repro.outputs import check_output_file, write_output

from .quiet import quiet
from .recipe import RECIPES, Recipe, add_recipe_flags, load_recipe, make_recipe, overrides

# torch and transformers are imported where they are used, so that --help answers at once.
if TYPE_CHECKING:
    from hf_llama_repro import LlamaReproConfig

    from .memory import Device, Memory

CARDS_GB = (8, 12, 16, 24, 40, 80)
# The CUDA context and the kernels' libraries take about 0.5 GB of a card, cuBLAS's workspace and the allocator's unused
# blocks the rest. A card is counted in decimal GB: most report 7 % more, which a desktop on the same card may need.
RESERVE = 800_000_000
ALPACA_RECORDS = 52_002
SHORTEST, LENGTH_STEP = 128, 64
PLANNED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


@dataclass(frozen=True)
class Plan:
    """What a run takes. Memory in bytes, of one process."""

    recipe: Recipe
    memory: "Memory"
    num_parameters: int
    num_trained: int
    kv_cache: int
    """Of generating up to `max_length` tokens with the model, batch 1; not part of the peak."""
    records: int | None
    steps_per_epoch: int | None
    steps: int | None
    tokens: int | None
    """Computed in the whole run, if every record were `max_length` long."""
    flops: float | None
    processes: int = 1
    """Among which FSDP divides the model."""

    @property
    def peak(self) -> int:
        return self.memory.peak

    def lines(self) -> list[str]:
        """What a person wants to know of it."""
        from .memory import CATEGORIES

        recipe, memory = self.recipe, self.memory
        kv_note = f"of generating {recipe.max_length} tokens; not in the peak"
        table = [
            f"{name:<12}{size(memory.at_peak[name]):>10}{size(memory.largest[name]):>10}  {text}"
            for name, text in CATEGORIES.items()
        ]
        notes = []
        if recipe.optimizer not in PLANNED_OPTIMIZERS:
            notes.append(f"note        optimizer={recipe.optimizer} is planned as adamw_torch, which others undercut")
        if recipe.method == "full" and self.processes == 1:
            notes.append("note        of one card: --fsdp N divides weights, gradients and optimizer among N")
        if self.processes > 1:
            notes.append(
                f"note        of one of {self.processes} cards: weights, adapter, gradients and optimizer are divided; "
                "temporary holds two whole layers and the output matrix"
            )
        if self.processes > 1 and recipe.method == "full" and recipe.dtype != "float32":
            notes.append(
                "note        at most: autocast's 16-bit copies of all weights are counted; FSDP holds a layer of them"
            )
        if self.steps is not None and self.records is not None:
            notes.append(
                f"steps       {self.steps_per_epoch:,} an epoch, {self.steps:,} in all ({self.records:,} records)"
            )
        elif self.steps is None:
            notes.append(
                "steps       unknown: the data file is not there; name the number of its records by --records N"
            )
        if self.flops is not None:
            notes.append(f"compute     at most {self.tokens:,} tokens, {self.flops:.2e} FLOPs")
        return [
            f"plan        {described(recipe)}",
            f"{'memory':<12}{'at peak':>10}{'at most':>10}",
            *table,
            f"{'peak':<12}{size(self.peak):>10}{'':>10}  {memory.moment}",
            f"{'KV cache':<12}{size(self.kv_cache):>10}{'':>10}  {kv_note}",
            f"parameters  {self.num_trained:,} trained of {self.num_parameters:,} in the base",
            *notes,
        ]


@dataclass(frozen=True)
class Fit:
    """Whether a plan fits a card, and which changes make it fit."""

    card: int
    peak: int
    changes: dict[str, Any] | None
    """Fields of the recipe; empty: it fits as it is; None: none of those known here is enough, or none was sought."""
    changed_peak: int | None = None
    sought: bool = True

    @property
    def fits(self) -> bool:
        return self.changes == {}

    def line(self) -> str:
        head = f"{size(self.card, digits=0):<8}"
        if self.fits:
            return f"{head}fits: {size(self.card - self.peak)} free, of which {size(RESERVE)} are for CUDA itself"
        missing = f"{head}does not fit: {size(self.peak + RESERVE - self.card)} missing"
        if self.changes is None:
            return missing + ("; a smaller model is needed" if self.sought else "")
        changed = ", ".join(f"{name} {str(value).lower()}" for name, value in self.changes.items())
        return f"{missing}; fits with {changed} ({size(self.changed_peak or 0)})"


def size(num_bytes: int, *, digits: int = 2) -> str:
    """In decimal units: "7.01 GB", "17.3 MB"."""
    return f"{num_bytes / 1e9:.{digits}f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def described(recipe: Recipe) -> str:
    """A recipe in one line."""
    method = "full" if recipe.method == "full" else f"LoRA of rank {recipe.lora_r} on {', '.join(recipe.lora_targets)}"
    base = "" if recipe.quantization == "none" else f" over {recipe.quantization}"
    dtype = "bfloat16" if recipe.dtype == "auto" else recipe.dtype
    checkpointing = ", gradient checkpointing" if recipe.gradient_checkpointing else ""
    batch = f"{recipe.micro_batch_size} x {recipe.max_length} tokens"
    return f"{recipe.base_model or 'model'}: {method}{base}, {dtype}, {batch}{checkpointing}"


def plan(
    recipe: Recipe,
    config: "LlamaReproConfig",
    *,
    records: int | None,
    num_processes: int = 1,
    fsdp: bool = False,
    device: "Device" = "cuda",
) -> Plan:
    """Runs the recipe's training step on tensors without data, which takes seconds.

    `records` are those to train on, without the held out; `fsdp`: the processes divide the model among them. Raises
    `InputError` for a recipe that cannot be run.
    """
    from .memory import Memory, trace

    if recipe.max_length > config.max_position_embeddings:
        raise InputError(
            f"max_length={recipe.max_length} is more than the base's context of {config.max_position_embeddings} tokens"
        )
    accumulates = recipe.accumulation(num_processes) > 1
    traced = trace(recipe, config, device=device, accumulates=accumulates, skip_logits=not fsdp)
    memory = traced.memory
    if fsdp:
        if recipe.quantization != "none":
            raise InputError(f"quantization={recipe.quantization} cannot be divided by FSDP: set it to none")
        memory = memory.divided(num_processes, whole_at_a_time(recipe, config))
    elif num_processes > 1:  # DistributedDataParallel's buckets
        bucket = memory.largest["gradients"]
        memory = Memory(
            at_peak={**memory.at_peak, "gradients": memory.at_peak["gradients"] + bucket},
            largest={**memory.largest, "gradients": 2 * bucket},
            moment=memory.moment,
        )
    element = 4 if recipe.dtype == "float32" else 2
    kv_values = 2 * config.num_hidden_layers * (config.num_key_value_heads or 0) * (config.head_dim or 0)
    per_epoch = None if records is None else math.ceil(records / recipe.batch_size)
    steps = recipe.max_steps or (None if per_epoch is None else math.ceil(per_epoch * recipe.epochs))
    tokens = None if steps is None else steps * recipe.batch_size * recipe.max_length
    return Plan(
        recipe=recipe,
        memory=memory,
        num_parameters=traced.num_parameters,
        num_trained=traced.num_trained,
        kv_cache=kv_values * recipe.max_length * element,
        records=records,
        steps_per_epoch=per_epoch,
        steps=steps,
        tokens=tokens,
        flops=None if tokens is None else tokens * flops_per_token(recipe, config, traced.num_parameters),
        processes=num_processes if fsdp else 1,
    )


def whole_at_a_time(recipe: Recipe, config: "LlamaReproConfig") -> int:
    """Bytes that FSDP puts together: the layer at work, the next one, and the output matrix from the loss on."""
    heads = config.num_attention_heads + (config.num_key_value_heads or 0)
    attention = 2 * config.hidden_size * heads * (config.head_dim or 0)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    return (2 * layer + config.vocab_size * config.hidden_size) * (4 if recipe.dtype == "float32" else 2)


def flops_per_token(recipe: Recipe, config: "LlamaReproConfig", num_parameters: int) -> float:
    """Multiplications and additions of the matrix products, at `max_length`.

    A parameter costs 2 in a forward pass, 2 for its input's gradient, 2 for its own (not where it is frozen), and 2 if
    the forward pass is repeated. 6 N D is the special case of full training, without attention.
    """
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    matrices = 2 * (num_parameters - embedding)
    width = config.num_attention_heads * (config.head_dim or 0)
    attention = 2 * config.num_hidden_layers * recipe.max_length * width  # a token sees half of the others on average
    repeated = 1 if recipe.gradient_checkpointing else 0
    own = 1 if recipe.method == "full" else 0
    return matrices * (2 + own + repeated) + attention * (3 + repeated)


def fit(
    card: int, plan_of: Callable[[Recipe], Plan], recipe: Recipe, *, seek: bool = True, quantizable: bool = True
) -> Fit:
    """Whether `recipe` fits `card` (bytes), or the first changes that make it fit; `plan_of` should remember."""
    peak = plan_of(recipe).peak
    weights: dict[str, int] = {}  # by quantization: most of a search is settled by these alone

    def fits(changes: dict[str, Any]) -> bool:
        changed = dataclasses.replace(recipe, **changes)
        if weights.get(changed.quantization, 0) + RESERVE > card:
            return False
        planned = plan_of(changed)
        weights[changed.quantization] = planned.memory.at_peak["weights"]
        return planned.peak + RESERVE <= card

    if fits({}):
        return Fit(card, peak, {}, peak)
    if seek:
        for changes in _changes(recipe, quantizable=quantizable):
            found = _longest(changes, recipe, fits) if "max_length" in changes else changes if fits(changes) else None
            if found is not None:
                return Fit(card, peak, found, plan_of(dataclasses.replace(recipe, **found)).peak)
    return Fit(card, peak, None, sought=seek)


def _changes(recipe: Recipe, *, quantizable: bool = True) -> Iterator[dict[str, Any]]:
    """What saves memory, the single changes first, in the order of what they cost; the shortest `max_length`."""
    smaller = {"none": ("int8", "nf4"), "int8": ("nf4",), "nf4": ()}[recipe.quantization]
    options: list[list[dict[str, Any]]] = [
        [] if recipe.gradient_checkpointing else [{"gradient_checkpointing": True}],
        [
            {"micro_batch_size": rows}
            for rows in (2, 1)
            if rows < recipe.micro_batch_size and recipe.batch_size % rows == 0
        ],
        [{"max_length": SHORTEST}] if recipe.max_length > SHORTEST else [],
        [{"quantization": name} for name in smaller] if recipe.method == "lora" and quantizable else [],
    ]
    for number in range(1, len(options) + 1):
        for groups in itertools.combinations(options, number):
            for chosen in itertools.product(*groups):
                yield {name: value for change in chosen for name, value in change.items()}


def _longest(changes: dict[str, Any], recipe: Recipe, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """`changes` with the longest `max_length` that fits, if the shortest does."""
    if not fits(changes):
        return None
    lengths = range(SHORTEST, recipe.max_length, LENGTH_STEP)
    low, high = 0, len(lengths)  # lengths[low] fits, lengths[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        if fits({**changes, "max_length": lengths[middle]}):
            low = middle
        else:
            high = middle
    return {**changes, "max_length": lengths[low]}


def card_bytes(text: str) -> int:
    """ "24GB", "24", "24 GiB" in bytes. Raises `InputError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|G|)\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise InputError(f"--gpu {text!r} is not a size: write 24GB (or 24GiB)")
    return int(float(match[1]) * (2**30 if match[2].lower() == "gib" else 10**9))


def read_source(source: str, changes: dict[str, Any]) -> tuple[Recipe, "LlamaReproConfig"]:
    """The recipe and the base's configuration that RECIPE or MODEL and the flags name."""
    from hf_llama_repro import PAPER_SIZES, LlamaReproConfig

    from .model import read_config

    if Path(source).is_dir() or source in PAPER_SIZES:
        if "base_model" in changes:
            raise InputError(f"{source} and --base-model {changes['base_model']} name two models: give one of them")
        recipe = make_recipe({**changes, "base_model": source}, where="the flags")
    elif Path(source).is_file() or (RECIPES / f"{source}.yaml").is_file():
        recipe = load_recipe(source, changes)
    else:
        recipes = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise InputError(
            f"{source} is no recipe, no folder with a config.json and no model of the papers: there are the recipes "
            f"{recipes}, and the models {', '.join(PAPER_SIZES)}"
        )
    base = recipe.base_model
    if Path(base).is_dir() and base:
        return recipe, read_config(Path(base))
    if base in PAPER_SIZES:
        return recipe, LlamaReproConfig.from_paper(base)
    named = f"base_model={base!r} does not exist" if base else f"{source} names no base_model"
    raise InputError(
        f"{named}: to plan without the weights, add --base-model llama-7b (or another of {', '.join(PAPER_SIZES)})"
    )


def count_records(recipe: Recipe, given: int | None) -> int | None:
    """Records to train on: as given, those of the data file, Alpaca's where the base is a paper's model; or unknown."""
    from hf_llama_repro import PAPER_SIZES

    if given is not None and given < 1:
        raise InputError(f"--records {given} must be at least 1")
    count = given
    if count is None and recipe.data and Path(recipe.data).is_file():
        from .records import read_records

        count = len(read_records(Path(recipe.data))[0])
    if count is None and not recipe.data and recipe.base_model in PAPER_SIZES:
        count = ALPACA_RECORDS
    if count is None:
        return None
    if recipe.held_out >= count:
        raise InputError(f"held_out={recipe.held_out} leaves nothing of {count} records to train on")
    return count - recipe.held_out


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-llama-plan",
        description="Say what memory a fine-tuning run takes, on which cards it fits, and what to change if not.",
        epilog="No weights are read. Exit code 1: it does not fit the card of --gpu. 2: the message says what to mend.",
    )
    parser.add_argument(
        "source",
        metavar="RECIPE|MODEL",
        help="YAML file, name of one in finetune/recipes/, folder with a config.json, or llama-7b, llama-2-13b ...",
    )
    parser.add_argument("--gpu", metavar="SIZE", help="memory of the card, such as 24GB; advice for this one only")
    parser.add_argument(
        "--records",
        type=int,
        metavar="N",
        help=f"of the data, where the file is not there (Alpaca: {ALPACA_RECORDS:,})",
    )
    parser.add_argument("--fsdp", type=int, default=1, metavar="N", help="divide the model among so many cards")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well, in bytes")
    add_recipe_flags(parser)
    add_version(parser)
    return parser


def make_plan(arguments: argparse.Namespace) -> int:
    """Prints the plan and the cards; the exit code says whether it fits the card of --gpu."""
    quiet()
    check_output_file("--json", arguments.json)
    gpu = None if arguments.gpu is None else card_bytes(arguments.gpu)
    recipe, config = read_source(arguments.source, overrides(arguments))
    if arguments.fsdp < 1:
        raise InputError(f"--fsdp {arguments.fsdp} must be at least 1")
    divided: dict[str, Any] = {"num_processes": arguments.fsdp, "fsdp": arguments.fsdp > 1}
    records = count_records(recipe, arguments.records)
    plan_of = functools.cache(functools.partial(plan, config=config, records=records, **divided))
    planned: Plan = plan_of(recipe)
    print("\n".join(planned.lines()), flush=True)
    cards = [card * 10**9 for card in CARDS_GB]
    fits = []
    for card in [*cards, *([gpu] if gpu is not None and gpu not in cards else [])]:
        fits.append(fit(card, plan_of, recipe, seek=gpu in (None, card), quantizable=arguments.fsdp == 1))
        print(f"card        {fits[-1].line()}", flush=True)
    if arguments.json:
        content = {**dataclasses.asdict(planned), "peak": planned.peak, "reserve": RESERVE}
        content["cards"] = [{**dataclasses.asdict(item), "fits": item.fits} for item in fits]
        write_output("--json", arguments.json, json.dumps(content, indent=2))
    fitting = gpu is None or all(item.fits for item in fits if item.card == gpu)
    return DONE if fitting else ANSWER_IS_NO


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run(lambda: make_plan(arguments))


if __name__ == "__main__":
    sys.exit(main())

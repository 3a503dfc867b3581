"""The training loop: transformers' Trainer with batches of one length, a loss without logits, whole checkpoints."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_llama_repro.checkpoints import checkpoints, failed_writes_reported, keep_newest, publish
from hf_llama_repro.metrics import add_metrics, begin_metrics

from .encoding import IGNORED, Example
from .guards import Watch
from .processes import backend, divides_weights, gather_trained, let_fsdp_run_on_cpu, uses_fsdp
from .recipe import Recipe

METRICS = "metrics.jsonl"
# Batches are as long as a multiple of this: libraries keep kernels and memory for each shape that they meet.
LENGTH_MULTIPLE = 16
TENSORBOARD = "tensorboard"


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """input_ids and labels (batch, seq), padded on the right to the longest, or a little more.

    No attention mask: a causal model's tokens see nothing to their right, and padding has no label. What is padding is
    told by position and never by a token's id, so that EOS is learnt also where it serves as the padding.
    """
    longest = max(len(example.input_ids) for example in examples)
    length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return {
        "input_ids": torch.tensor([e.input_ids + [0] * (length - len(e.input_ids)) for e in examples]),
        "labels": torch.tensor([e.labels + [IGNORED] * (length - len(e.labels)) for e in examples]),
    }


class BatchesOfOneLength(Sampler[int]):
    """A random order of each epoch, in which the records of an optimizer step are sorted by length.

    Every optimizer step sees the records that it would see without the sorting, and its loss is their mean per token:
    the sum is the same, the micro-batches hold little padding.

    `multiple`: of records that all processes take in one pass. Where an epoch does not divide by it, it ends in the
    record that stands after all others, NOTHING, which counts for nothing; accelerate would fill up with records that
    were in the epoch already.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, *, multiple: int = 1):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.filling = -len(lengths) % multiple
        self.epoch = 0

    def shuffled(self) -> list[int]:
        order = list(range(len(self.lengths)))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        return order

    def __iter__(self) -> Iterator[int]:
        order = self.shuffled()
        for start in range(0, len(order), self.batch_size):
            # Longest first: what does not fit into memory shows at once.
            yield from sorted(order[start : start + self.batch_size], key=lambda index: -self.lengths[index])
        yield from [len(self.lengths)] * self.filling

    def __len__(self) -> int:
        return len(self.lengths) + self.filling


class EpochOfSampler(TrainerCallback):
    """Tells the sampler its epoch, so that a resumed run has the order of an uninterrupted one."""

    def __init__(self, sampler: BatchesOfOneLength):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = int(state.epoch or 0)


def tensorboard(output_dir: Path) -> TrainerCallback:
    """Events in the run's own folder; transformers' choice makes one in the working directory as well."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(output_dir / TENSORBOARD)))


class MetricsFile(TrainerCallback):
    """One JSON object a line; on resuming, lines of steps that are done again are dropped."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            begin_metrics(self.path, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            add_metrics(self.path, {"step": state.global_step, "epoch": state.epoch, **(logs or {})})


# A record of which nothing is learnt.
NOTHING = Example([0], [IGNORED])


def training_arguments(recipe: Recipe, num_processes: int, dtype: torch.dtype, **others: Any) -> TrainingArguments:
    """transformers' arguments for the recipe."""
    return TrainingArguments(
        output_dir=recipe.output_dir,
        per_device_train_batch_size=recipe.micro_batch_size,
        per_device_eval_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.accumulation(num_processes),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        learning_rate=recipe.learning_rate,
        # transformers' "constant" ignores the warm-up.
        lr_scheduler_type="constant_with_warmup" if recipe.lr_schedule == "constant" else recipe.lr_schedule,
        warmup_steps=recipe.warmup_steps or recipe.warmup_ratio,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim=recipe.optimizer,
        seed=recipe.seed,
        # A frozen base is in its dtype already, and adapters are in fp32; full fine-tuning computes under autocast.
        bf16=recipe.method == "full" and dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,  # would show the mean of earlier losses in place of a NaN
        eval_strategy="steps" if recipe.eval_steps and recipe.held_out else "no",
        eval_steps=recipe.eval_steps or None,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        report_to=[name for name in recipe.report_to if name != TENSORBOARD] or "none",
        ddp_backend=backend(),
        remove_unused_columns=False,
        disable_tqdm=True,  # the command shows a bar of its own
        **others,
    )


class FinetuneTrainer(Trainer):
    """transformers' Trainer for `Example` lists.

    `check_saved(folder)` is called with every checkpoint before it gets its name, and raises what is wrong with it.
    """

    def __init__(
        self,
        *,
        recipe: Recipe,
        train: list[Example],
        check_saved: Callable[[Path], None],
        save_beside: Callable[[Path], None],
        **kwargs: Any,
    ):
        self.recipe, self.check_saved, self.save_beside = recipe, check_saved, save_beside
        self.watch = Watch()
        self._aside: Path | None = None
        args = kwargs["args"]
        if uses_fsdp() and args.device.type == "cpu":
            let_fsdp_run_on_cpu(args.mixed_precision)
        use_cache = kwargs["model"].config.use_cache
        super().__init__(data_collator=collate, train_dataset=[*train, NOTHING], **kwargs)
        # Trainer turns it off, and so would the config that is saved; every pass here says it by itself.
        kwargs["model"].config.use_cache = use_cache

    def _get_train_sampler(self, train_dataset: Any = None) -> BatchesOfOneLength:
        lengths = [len(example.input_ids) for example in self.train_dataset][:-1]  # type: ignore[union-attr]
        multiple = self.recipe.micro_batch_size * self.args.world_size if self.args.world_size > 1 else 1
        sampler = BatchesOfOneLength(lengths, self.recipe.batch_size, self.recipe.seed, multiple=multiple)
        self.add_callback(EpochOfSampler(sampler))
        return sampler

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = {**inputs, "use_cache": False, "skip_logits": skips_logits()}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.loss(loss, self.state.global_step, self.last_checkpoint())
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The loss per supervised token over all held-out records, not the mean of batches' means."""
        examples: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        loss = held_out_loss(self.model_wrapped, examples, self.args.per_device_eval_batch_size, self.args.device)
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint of this run."""
        return next(reversed(checkpoints(Path(self.recipe.output_dir))), None)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model, trial):
        output_dir = Path(self.recipe.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._save_aside(output_dir / name, lambda _: super(FinetuneTrainer, self)._save_checkpoint(model, trial))
        if self.args.should_save:
            keep_newest(output_dir, self.recipe.save_total_limit)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; of an adapter that FSDP divided, without gathering the frozen base as well."""
        if not (uses_fsdp() and self.recipe.method == "lora"):
            super().save_model(output_dir, _internal_call)
            return
        model: Any = self.model
        trained = gather_trained(model)
        if self.args.should_save:
            model.save_pretrained(str(output_dir), state_dict=trained)

    def save_final(self, target: Path) -> None:
        """Writes what was trained, without the state of the run."""
        self._save_aside(target, lambda partial: self.save_model(str(partial)))

    def _save_aside(self, target: Path, save: Callable[[Path], None]) -> None:
        aside = self._aside = Path(self.recipe.output_dir) / ".partial"
        partial = aside / target.name
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with failed_writes_reported(target, Path(self.recipe.output_dir)):
                save(partial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self.save_beside(partial)
                self.check_saved(partial)
                if self.args.should_save:
                    publish(partial, target)
        finally:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
            self._aside = None
            self.accelerator.wait_for_everyone()


def skips_logits() -> bool:
    """Whether the loss is taken without all logits in memory, by the output matrix on some rows after others.

    Not where the model is divided: the processes put the matrix together for each time that it is applied, and those
    with more supervised tokens would wait for the others for ever.
    """
    return not divides_weights()


@torch.no_grad()
def held_out_loss(model: Any, examples: list[Example], rows: int, device: torch.device) -> float:
    """Mean cross-entropy per supervised token; NaN where there are no records.

    Several processes divide the records among them, and each gets the mean over all.
    """
    several = dist.is_initialized()
    processes, index = (dist.get_world_size(), dist.get_rank()) if several else (1, 0)
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    batches = [ordered[start : start + rows] for start in range(0, len(ordered), rows)]
    # All make as many passes: for each, a model that is divided is put together by all.
    batches += [[NOTHING]] * (-len(batches) % processes)
    for examples_of_one in batches[index::processes]:
        batch = {name: tensor.to(device) for name, tensor in collate(examples_of_one).items()}
        total += model(**batch, use_cache=False, skip_logits=skips_logits(), num_items_in_batch=1).loss.item()
        count += int((batch["labels"][:, 1:] != IGNORED).sum())
    model.train(was_training)
    if several:
        sums: list[tuple[float, int]] = [(0.0, 0)] * processes
        dist.all_gather_object(sums, (total, count))
        total, count = sum(one for one, _ in sums), sum(one for _, one in sums)
    return total / count if count else float("nan")

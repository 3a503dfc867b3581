"""The training loop: transformers' Trainer with batches of one length, a loss without logits, whole checkpoints."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_llama_repro.checkpoints import checkpoints, keep_newest, publish
from hf_llama_repro.errors import failed_write
from hf_llama_repro.metrics import add_metrics, begin_metrics

from .encoding import IGNORED, Example
from .guards import TrainingStoppedError, Watch
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
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
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

    def __len__(self) -> int:
        return len(self.lengths)


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
        lr_scheduler_type=recipe.lr_schedule,
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
        remove_unused_columns=False,
        disable_tqdm=True,  # the command shows a bar of its own
        **others,
    )


class FinetuneTrainer(Trainer):
    """transformers' Trainer for `Example` lists.

    `check_saved(folder)` is called with every checkpoint before it gets its name, and raises what is wrong with it.
    """

    def __init__(
        self, *, recipe: Recipe, check_saved: Callable[[Path], None], save_beside: Callable[[Path], None], **kwargs: Any
    ):
        self.recipe, self.check_saved, self.save_beside = recipe, check_saved, save_beside
        self.watch = Watch()
        self._aside: Path | None = None
        super().__init__(data_collator=collate, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> BatchesOfOneLength:
        lengths = [len(example.input_ids) for example in self.train_dataset]  # type: ignore[union-attr]
        sampler = BatchesOfOneLength(lengths, self.recipe.batch_size, self.recipe.seed)
        self.add_callback(EpochOfSampler(sampler))
        return sampler

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {**inputs, "use_cache": False, "skip_logits": True}, *args, **kwargs)

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
            save(partial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.save_beside(partial)
            self.check_saved(partial)
            if self.args.should_save:
                publish(partial, target)
        except Exception as error:
            if (reason := failed_write(error)) is None:
                raise
            raise TrainingStoppedError(
                f"{target} could not be written ({reason}); the last good checkpoint is {self.last_checkpoint()}: "
                "make room, and go on with --resume"
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
            self._aside = None
            self.accelerator.wait_for_everyone()


@torch.no_grad()
def held_out_loss(model: Any, examples: list[Example], rows: int, device: torch.device) -> float:
    """Mean cross-entropy per supervised token; NaN where there are no records."""
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    for start in range(0, len(ordered), rows):
        batch = {name: tensor.to(device) for name, tensor in collate(ordered[start : start + rows]).items()}
        total += model(**batch, use_cache=False, skip_logits=True, num_items_in_batch=1).loss.double().cpu()
        count += int((batch["labels"][:, 1:] != IGNORED).sum())
    model.train(was_training)
    return float(total) / count if count else float("nan")

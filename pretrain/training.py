"""The training loop: optimizer steps by the papers' recipe on accelerate, watched, saved whole, resumed to the bit."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from hf_llama_repro import LlamaReproForCausalLM
from hf_llama_repro.checkpoints import checkpoints, failed_writes_reported, keep_newest, publish, step_of
from hf_llama_repro.errors import InputError, TrainingStoppedError
from hf_llama_repro.metrics import add_metrics, begin_metrics
from hf_llama_repro.versions import checkpoint_activations

from .held_out import bits_per_byte, next_token_loss, together
from .mixture import Mixture
from .plan import flops_per_token, learning_rate_at, model_config, peak_flops
from .prepared import Prepared
from .recipe import Recipe
from .tokenizer import load_processor, save_tokenizer

METRICS = "metrics.jsonl"
STATE = "run.json"
TENSORBOARD = "tensorboard"


def choose_dtype(recipe: Recipe) -> torch.dtype:
    """In which products are computed: the recipe's, or bfloat16 where the device multiplies in it."""
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def make_accelerator(recipe: Recipe) -> Accelerator:
    """accelerate's view of the processes, the device, the dtype and the sharding."""
    on_cpu = not torch.cuda.is_available()
    plugin = None
    if recipe.sharding == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=LlamaReproForCausalLM._no_split_modules,
            reshard_after_forward=True,
        )
    precision = "bf16" if choose_dtype(recipe) == torch.bfloat16 else "no"
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, fsdp_plugin=plugin)
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate shards on cards only; PyTorch does it on any device, so that a run can be tried without cards.
        accelerator.state.fsdp_plugin = plugin
        for state in (PartialState, AcceleratorState):  # the second takes over what the first says, again and again
            state._shared_state["distributed_type"] = DistributedType.FSDP
        if precision != "no":
            plugin.set_mixed_precision(precision)
    elif plugin is not None and accelerator.distributed_type != DistributedType.FSDP:
        raise InputError(
            "sharding=fsdp2 needs several processes: start them by `accelerate launch` (on a CPU: `torchrun "
            "--nproc_per_node N -m pretrain.train ...`), or set sharding to none"
        )
    return accelerator


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with decay, the vectors of the norms without."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


class Run:
    """A run: the model, its optimizer, its place in the data, and what it writes."""

    def __init__(self, recipe: Recipe, prepared: Prepared, accelerator: Accelerator):
        self.recipe, self.accelerator = recipe, accelerator
        self.output_dir = Path(recipe.output_dir)
        self.accumulation = recipe.accumulation(accelerator.num_processes)
        self.config = model_config(recipe, len(load_processor(recipe)))
        self.mixture = Mixture(recipe, prepared.train)
        self.held_out = prepared.held_out
        self.data = prepared.identity()
        self.step = 0
        torch.manual_seed(recipe.seed)
        model = LlamaReproForCausalLM(self.config)
        if recipe.gradient_checkpointing:
            checkpoint_activations(model, use_reentrant=False)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, recipe.weight_decay),
            lr=recipe.learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.adam_eps,
            fused=True,
        )
        if recipe.compile:
            model.compile()
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.flops = flops_per_token(self.config, recipe.context_length)
        self.peak = peak_flops(accelerator.device, choose_dtype(recipe)) * accelerator.num_processes
        self.writer: Any = None

    @contextmanager
    def sums_in_order(self) -> Iterator[None]:
        """While a run is compiled for a CPU: threads would add to the embedding's gradients as they come, which gives
        other last bits each time."""
        if not self.recipe.compile or self.accelerator.device.type != "cpu":
            yield
            return
        how: Any = torch.utils.deterministic
        before = torch.are_deterministic_algorithms_enabled()
        warned, filled = torch.is_deterministic_algorithms_warn_only_enabled(), how.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True, warn_only=True)
        how.fill_uninitialized_memory = False  # it is for finding errors, and costs time
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warned)
            how.fill_uninitialized_memory = filled

    def next_rows(self) -> np.ndarray:
        """This process's rows of the next step, (rows, context_length + 1): every step is the same for any number."""
        rank, size = self.accelerator.process_index, self.recipe.micro_batch_size
        every = size * self.accelerator.num_processes
        mine = {row for row in range(self.recipe.num_rows) if rank * size <= row % every < (rank + 1) * size}
        return self.mixture.next_rows(self.recipe.num_rows, mine)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step: its loss (mean per token over all processes), gradient norm and learning rate.

        Raises `TrainingStoppedError` before the step is taken where the loss or the gradients are not finite.
        """
        rows = self.next_rows()
        self.step += 1
        losses = []
        for number, part in enumerate(np.split(rows, self.accumulation)):
            tokens = torch.from_numpy(part).to(self.accelerator.device)
            # Gradients are exchanged once for a step, with its last part.
            if number + 1 < self.accumulation:
                with self.accelerator.no_sync(self.model):
                    losses.append(self._backward(tokens))
            else:
                losses.append(self._backward(tokens))
        loss = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._stop(rows, [value.item() for value in losses], loss, norm)
        rate = learning_rate_at(self.step, self.recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss, "grad_norm": norm, "learning_rate": rate}

    def _backward(self, tokens: torch.Tensor) -> torch.Tensor:
        loss = next_token_loss(self.model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        self.accelerator.backward(loss / self.accumulation)
        return loss.detach()

    def _stop(self, rows: np.ndarray, losses: list[float], loss: float, norm: float) -> None:
        """Writes the step's rows for inspection, and ends the run."""
        path = self.output_dir / f"stopped-step-{self.step}-process-{self.accelerator.process_index}.json"
        processor = load_processor(self.recipe)
        content = {
            "step": self.step,
            "loss": str(loss),
            "grad_norm": str(norm),
            "losses_of_parts": [str(value) for value in losses],
            "rows_of_a_part": self.recipe.micro_batch_size,
            "rows": rows.tolist(),
            "texts": [processor.decode(row) for row in rows.tolist()],
        }
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        good = next(reversed(checkpoints(self.output_dir)), None)
        raise TrainingStoppedError(
            f"step {self.step} gives the loss {loss} and the gradient norm {norm}: it was not taken, and its batch "
            f"is in {path}; lower learning_rate, or lengthen warmup_steps; the last good checkpoint is {good or 'none'}"
        )

    def train(self, tell: Callable[[dict[str, Any]], None]) -> None:
        """Trains to the end; `tell` is given every line of metrics that is written."""
        recipe, begin, steps = self.recipe, time.perf_counter(), 0
        if self.accelerator.is_main_process:
            begin_metrics(self.output_dir / METRICS, self.step)
            self.writer = _summary_writer(self.output_dir / TENSORBOARD, self.step)
        if recipe.eval_steps and self.step == 0:
            self.evaluate(recipe.eval_tokens, tell)
            begin = time.perf_counter()
        while self.step < recipe.num_steps:
            measured, steps = self.train_step(), steps + 1
            is_last = self.step == recipe.num_steps
            if self.step % recipe.logging_steps == 0 or is_last:
                speed = steps * recipe.batch_tokens / (time.perf_counter() - begin)
                self._log({**measured, **self._speed(speed)}, tell)
                begin, steps = time.perf_counter(), 0
            waited = time.perf_counter()
            if recipe.eval_steps and self.step % recipe.eval_steps == 0 and not is_last:
                self.evaluate(recipe.eval_tokens, tell)
            if self.step % recipe.save_steps == 0 and not is_last:
                self.save()
            begin += time.perf_counter() - waited  # the speed is that of training
        self.save()

    def _speed(self, tokens_per_second: float) -> dict[str, Any]:
        mfu = self.flops * tokens_per_second / self.peak
        return {"tokens_per_second": tokens_per_second, "mfu": mfu if math.isfinite(mfu) else None}

    def evaluate(self, most_tokens: int, tell: Callable[[dict[str, Any]], None]) -> dict[str, tuple[float, int]]:
        """Bits per byte of about so many held-out tokens, into the metrics."""
        found = bits_per_byte(self.model, self.accelerator, self.held_out, self.recipe, most_tokens)
        if found:
            rates = {f"bits_per_byte/{name}": rate for name, (rate, _) in found.items()}
            self._log({"bits_per_byte": together(found), **rates}, tell)
        return found

    def _log(self, values: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
        if not self.accelerator.is_main_process:
            return
        epochs = {f"epochs/{name}": round(value, 4) for name, value in self.mixture.epochs().items()}
        line = {"step": self.step, "tokens": self.step * self.recipe.batch_tokens, **values, **epochs}
        add_metrics(self.output_dir / METRICS, line)
        if self.writer is not None:
            for name, value in {**values, **epochs}.items():
                if value is not None:
                    self.writer.add_scalar(name, value, self.step)
            self.writer.flush()
        tell(line)

    def save(self) -> None:
        """A checkpoint of everything that a continuation needs, whole or not there."""
        target = self.output_dir / f"checkpoint-{self.step}"
        if target.exists():
            return
        aside = self.output_dir / ".partial"
        partial = aside / target.name
        is_main = self.accelerator.is_main_process
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            with failed_writes_reported(target, self.output_dir):
                self.accelerator.save_state(str(partial))
                self.accelerator.wait_for_everyone()
                if is_main:
                    content = {"step": self.step, **self.data, "mixture": self.mixture.state_dict()}
                    (partial / STATE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
                    publish(partial, target)
                    keep_newest(self.output_dir, self.recipe.save_total_limit)
        finally:
            if is_main:
                shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def resume(self, checkpoint: Path, say: Callable[..., None] = lambda *_: None) -> None:
        """Goes back to where the checkpoint was saved. Raises `InputError` where the data is not what it was."""
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        before, now = state.get("sha256", {}), self.data["sha256"]
        unknown = [name for name, sha256 in now.items() if sha256 is None or before.get(name) is None]
        if unknown:
            say(f"note        {checkpoint} has no checksums of {', '.join(unknown)}: only sizes are compared")
        differing = [name for name, sizes in self.data["data"].items() if state["data"].get(name) != sizes]
        differing += [name for name in now if name not in (*unknown, *differing) and now[name] != before[name]]
        if differing:
            raise InputError(
                f"{checkpoint} was trained on other data: documents, tokens or bytes of {', '.join(differing)} differ; "
                "bring the files back, or begin anew in another output_dir"
            )
        self.accelerator.load_state(str(checkpoint))
        self.step = step_of(checkpoint)
        self.mixture.load_state_dict(state["mixture"])

    def save_model(self, target: Path) -> None:
        """The model as a folder that `from_pretrained` opens."""
        state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            partial = self.output_dir / ".partial-model"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                with failed_writes_reported(target, self.output_dir):
                    self.accelerator.unwrap_model(self.model).save_pretrained(partial, state_dict=state)
                    save_tokenizer(self.recipe, partial)
                    publish(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)

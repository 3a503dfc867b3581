"""What a person sees of a run: a bar or lines while it goes on, and the curve of its loss at the end."""

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

# Lines of a run whose output is not a terminal.
LINES = 20


class Progress(TrainerCallback):
    """A bar of optimizer steps on a terminal, some LINES lines elsewhere; nothing from other processes."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="steps",
            disable=None if state.is_world_process_zero else True,
            dynamic_ncols=True,
        )
        self.quiet = not state.is_world_process_zero or sys.stderr.isatty()

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}) or not hasattr(self, "bar"):
            return
        self.bar.set_postfix(loss=f"{logs['loss']:.4f}", lr=f"{logs['learning_rate']:.1e}")
        every = max(1, state.max_steps // LINES)
        if not self.quiet and (state.global_step % every == 0 or state.global_step in (1, state.max_steps)):
            print(
                f"step        {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f}, "
                f"learning rate {logs['learning_rate']:.2e}",
                flush=True,
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def draw_losses(metrics: list[dict[str, Any]], path: Path) -> Path:
    """The picture of the losses against optimizer steps, in `path`. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="optimizer step", ylabel="cross-entropy per supervised token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path

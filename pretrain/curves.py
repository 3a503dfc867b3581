"""The picture of a run: loss, bits per byte, learning rate, gradient norm and speed against tokens."""

from pathlib import Path
from typing import Any

# Key of the metrics, label, logarithmic.
PANELS = (
    ("loss", "training loss, nats per token", False),
    ("bits_per_byte", "held out, bits per byte", False),
    ("learning_rate", "learning rate", False),
    ("grad_norm", "gradient norm", True),
    ("tokens_per_second", "tokens per second", False),
    ("mfu", "model FLOPs utilisation", False),
)


def draw(metrics: list[dict[str, Any]], path: Path, levels: dict[str, float] | None = None) -> Path:
    """Writes the picture. `levels` are lines beside the bits per byte: name -> value. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for (key, label, logarithmic), panel in zip(PANELS, axes.flat, strict=True):
        points = [(line["tokens"] / 1e6, line[key]) for line in metrics if line.get(key) is not None]
        if points:
            panel.plot(*zip(*points, strict=True), "o-" if key == "bits_per_byte" else "-", linewidth=1, markersize=3)
        if key == "bits_per_byte":
            for number, (name, value) in enumerate((levels or {}).items()):
                panel.axhline(value, color=f"C{number + 1}", linestyle="--", label=name)
            if levels:
                panel.legend()
        panel.set(xlabel="tokens, millions", ylabel=label, yscale="log" if logarithmic and points else "linear")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path

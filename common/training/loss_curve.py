"""The loss curve as a picture: training and validation loss over steps, and the learning rate below them."""

import math
from typing import IO

TRAIN, VALIDATION, RATE, DELIVERED = "#2563eb", "#dc2626", "#0f766e", "#111827"
WIDTH, HEIGHT = 960, 600  # pixels


def draw_loss_curve(rows: list[dict], file: IO[bytes], delivered: int | None = None) -> None:
    """Write the curve of a training log's rows as a PNG; mark the step that is ``delivered`` with its loss."""
    from matplotlib.figure import Figure  # takes half a second, and only a picture needs it
    from matplotlib.ticker import MaxNLocator

    train = [row for row in rows if row["kind"] == "train" and math.isfinite(row["loss"])]
    validation = [(row["step"], row["loss"]) for row in rows if row["kind"] == "validation"]
    figure = Figure((WIDTH / 100, HEIGHT / 100), dpi=100, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(7, 2))
    steps, losses = [row["step"] for row in train], [row["loss"] for row in train]
    upper.plot(steps, losses, color=TRAIN, alpha=0.3, linewidth=1)
    if train:
        smooth = _smoothed(losses)
        upper.plot(steps, smooth, color=TRAIN, linewidth=2, label=f"training {smooth[-1]:.3f} (running mean)")
    if validation:
        label = f"validation {validation[-1][1]:.3f}"
        upper.plot(*zip(*validation, strict=True), color=VALIDATION, linewidth=2, marker="o", label=label)
    loss = dict(validation).get(delivered, dict(zip(steps, losses, strict=True)).get(delivered))
    if loss is not None:
        upper.axvline(delivered, color=DELIVERED, linewidth=1, linestyle=":")
        label = f"delivered: step {delivered}, loss {loss:.3f}"
        upper.plot([delivered], [loss], "o", color=DELIVERED, fillstyle="none", markersize=11, label=label)
    lower.plot(steps, [row.get("learning_rate", math.nan) for row in train], color=RATE, linewidth=2)
    upper.set_ylabel("loss per response token")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    lower.set_ylim(bottom=0)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    if upper.get_legend_handles_labels()[0]:
        upper.legend(frameon=False)
    figure.savefig(file, format="png")


def _smoothed(values: list[float]) -> list[float]:
    """Return a running mean whose memory is a twentieth of the run, so that noise does not hide the trend."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    smooth, weight, result = 0.0, 0.0, []
    for value in values:
        smooth, weight = keep * smooth + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(smooth / weight)
    return result

"""The picture of a run: training and validation loss over steps."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from arbs_jax.errors import CheckpointError
from arbs_jax.run.files import temporary_for

_TRAIN, _VALIDATION, _UNIGRAM, _INK = "#3b76af", "#d1541f", "#6b6b6b", "#333333"


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values), both (n,) float64, of the rows in which `name` is a finite number."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    array = array[np.isfinite(array[:, 1])]
    return array[:, 0], array[:, 1]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average, (n,) to (n,).

    At the start the window shrinks evenly on both sides, since the loss falls fast there and a lopsided mean would be
    off; at the end only the missing right half is left out, so that the last value is still a mean of many.

    Args:
      window: points in the average, rounded up to an odd number; 1 returns the values.
    """
    index = np.arange(len(values))
    reach = np.minimum(window // 2, index)
    first, last = index - reach, np.minimum(index + reach + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (total[last] - total[first]) / (last - first)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, color=_INK, pad=12)
    axes.set_xlabel("step", fontsize=11, color=_INK)
    axes.set_ylabel("loss (nats per byte)", fontsize=11, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(labelsize=10, colors=_INK, length=3)
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b0b0b0")


def _draw_curves(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """Draw both losses; return the value arrays that the axis should show."""
    steps, values = _series(rows, "train_loss")
    shown = []
    if len(values):
        smoothed = smooth(values, max(1, len(values) // 40))
        axes.plot(steps, values, color=_TRAIN, linewidth=0.7, alpha=0.3)
        axes.plot(steps, smoothed, color=_TRAIN, linewidth=1.8, label=f"training, smoothed: {smoothed[-1]:.3f}")
        # Single spikes may leave the picture; the bulk of the curve may not.
        shown += [smoothed, np.percentile(values, [0.5, 99.5])]
    steps, values = _series(rows, "val_loss")
    if len(values):
        best = int(np.argmin(values))
        style = "-o" if len(values) <= 40 else "-"
        axes.plot(
            steps, values, style, color=_VALIDATION, linewidth=2.0, markersize=4, label=f"validation: {values[-1]:.3f}"
        )
        label = f"best validation: {values[best]:.3f} at step {steps[best]:,.0f}"
        axes.scatter(
            steps[best],
            values[best],
            s=60,
            facecolor="white",
            edgecolor=_VALIDATION,
            linewidth=1.8,
            label=label,
            zorder=4,
        )
        shown.append(values)
    return shown


def loss_figure(rows: Sequence[Mapping[str, Any]], unigram_entropy: float | None, title: str) -> Figure:
    """A figure of `train_loss` (thin, and smoothed on top) and `val_loss` over `step`, in nats per byte.

    Args:
      rows: as `read_metrics` returns them; a row may lack either loss or have None for it.
      unigram_entropy: nats per byte of the best model without context, drawn as a dashed line; None draws none.
    """
    figure = Figure(figsize=(9, 5.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _style(axes, title)
    shown = _draw_curves(axes, rows)
    if not shown:
        axes.text(0.5, 0.5, "no losses yet", transform=axes.transAxes, ha="center", color=_UNIGRAM, fontsize=12)
    if unigram_entropy is not None:
        label = f"unigram entropy: {unigram_entropy:.3f}"
        axes.axhline(unigram_entropy, color=_UNIGRAM, linewidth=1.3, linestyle=(0, (6, 4)), label=label)
        shown.append(np.array([unigram_entropy]))
    if shown:
        values = np.concatenate(shown)
        margin = max(0.06 * float(values.max() - values.min()), 0.02)
        axes.set_ylim(float(values.min()) - margin, float(values.max()) + margin)
        axes.margins(x=0.02)
        # Below the axes: no corner is free of curves in every run.
        figure.legend(
            loc="outside lower center", ncols=2, fontsize=9.5, frameon=False, labelcolor=_INK, columnspacing=1.4
        )
    return figure


def plot_loss(
    rows: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    unigram_entropy: float | None,
    title: str,
) -> None:
    """Draw `loss_figure` into a PNG file, which is replaced in one rename.

    Raises:
      CheckpointError: the file cannot be written; the old picture is still there.
    """
    path = Path(path)
    figure = loss_figure(rows, unigram_entropy, title)
    temporary = temporary_for(path)
    try:
        try:
            figure.savefig(temporary, format="png")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the loss plot {path}: {error}") from error

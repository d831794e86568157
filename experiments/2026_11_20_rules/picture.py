"""The headline picture: validation loss, relative to quantisation-aware training, against bits of state per weight."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_MARKERS = "osD^v"


def draw(rows: list[dict], path: Path) -> None:
    """Writes the picture of `results.json`'s rows: one point a rule and corpus, the mean over seeds."""
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    corpora = sorted({row["corpus"] for row in rows})
    for corpus, marker in zip(corpora, _MARKERS, strict=False):
        for kind, colour in (("integer", "#1f6fb4"), ("float", "#8a8a8a")):
            points = _points(
                [r for r in rows if r["corpus"] == corpus and (r["bits_per_weight"] > 90) == (kind == "float")]
            )
            if points:
                bits, relative, _ = zip(*points, strict=True)
                axes.plot(
                    bits, relative, marker, color=colour, ms=7, alpha=0.85,
                    label=f"{corpus}, {kind} state", ls="none",
                )  # fmt: skip
    for rule in {row["rule"] for row in rows}:
        for bits, relative, _ in _points([row for row in rows if row["rule"] == rule]):
            axes.annotate(
                rule,
                (bits, relative),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color="#333333",
            )
    axes.axhline(0, color="#444444", lw=0.8, ls="--")
    axes.set_xscale("log", base=2)
    ticks = [4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yscale("symlog", linthresh=10)
    axes.set_yticks([-5, 0, 5, 10, 25, 50, 100, 200], ["-5%", "0", "+5%", "+10%", "+25%", "+50%", "+100%", "+200%"])
    axes.set_xlim(3.3, 150)
    axes.set_ylim(-6, 300)
    axes.set_xlabel("persistent training state, bits per weight (all leaves counted)")
    axes.set_ylabel("validation loss against QAT-AdamW")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _points(rows: list[dict]) -> list[tuple[float, float, str]]:
    """(bits, mean relative loss in percent, rule) of each rule and corpus."""
    keys = sorted({(row["rule"], row["corpus"], row["bits_per_weight"]) for row in rows})
    return [
        (
            bits,
            100 * float(np.mean([r["relative_to_qat"] for r in rows if (r["rule"], r["corpus"]) == (rule, corpus)])),
            rule,
        )
        for rule, corpus, bits in keys
    ]

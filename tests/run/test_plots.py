"""The picture shows what the rows say, and never half of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import arbs_jax
from arbs_jax.errors import CheckpointError
from arbs_jax.run.plots import loss_figure, plot_loss, smooth

ROWS = [
    {"step": step, "train_loss": 5.0 / step, **({"val_loss": 6.0 / step} if step % 10 == 0 else {})}
    for step in range(1, 101)
]


def labels(figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_smooth_keeps_constants_and_lines():
    np.testing.assert_array_equal(smooth(np.full(9, 2.0), 5), np.full(9, 2.0))
    line = np.arange(20.0)
    np.testing.assert_array_equal(smooth(line, 5)[:-2], line[:-2])  # centred: no lag, not even at the start
    np.testing.assert_array_equal(smooth(line, 5)[-2:], [17.5, 18.0])  # means of 16..19 and of 17..19
    np.testing.assert_array_equal(smooth(line, 1), line)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_smooth_of_short_series(count):
    values = np.arange(count, dtype=np.float64)
    assert smooth(values, 101).shape == (count,)
    assert np.isfinite(smooth(values, 101)).all()


def test_smooth_equals_the_plain_mean():
    values = np.random.default_rng(0).integers(0, 100, 50).astype(np.float64)  # integers: sums are exact
    smoothed = smooth(values, 7)
    for index in range(3, 47):
        assert smoothed[index] == values[index - 3 : index + 4].mean()


def test_the_figure_shows_the_rows():
    figure = loss_figure(ROWS, 3.261, "a title")
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "a title"
    assert axes.get_xlabel() == "step"
    assert axes.get_ylabel() == "loss (nats per byte)"
    train, smoothed, validation, unigram = axes.lines
    np.testing.assert_array_equal(train.get_xdata(), np.arange(1, 101))
    np.testing.assert_array_equal(train.get_ydata(), [5.0 / step for step in range(1, 101)])
    assert train.get_linewidth() < smoothed.get_linewidth()
    np.testing.assert_array_equal(validation.get_xdata(), np.arange(10, 101, 10))
    assert list(unigram.get_ydata()) == [3.261, 3.261]
    assert unigram.is_dashed()
    low, high = axes.get_ylim()
    assert low < 0.05
    assert high > 3.261
    assert labels(figure) == [
        "training, smoothed: 0.050",
        "validation: 0.060",
        "best validation: 0.060 at step 100",
        "unigram entropy: 3.261",
    ]


def test_values_that_are_missing_or_not_finite_are_skipped():
    rows = [
        {"step": 1, "train_loss": 2.0},
        {"step": 2, "train_loss": None},
        {"step": 3, "train_loss": float("nan"), "val_loss": float("inf")},
        {"step": 4, "train_loss": 1.0},
    ]
    figure = loss_figure(rows, None, "")
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), [1, 4])
    assert labels(figure) == ["training, smoothed: 1.000"]


def test_one_spike_does_not_flatten_the_curve():
    rows = [{"step": step, "train_loss": 2.0} for step in range(2000)]
    rows[700]["train_loss"] = 1000.0
    assert loss_figure(rows, 3.0, "").axes[0].get_ylim()[1] < 50


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS[:2], ROWS, [{"step": 5, "val_loss": 1.0}]])
@pytest.mark.parametrize("entropy", [None, 3.2])
def test_every_amount_of_rows_gives_a_picture(tmp_path, rows, entropy):
    plot_loss(rows, tmp_path / "loss.png", entropy, "title")
    picture = imread(tmp_path / "loss.png")
    assert picture.shape == (676, 1170, 4)
    assert picture[..., :3].min() < 0.5  # something was drawn
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    plot_loss(ROWS, path, 3.2, "first")
    before = path.read_bytes()

    def broken(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", broken)
        with pytest.raises(CheckpointError, match=r"cannot write the loss plot .*disk full"):
            plot_loss(ROWS, path, 3.2, "second")
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]
    plot_loss(ROWS[:50], path, 3.2, "third")
    assert path.read_bytes() != before


def test_a_missing_folder_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write the loss plot"):
        plot_loss(ROWS, tmp_path / "none" / "loss.png", 3.2, "")


def test_pyplot_stays_out():
    """Pyplot keeps global state and picks a window system."""
    code = "import sys, arbs_jax.run.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    root = Path(arbs_jax.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60, cwd=root).returncode == 0

"""What a person sees in the terminal: progress, tables, headings."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from arbs_jax.audit import Audit
from arbs_jax.training.loop import Progress as RunProgress
from arbs_jax.training.loop import bytes_per_second
from arbs_jax.training.program import Program

# Neither markup nor emoji codes: file names, messages and samples may hold brackets and colons of their own.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    """A table whose first column is left-aligned and whose other columns hold numbers."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def megabytes(count: float) -> str:
    """Bytes as MB with a sensible number of digits."""
    return f"{count / 1e6:,.2f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def audit_table(account: Audit, title: str) -> Table:
    """The account of persistent state as a table."""
    rows: list[tuple[str, str]] = [
        ("logical ternary weights", f"{account.logical_ternary_weights:,}"),
        *((f"  {name}", f"{count:,}") for name, count in account.weights_by_part.items()),
        ("persistent state", megabytes(account.state_bytes)),
        *((f"  {name}", megabytes(count)) for name, count in account.bytes_by_leaf.items()),
        ("bits per weight", f"{account.bits_per_weight:.3f}"),
        ("float parameters", f"{account.float_params:,}"),
        ("floats in buffers", f"{account.float_buffers:,}"),
    ]
    return table(title, ("", "value"), rows)


def loss_text(loss: float | None, digits: int = 3) -> str:
    """A loss, or a dash where there is none (or none that is finite)."""
    return "-" if loss is None else f"{loss:.{digits}f}"


def health_text(health: dict[str, float]) -> str:
    """The rule's own report, for the end of a line."""
    if not health:
        return ""
    return (
        f"  flips {health['flip_rate']:.2%} a step, zeros {health['zero_share']:.0%}, "
        f"saturated {health['saturation']:.0%}, scales moved {health['scale_drift']:.2f} octaves"
    )


class Bar:
    """Progress bar of a training run; a `Watcher`."""

    def __init__(self, program: Program, start: int, until: int):
        self._program, self._start = program, start
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[losses]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=until, completed=start, losses="", speed="")
        self._recent: float | None = None
        self._began = time.perf_counter()

    def __enter__(self) -> "Bar":
        self._bar.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def stepped(self, progress: RunProgress) -> None:
        """Moves the bar; the loss shown is smoothed over some twenty steps."""
        loss = progress.pending[-1]
        self._recent = loss if self._recent is None else 0.95 * self._recent + 0.05 * loss
        self._show(progress)

    def evaluated(self, progress: RunProgress) -> None:
        """Prints a line, which stays when the bar has gone."""
        speed = bytes_per_second(self._program, progress.step - self._start, self._began)
        console.print(
            f"step {progress.step:>6}  train {loss_text(progress.train_loss)}  "
            f"val {loss_text(progress.validation)} nats/byte  {speed:,.0f} bytes/s{health_text(progress.health)}"
        )
        sys.stdout.flush()
        self._show(progress)

    def _show(self, progress: RunProgress) -> None:
        speed = bytes_per_second(self._program, progress.step - self._start, self._began)
        losses = f"loss {self._recent:.3f}" if self._recent is not None else ""
        if progress.validation is not None:
            losses += f" val {progress.validation:.3f}"
        self._bar.update(self._task, completed=progress.step, losses=losses, speed=f"{speed:,.0f} bytes/s")

"""The training loop: steps, looks, checkpoints, and a clean end whatever happens."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from arbs_jax.data import BatchIterator, ValidationBatch
from arbs_jax.errors import CheckpointError, UserError
from arbs_jax.run.checkpoints import Checkpointer
from arbs_jax.run.metrics import MetricsWriter
from arbs_jax.signals import handled
from arbs_jax.training.program import Program
from arbs_jax.training.step import TrainState

WATCHED = ("flip_rate", "zero_share", "saturation", "scale_drift")
"""Metrics that show a run going wrong before its loss does (`arbs_jax.rules.base.shares`)."""


class TrainingHalted(UserError):
    """The loss was not finite; the state is as it was before that step."""


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    """Updates taken."""
    best: float | None = None
    """Lowest validation loss so far, nats per byte."""
    validation: float | None = None
    """Last validation loss; None where it was not finite."""
    train_loss: float | None = None
    """Mean training loss of the last logged steps."""
    pending: list[float] = field(default_factory=list)
    """Losses since the last row of metrics."""
    health: dict[str, float] = field(default_factory=dict)
    """`WATCHED` metrics of the last logged step; not saved."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "best": self.best,
            "validation": self.validation,
            "train_loss": self.train_loss,
            "pending": list(self.pending),
        }

    @classmethod
    def from_json(cls, step: int, saved: dict[str, Any]) -> "Progress":
        """What `to_json` gave."""
        return cls(step=step, **saved)


class Watcher(Protocol):
    """Sees the run go by, for people."""

    def stepped(self, progress: Progress) -> None:
        """A step's loss is known."""
        ...

    def evaluated(self, progress: Progress) -> None:
        """A validation loss is known."""
        ...


@dataclass
class Trainer:
    """One run in motion."""

    program: Program
    step_function: Callable[[TrainState, np.ndarray], tuple[TrainState, dict[str, jax.Array]]]
    """The compiled step."""
    state: TrainState
    batches: BatchIterator
    validation: list[ValidationBatch]
    writer: MetricsWriter
    checkpointer: Checkpointer | None
    """None saves nothing."""
    watcher: Watcher
    progress: Progress
    saved: int | None = None
    """Step that was saved last."""
    _last: dict[str, jax.Array] = field(default_factory=dict)
    """Metrics of the last step whose loss is known."""

    def run(self, until: int) -> str | None:
        """Trains up to step `until`; returns the name of the signal that ended it early, or None.

        On a signal the current step is finished and the state saved. Stopping early, by `until` or by a signal, leaves
        no trace in what a resumed run computes or logs. Losses are fetched one step late, so that the device never
        waits for the host.

        Raises:
            TrainingHalted: a loss was not finite; what was saved last is whole, and so is the state in memory.
            CheckpointError: a checkpoint or a row of metrics could not be written; earlier checkpoints are whole.
        """
        config = self.program.config
        log, end = config.log, config.train.steps
        with _stop_signals() as stopped:
            in_flight: dict[str, jax.Array] | None = None
            while self.progress.step < until and not stopped:
                self.state, metrics = self.step_function(self.state, next(self.batches))
                if in_flight is not None:
                    self._absorb(in_flight)
                in_flight = metrics
                self.progress.step += 1
                step = self.progress.step
                looks = [step % interval == 0 for interval in (log.log_interval, log.eval_interval, log.save_interval)]
                if any(looks) or step == end:
                    self._absorb(in_flight)
                    in_flight = None
                    self._look(*looks, last=step == end)
            if in_flight is not None:
                self._absorb(in_flight)
            if self.progress.step < end and self.saved != self.progress.step:
                self.save("latest")
            return stopped[0] if stopped and self.progress.step < until else None

    def save(self, *tags: str) -> None:
        """Starts saving the state under these tags."""
        if self.checkpointer is None:
            return
        metadata = {"progress": self.progress.to_json(), "data": self.batches.get_state()}
        self.checkpointer.save(self.progress.step, self.state.persistent(), metadata, tags=tags)
        self.saved = self.progress.step

    def _absorb(self, metrics: dict[str, jax.Array]) -> None:
        loss = float(metrics["loss"])
        if int(metrics["halted"]):
            raise TrainingHalted(self._halt_message(loss))
        self.progress.pending.append(loss)
        self._last = metrics
        self.watcher.stepped(self.progress)

    def _halt_message(self, loss: float) -> str:
        # The device's own counter stopped before the bad step; the host's may have run one ahead of it.
        bad = int(self.state.step) + 1
        last = None
        if self.checkpointer is not None:
            with suppress(CheckpointError):  # The message speaks of what is on disk, whatever became of the last save.
                self.checkpointer.wait()
            last = self.checkpointer.tags().get("latest")
        where = "nothing was saved" if last is None else f"the last good checkpoint is step {last}"
        return f"the loss of step {bad} was {loss}; the state was left as it was before it, and {where}"

    def _look(self, log: bool, evaluate: bool, save: bool, *, last: bool) -> None:
        progress = self.progress
        row: dict[str, float] = {}
        if (log or evaluate or last) and progress.pending:
            progress.train_loss = float(np.mean(progress.pending))
            progress.pending.clear()
            progress.health = {name: float(self._last[name]) for name in WATCHED}
            terms = {name: float(value) for name, value in self._last.items() if name.startswith("loss/")}
            row |= {"train_loss": progress.train_loss, **progress.health, **terms}
        improved = False
        if evaluate or last:
            row["val_loss"] = loss = self.program.evaluate(self.state, self.validation)
            progress.validation = loss if math.isfinite(loss) else None
            improved = math.isfinite(loss) and (progress.best is None or loss < progress.best)
            if improved:
                progress.best = loss
            self.watcher.evaluated(progress)
        if row:
            self.writer.write(progress.step, row)
        if save or improved or last:
            self.save("latest", *["best"] * improved, *["final"] * last)


@contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """Collects SIGINT and SIGTERM in place of dying of them; a second SIGINT interrupts as usual."""
    caught: list[str] = []

    def note(number: int, _frame: object) -> None:
        caught.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: the handler may have come in the middle of one.
        with suppress(OSError):
            os.write(2, f"\n{caught[-1]}: finishing this step, then saving; Ctrl-C stops at once\n".encode())

    with handled(note, signal.SIGINT, signal.SIGTERM):
        yield caught


def bytes_per_second(program: Program, steps: int, since: float) -> float:
    """Training bytes a second over `steps` steps since a `time.perf_counter()` reading."""
    train = program.config.train
    return steps * train.accum * train.batch * train.context / max(time.perf_counter() - since, 1e-9)

"""The loop around a step: when it looks, what it saves, and how it ends. The step here is a counter."""

import math
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from arbs_jax.config import LogConfig, RunConfig, TrainConfig
from arbs_jax.training.loop import WATCHED, Progress, Trainer, TrainingHalted
from arbs_jax.training.step import TrainState


@dataclass
class Recorder:
    """Stands in for batches, writer, checkpointer and watcher, and writes down what they were asked for."""

    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    saves: list[tuple[int, set[str]]] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    position: int = 0
    on_batch: Callable[[int], None] = lambda _: None

    def __next__(self) -> np.ndarray:
        self.position += 1
        self.on_batch(self.position)
        return np.zeros((1, 1, 2), np.uint8)

    def get_state(self) -> dict[str, Any]:
        return {"step": self.position}

    def write(self, step: int, row: dict[str, float]) -> None:
        self.rows.append((step, row))

    def save(self, step: int, tree: dict[str, Any], metadata: dict[str, Any], *, tags: Any) -> None:
        assert int(tree["step"]) == step == metadata["data"]["step"]
        self.saves.append((step, set(tags)))
        self.metadata.append(metadata)

    def tags(self) -> dict[str, int]:
        return {name: step for step, names in self.saves for name in names}

    def wait(self) -> None:
        pass

    def stepped(self, progress: Progress) -> None:
        self.seen.append(progress.step)

    def evaluated(self, progress: Progress) -> None:
        pass


def watched(step: int) -> dict[str, float]:
    """What the step function below says of step `step`, exact in float32."""
    return {name: (step + place) / 64 for place, name in enumerate(WATCHED)}


def trainer(record: Recorder, losses: dict[int, float] | None = None, validation: Any = None) -> Trainer:
    """A run of 20 steps: rows every 5, validations every 8, checkpoints every 10; the loss of step s is s."""
    config = RunConfig(train=TrainConfig(steps=20), log=LogConfig(5, 8, 10))
    validation = validation or (lambda step: 100 - step)

    def step_function(state: TrainState, _: np.ndarray) -> tuple[TrainState, dict[str, Any]]:
        number = int(state.step) + 1
        loss = (losses or {}).get(number, float(number))
        bad = bool(state.halted) or not math.isfinite(loss)
        after = TrainState(state.ternary, jnp.int32(number - bad), jnp.int32(bad))
        health = {name: jnp.float32(value) for name, value in watched(number).items()}
        return after, {"loss": jnp.float32(loss), "halted": after.halted, **health}

    program: Any = SimpleNamespace(config=config, evaluate=lambda _, batches: validation(record.position))
    state = TrainState({}, jnp.int32(0), jnp.int32(0))
    anything: Any = record
    return Trainer(program, step_function, state, anything, [], anything, anything, anything, Progress())


def test_rows_validations_and_checkpoints_come_when_they_are_due():
    record = Recorder()
    assert trainer(record).run(20) is None
    # The loss is the mean since the row before; what is watched is of the last step.
    assert record.rows == [
        (5, {"train_loss": 3.0, **watched(5)}),
        (8, {"train_loss": 7.0, **watched(8), "val_loss": 92}),
        (10, {"train_loss": 9.5, **watched(10)}),
        (15, {"train_loss": 13.0, **watched(15)}),
        (16, {"train_loss": 16.0, **watched(16), "val_loss": 84}),
        (20, {"train_loss": 18.5, **watched(20), "val_loss": 80}),
    ]
    assert record.saves == [
        (8, {"latest", "best"}),
        (10, {"latest"}),
        (16, {"latest", "best"}),
        (20, {"latest", "best", "final"}),
    ]
    assert len(record.seen) == 20


@pytest.mark.parametrize("stop", [3, 8, 10, 17])
def test_stopping_and_going_on_leaves_no_trace(stop: int):
    whole, record = Recorder(), Recorder()
    trainer(whole).run(20)
    first = trainer(record)
    assert first.run(stop) is None
    assert record.saves[-1][0] == stop
    assert "final" not in record.tags()
    assert len([step for step, _ in record.saves if step == stop]) == 1
    second = trainer(record)
    second.state, second.saved = first.state, stop
    second.progress = Progress.from_json(stop, record.metadata[-1]["progress"])
    assert second.run(20) is None
    assert record.rows == whole.rows
    assert record.metadata[-1] == whole.metadata[-1]
    assert record.tags() == whole.tags()


@pytest.mark.parametrize("bad", [1, 4, 5, 10, 20])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(bad: int, loss: float):
    record = Recorder()
    run = trainer(record, {bad: loss})
    last = max((step for step in (8, 10, 16) if step < bad), default=None)
    where = "nothing was saved" if last is None else f"the last good checkpoint is step {last}"
    with pytest.raises(TrainingHalted, match=f"the loss of step {bad} was {loss}; .*{where}"):
        run.run(20)
    assert int(run.state.step) == bad - 1
    assert all(step < bad for step, _ in record.saves)
    assert all(step < bad for step, _ in record.rows)


def test_a_validation_that_is_not_finite_is_recorded_and_is_no_best():
    record = Recorder()
    run = trainer(record, validation=lambda step: {8: math.nan, 16: 5.0, 20: math.inf}[step])
    assert run.run(20) is None
    assert record.tags() == {"latest": 20, "best": 16, "final": 20}
    assert math.isnan(dict(record.rows)[8]["val_loss"])
    assert run.progress.best == 5.0
    assert run.progress.validation is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(number: signal.Signals, capfd: pytest.CaptureFixture[str]):
    record = Recorder(on_batch=lambda step: signal.raise_signal(number) if step == 7 else None)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    run = trainer(record)
    assert run.run(20) == number.name
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert record.saves == [(7, {"latest"})]
    assert record.metadata[-1]["progress"]["pending"] == [6.0, 7.0]
    assert f"{number.name}: finishing this step" in capfd.readouterr().err


def test_a_signal_in_the_last_step_changes_nothing(capfd: pytest.CaptureFixture[str]):
    record = Recorder(on_batch=lambda step: signal.raise_signal(signal.SIGTERM) if step == 20 else None)
    assert trainer(record).run(20) is None
    assert record.tags()["final"] == 20


def test_a_second_interrupt_is_not_waited_for(capfd: pytest.CaptureFixture[str]):
    def twice(step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    record, before = Recorder(on_batch=twice), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer(record).run(20)
    assert record.saves == []
    assert signal.getsignal(signal.SIGINT) is before


def test_it_runs_outside_the_main_thread_too():
    record, ended = Recorder(), []
    thread = threading.Thread(target=lambda: ended.append(trainer(record).run(20)))
    thread.start()
    thread.join()
    assert ended == [None]


def test_nothing_is_saved_without_a_checkpointer():
    record = Recorder()
    run = trainer(record)
    run.checkpointer = None
    assert run.run(20) is None
    assert record.saves == []

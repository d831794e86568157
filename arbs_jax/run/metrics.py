"""Metrics of a run as JSON lines and for TensorBoard, behind one protocol of three methods."""

import json
import math
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from arbs_jax.errors import CheckpointError, ConfigError
from arbs_jax.run.files import to_json, write_atomic


class MetricsWriter(Protocol):
    """Where a training loop puts its numbers."""

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Record scalars (Python, NumPy or 0-d JAX numbers) under a step."""
        ...

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        ...

    def close(self) -> None:
        """Flush and end; may be called twice."""
        ...


def _number(name: str, value: Any) -> int | float:
    """A Python number. Raises ConfigError for anything that is not one scalar."""
    item = getattr(value, "item", None)
    try:
        plain = item() if callable(item) else value
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metric {name!r} must be one number, got shape {getattr(value, 'shape', '?')}") from error
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise ConfigError(f"metric {name!r} must be a number, got {type(plain).__name__}")
    return plain


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics file, each {"step": int, name: number or None}, in the file's order.

    A last line that is torn (the writer was killed) is left out. None stands for NaN or infinity.

    Raises:
      CheckpointError: the file cannot be read, or a line before the last is not a row; the message names the line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"cannot read metrics: {error}") from error
    # What follows the last newline is empty, or a line whose writer was killed.
    return [_row(path, number, line) for number, line in enumerate(lines[:-1], start=1)]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CheckpointError(f"{path}, line {number} is not JSON ({error}); mend or delete that line") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise CheckpointError(f"{path}, line {number} has no integer 'step'; mend or delete that line")
    return row


class JsonLinesWriter:
    """One JSON object a row: {"step": 10, "train_loss": 2.5}. NaN and infinity become null."""

    def __init__(self, path: str | os.PathLike[str], resume_step: int | None = None):
        """Open the file for appending, after cutting what a resumed run will write again.

        Args:
          path: its folder must exist.
          resume_step: None for a new file; on resuming at step s, rows with a step above s are cut off, since that
            stretch of training will be done again. A missing file is then a new one.

        Raises:
          CheckpointError: a new file was asked for where there are rows already, or the file cannot be read or written.
        """
        self.path = Path(path)
        try:
            if resume_step is None:
                if self.path.exists() and self.path.stat().st_size:
                    raise CheckpointError(
                        f"{self.path} holds metrics of another run; resume it or choose another --run"
                    )
            elif self.path.exists():
                rows = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
                write_atomic(self.path, "".join(f"{to_json(row)}\n" for row in rows).encode())
            self._file = open(self.path, "ab")  # noqa: SIM115 - lives as long as the writer
        except OSError as error:
            raise CheckpointError(f"cannot write metrics to {self.path}: {error}") from error

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Append a row and hand it to the operating system at once, so that a killed run loses none.

        Raises:
          ConfigError: a scalar is not a number, or is called "step".
          CheckpointError: the disk is full.
        """
        if "step" in scalars:
            raise ConfigError("a metric must not be called 'step'")
        row: dict[str, Any] = {"step": operator.index(step)}
        for name, value in scalars.items():
            number = _number(name, value)
            row[name] = number if math.isfinite(number) else None
        try:
            self._file.write(f"{to_json(row)}\n".encode())
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write metrics to {self.path}: {error}") from error

    def flush(self) -> None:
        """Nothing waits: every row was flushed when it was written."""

    def close(self) -> None:
        """Close the file; may be called twice. Raises CheckpointError where the last row could not be written."""
        try:
            self._file.close()
        except OSError as error:
            raise CheckpointError(f"cannot write metrics to {self.path}: {error}") from error


class TensorBoardWriter:
    """Scalars as TensorBoard events. Values that are not finite are left out: they would spoil the axis."""

    def __init__(self, folder: str | os.PathLike[str], resume_step: int | None = None):
        """Open a new event file in `folder`.

        Args:
          folder: created if missing; every writer adds an event file of its own.
          resume_step: on resuming at step s TensorBoard is told to forget the steps above s.

        Raises:
          CheckpointError: the folder or the event file cannot be made.
        """
        purge = None if resume_step is None else resume_step + 1
        try:
            self._writer = SummaryWriter(str(folder), purge_step=purge)
        except OSError as error:
            raise CheckpointError(f"cannot write TensorBoard events to {folder}: {error}") from error

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Queue the scalars. Raises ConfigError for one that is not a number."""
        for name, value in scalars.items():
            number = _number(name, value)
            if math.isfinite(number):
                self._writer.add_scalar(name, number, step)

    def flush(self) -> None:
        """Write the queue to the event file."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and end; may be called twice."""
        self._writer.close()


class MultiWriter:
    """Passes everything on to several writers, in order."""

    def __init__(self, writers: Iterable[MetricsWriter]):
        self._writers = tuple(writers)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write to each. The first error ends it and is raised."""
        for writer in self._writers:
            writer.write(step, scalars)

    def flush(self) -> None:
        """Flush each."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Close each, the rest too where one raises; the first error is raised at the end."""
        errors: list[Exception] = []
        for writer in self._writers:
            try:
                writer.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

"""Metrics survive kills and resumes, and the file is valid JSON whatever the loss does."""

import errno
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from arbs_jax.errors import CheckpointError, ConfigError
from arbs_jax.run import metrics
from arbs_jax.run.metrics import JsonLinesWriter, MultiWriter, TensorBoardWriter, read_metrics


def test_rows_round_trip_exactly(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(path)
    writer.write(1, {"train_loss": 0.1, "votes": 2**40, "numpy": np.float32(0.5), "jax": jnp.int32(7)})
    writer.write(np.int64(2**40), {"val_loss": 1e-300})
    assert read_metrics(path) == [  # before close: every row is out at once
        {"step": 1, "train_loss": 0.1, "votes": 2**40, "numpy": 0.5, "jax": 7},
        {"step": 2**40, "val_loss": 1e-300},
    ]
    writer.flush()
    writer.close()
    writer.close()


def test_nan_and_infinity_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(path)
    writer.write(1, {"a": float("nan"), "b": np.float32("inf"), "c": jnp.float32("-inf"), "d": 1.0})
    writer.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "a": None, "b": None, "c": None, "d": 1.0}
    assert read_metrics(path) == [row]


@pytest.mark.parametrize("value", ["text", None, True, np.zeros(2), jnp.zeros(3), [1]])
def test_only_numbers_are_metrics(tmp_path, value):
    writer = JsonLinesWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match="metric 'loss' must be"):
        writer.write(1, {"loss": value})
    with pytest.raises(ConfigError, match="must not be called 'step'"):
        writer.write(1, {"step": 1})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("torn", ["", '{"step": 5, "train_l', '{"step": 3, "train_loss": 9.0}', '{"step": 3'])
def test_resuming_cuts_later_rows_and_a_torn_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(path)
    for step in (1, 2, 3, 4):
        writer.write(step, {"train_loss": step / 2})
    writer.close()
    with path.open("a") as file:
        file.write(torn)
    writer = JsonLinesWriter(path, resume_step=3)
    writer.write(4, {"train_loss": 0.25})
    writer.close()
    assert [(row["step"], row["train_loss"]) for row in read_metrics(path)] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 0.25)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_without_a_file_starts_one(tmp_path):
    JsonLinesWriter(tmp_path / "metrics.jsonl", resume_step=3).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "text": "\xc3')
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize(
    ("line", "message"), [("{", "is not JSON"), ("[1]", "no integer 'step'"), ("{}", "no integer")]
)
def test_a_broken_line_in_the_middle_is_named(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(CheckpointError, match=f"line 2 .*{message}"):
        read_metrics(path)
    with pytest.raises(CheckpointError, match=f"line 2 .*{message}"):
        JsonLinesWriter(path, resume_step=3)


def test_a_new_run_does_not_write_over_an_old_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match="holds metrics of another run; resume it or"):
        JsonLinesWriter(path)
    assert path.read_text() == '{"step": 1}\n'


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read metrics"):
        read_metrics(tmp_path / "none.jsonl")
    with pytest.raises(CheckpointError, match="cannot write metrics to"):
        JsonLinesWriter(tmp_path / "no_folder" / "metrics.jsonl")


def test_a_full_disk_is_a_checkpoint_error(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "write_atomic", full)
        with pytest.raises(CheckpointError, match="No space left"):
            JsonLinesWriter(path, resume_step=1)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    writer = JsonLinesWriter(path, resume_step=2)
    writer._file.close()
    writer._file = FullFile()
    with pytest.raises(CheckpointError, match=r"cannot write metrics to .*No space left"):
        writer.write(3, {"loss": 1.0})
    with pytest.raises(CheckpointError, match=r"cannot write metrics to .*No space left"):
        writer.close()


class FullFile:
    """A buffered file on a full disk: it takes the bytes, and fails when they must go out."""

    def write(self, data):
        return len(data)

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    close = flush


def test_tensorboard_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write TensorBoard events to"):
        TensorBoardWriter(tmp_path / "file")


def events(folder) -> list[tuple[int, str, float]]:
    """The scalars of a folder's event files: records of uint64 length, crc, data, crc."""
    found = []
    for path in sorted(folder.iterdir()):
        data, position = path.read_bytes(), 0
        while position < len(data):
            length = int.from_bytes(data[position : position + 8], "little")
            event = Event.FromString(data[position + 12 : position + 12 + length])
            position += 16 + length
            if event.HasField("session_log"):
                found.append((event.step, "session", float(event.session_log.status)))
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_events(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write(10, {"train_loss": 2.5, "val_loss": np.float32(0.5), "bad": float("nan")})
    writer.flush()
    writer.close()
    writer.close()
    assert events(tmp_path) == [(10, "train_loss", 2.5), (10, "val_loss", 0.5)]


def test_tensorboard_forgets_the_steps_that_are_done_again(tmp_path):
    writer = TensorBoardWriter(tmp_path, resume_step=10)
    writer.write(11, {"train_loss": 2.5})
    writer.close()
    assert events(tmp_path) == [(11, "session", 1.0), (11, "train_loss", 2.5)]


class Recorder:
    def __init__(self, broken: bool = False):
        self.calls = []
        self.broken = broken

    def write(self, step, scalars):
        self.calls.append((step, dict(scalars)))

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")
        if self.broken:
            raise CheckpointError("disk full")


def test_multi_writer_reaches_every_writer():
    first, second = Recorder(), Recorder()
    writer = MultiWriter([first, second])
    writer.write(1, {"a": 2.0})
    writer.flush()
    writer.close()
    assert first.calls == second.calls == [(1, {"a": 2.0}), "flush", "close"]


def test_multi_writer_closes_the_rest_when_one_fails():
    first, second = Recorder(broken=True), Recorder()
    with pytest.raises(CheckpointError, match="disk full"):
        MultiWriter([first, second]).close()
    assert second.calls == ["close"]

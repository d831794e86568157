"""Mistakes and misfortunes: a line or two that names both values and what to do, status 1, and nothing lost."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import STEPS, Reference, call, flags, restore, start, tags, wait_for_step
from support import assert_trees_equal

from arbs_jax.cli import train
from arbs_jax.run import checkpoints
from arbs_jax.run.checkpoints import Checkpointer
from arbs_jax.run.folder import RunLock
from arbs_jax.training.room import check_room
from arbs_kernels import backends
from arbs_kernels.packed_matmul import api as packed_matmul
from arbs_kernels.selection import Implementation, UnsupportedError


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The message with which `arbs WORDS` refuses, after checking its form."""
    capsys.readouterr()
    assert call(*words) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err.startswith("error: ")
    return err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--steps", "0"), ("--steps", "at least 1", "0")),
        (("--steps", "many"), ("--steps", "whole number", "'many'")),
        (("--batch", "-3"), ("--batch", "at least 1", "-3")),
        (("--ctx", "1025"), ("--ctx 1025", "1024", "--preset")),
        (("--accum", "1.5"), ("--accum", "whole number", "'1.5'")),
        (("--devices", "2", "--accum", "3"), ("--devices", "--accum", "2 and 3", "--accum 2 or a multiple")),
        (("--devices", "0"), ("--devices", "at least 1", "0")),
        (("--devices", "64"), ("--devices", "at most", "64")),
        (("--layers-at-once", "0"), ("--layers-at-once", "at least 1", "0")),
        (("--layers-at-once", "3"), ("--layers-at-once", "divide", "2 layers", "3")),
        (("--seed", "4294967296"), ("--seed", "2^32", "4294967296")),
        (("--learning-rate", "high"), ("--learning-rate", "number", "'high'")),
        (("--learning-rate", "nan"), ("learning_rate", "nan")),
        (("--group-size", "5"), ("--group-size", "4, 6, 8, 12, 16, 32", "5")),
        (("--preset", "byte-9000b"), ("--preset", "byte-0.4m, byte-3m", "'byte-9000b'")),
        (("--rule", "adam"), ("--rule", "bigint", "integral", "'adam'")),
        (("--kernel", "mosaic_gpu"), ("--kernel", "auto, xla, triton", "'mosaic_gpu'")),
        (("--tied", "perhaps"), ("--tied", "yes or no", "'perhaps'")),
        (("--save-interval", "0"), ("--save-interval", "at least 1", "0")),
        (("--stop-at", "0"), ("--stop-at", "at least 1", "0")),
        (("--resume",), ("--resume", "--run DIR")),
        (("--merge",), ("--merge", "--resume")),
        (("--checkpoint", "best"), ("--checkpoint", "--resume")),
        (("--data", "absent.txt"), ("absent.txt", "does not exist", "give a file")),
        (("--run", "absent", "--resume"), ("absent", "config.json", "without --resume")),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_is_written(
    words: tuple[str, ...],
    expected: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, "train", *words)
    assert len(message.splitlines()) <= 2
    assert len(message) < 250
    for part in expected:
        assert part in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("train", "--no-save"), ("warmup",), ("audit",)])
def test_a_kernel_that_does_not_run_here_is_refused_before_anything_is_written(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "compute_capability", lambda: 7.5)
    message = refused(capsys, *words, "--kernel", "triton")
    assert message.splitlines() == [message]
    assert "--kernel triton needs an NVIDIA GPU of compute capability 8.0 or later" in message
    assert message.endswith("of 7.5; pass --kernel auto")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_goes_on_with_another_kernel(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = json.loads((run / "config.json").read_text())
    config["train"]["kernel"] = "triton"
    (run / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(backends, "compute_capability", lambda: 0.0)
    more = ("train", "--run", run, "--resume", "--steps", STEPS + 1)
    assert "pass --kernel auto" in refused(capsys, *more)
    assert json.loads((run / "config.json").read_text()) == config
    for look in (("eval", "--windows", 2), ("sample", "--bytes", 2)):
        assert "pass --kernel auto" in refused(capsys, *look, "--run", run)
        assert call(*look, "--run", run, "--kernel", "auto") == 0
    assert call(*more, "--kernel", "auto") == 0


@pytest.mark.parametrize("words", [("train", "--stesp", "3"), ("trian",), (), ("eval", "--checkpoint")])
def test_a_command_line_that_cannot_be_parsed_has_status_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        call(*words)
    assert stopped.value.code == 2
    assert "arbs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"), [(b"", ("0 bytes", "with data")), (b"too short for a window", ("22 bytes", "65"))]
)
def test_data_that_hold_no_window(
    content: bytes, expected: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "text").write_bytes(content)
    message = refused(capsys, "train", "--data", tmp_path / "text", "--run", tmp_path / "run")
    for part in expected:
        assert part in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bytes_that_are_not_utf8_are_data_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a[1] :heart:").write_bytes(bytes(range(255, -1, -1)) * 60)
    words = ("train", "--data", tmp_path / "a[1] :heart:", "--run", tmp_path / "run", *flags("integral", 2))
    assert call(*words, "--stop-at", 2) == 0
    out = capsys.readouterr().out
    assert "unigram entropy 5.5452 nats/byte" in out
    # Not markup, and not an emoji.
    assert "a[1] :heart:" in out


def test_a_folder_that_is_a_file_or_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        message = refused(capsys, "train", "--run", path, *flags())
        assert f"--run {path} cannot be used as a run folder" in message
    assert (tmp_path / "file").read_text() == "precious"
    assert "is not a run" in refused(capsys, "sample", "--run", tmp_path)
    assert "cannot be read" in refused(capsys, "eval", "--run", tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_an_unwritable_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in refused(capsys, "train", "--run", tmp_path / "run", *flags())
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_holds_a_run_is_not_overwritten(finished: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    message = refused(capsys, "train", "--run", finished, *flags("integral", 2))
    assert "holds a run already; pass --resume or choose another --run" in message
    message = refused(capsys, "train", "--run", finished, "--resume")
    assert f"at step {STEPS} already and --steps is {STEPS}; raise it" in message
    message = refused(capsys, "train", "--run", finished, "--resume", "--steps", STEPS + 1, "--rule", "bigint")
    assert "rule.name: saved 'integral', now 'bigint'" in message
    message = refused(capsys, "train", "--run", finished, "--resume", "--steps", STEPS + 1, "--batch", "4")
    assert "train.batch: saved 2, now 4" in message
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}


def test_other_data_are_refused_and_moved_data_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text, run = tmp_path / "here" / "text", tmp_path / "run"
    text.parent.mkdir()
    text.write_bytes(b"integers all the way down. " * 300)
    assert call("train", "--run", run, "--data", text, *flags("integral", 2), "--stop-at", 2) == 0
    config = (run / "config.json").read_bytes()
    moved = tmp_path / "text"
    text.rename(moved)
    assert "does not exist" in refused(capsys, "train", "--run", run, "--resume")
    other = tmp_path / "other"
    other.write_bytes(b"something else entirely... " * 300)
    message = refused(capsys, "train", "--run", run, "--resume", "--data", other)
    assert "is not the text" in message
    assert json.loads(config)["facts"]["fingerprint"][:12] in message
    assert (run / "config.json").read_bytes() == config
    assert call("train", "--run", run, "--resume", "--data", moved, "--stop-at", 3) == 0
    assert call("train", "--run", run, "--resume", "--stop-at", 4) == 0


def _truncate(checkpoint: Path) -> None:
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])


def _tamper(checkpoint: Path) -> None:
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": ', '"step":  9', 1))


@pytest.mark.parametrize("damage", [_truncate, _tamper])
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_offered(
    reference: Callable[..., Reference],
    damage: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    run = tmp_path / "run"
    shutil.copytree(reference("integral", 2).run, run)
    (*_, previous, last) = sorted(path for path in (run / "checkpoints").iterdir() if path.is_dir())
    damage(last)
    good = int(previous.name)
    for words in (("train", "--resume", "--steps", STEPS + 1), ("sample", "--checkpoint", "latest", "--bytes", 2)):
        message = refused(capsys, words[0], "--run", run, *words[1:])
        assert f"checkpoint {STEPS} is damaged" in message
        assert f"checkpoint {good} is good" in message
        assert "Traceback" not in message
    assert call("sample", "--run", run, "--checkpoint", good, "--bytes", 2) == 0
    assert call("train", "--run", run, "--resume", "--checkpoint", good) == 0
    assert_trees_equal(restore(run, "final")[0], restore(reference("integral", 2).run, "final")[0])


def test_a_step_that_does_not_fit_is_refused_before_there_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked = []

    def room(need: int, room: int | None) -> None:
        asked.append(need)
        if len(asked) == 1:
            check_room(need, 10**6)

    monkeypatch.setattr(train, "check_room", room)
    words = ("train", *flags("integral", 2), "--stop-at", 2, "--run", tmp_path / "run", "--no-save")
    assert "this training step needs" in refused(capsys, *words)
    assert not (tmp_path / "run" / "config.json").exists()
    assert call(*words) == 0
    assert asked[0] == asked[1]


def test_a_loss_that_is_not_finite_stops_the_run_before_it_does_harm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    assert call("train", "--run", run, *flags("integral", 2), "--stop-at", 3) == 0
    with Checkpointer(run / "checkpoints") as keeper:
        tree, metadata = keeper.restore()
        tree["ternary"]["head"]["corr"][...] = 2**40  # A scale of 2^65536 is infinite.
        keeper.save(3, tree, metadata)
    message = refused(capsys, "train", "--run", run, "--resume")
    assert "the loss of step 4 was" in message
    assert "the last good checkpoint is step 3" in message
    assert "--learning-rate" in message
    assert tags(run)["latest"] == 3
    assert_trees_equal(restore(run)[0], tree)


@pytest.mark.slow
def test_going_on_with_another_rate_and_more_steps(finished: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    more = ("--checkpoint", "best", "--learning-rate", "0.01", "--steps", STEPS + 5)
    assert call("train", "--run", run, "--resume", *more) == 0
    saved = json.loads((run / "config.json").read_text())
    assert (saved["rule"]["learning_rate"], saved["train"]["steps"]) == (0.01, STEPS + 5)
    assert tags(run)["final"] == STEPS + 5


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_checkpoint(
    reference: Callable[..., Reference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    run, write = tmp_path / "run", checkpoints.write_checkpoint

    def full(folder: Path, step: int, *rest: Any) -> None:
        if step > 60:
            (folder / "half").write_bytes(b"of a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_checkpoint", full)
        message = refused(capsys, "train", "--run", run, *flags("integral", 2))
    assert "saving step 120" in message
    assert "No space left on device" in message
    assert f"arbs train --run {run} --resume" in message
    assert tags(run)["latest"] == 60
    assert sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())[-1] == "000000060"
    assert call("train", "--run", run, "--resume") == 0
    assert_trees_equal(restore(run, "final")[0], restore(reference("integral", 2).run, "final")[0])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs Linux")
def test_a_process_that_may_write_no_more_stops_and_can_be_resumed(reference: Callable[..., Reference], tmp_path: Path):
    resource = pytest.importorskip("resource")
    run = tmp_path / "run"
    process = start("train", "--run", run, *flags("integral", 2))
    wait_for_step(process, run, 5)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8192, 8192))
    out, err = process.communicate()
    assert process.returncode == 1, out + err
    assert "Traceback" not in err
    assert "error: saving step" in err
    assert f"arbs train --run {run} --resume" in err
    assert call("train", "--run", run, "--resume") == 0
    assert_trees_equal(restore(run, "final")[0], restore(reference("integral", 2).run, "final")[0])


def test_a_run_in_use_is_left_alone(finished: Path, capsys: pytest.CaptureFixture[str]):
    lock = RunLock.acquire(finished)
    try:
        message = refused(capsys, "train", "--run", finished, "--resume", "--steps", STEPS + 1)
        assert f"is in use by process {os.getpid()}" in message
        assert call("eval", "--run", finished, "--windows", 2, "--json") == 0
    finally:
        lock.release()


def test_a_kernel_that_refuses_a_shape_in_mid_trace(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedError("packed_matmul: takes at most 3 rows, got 1024; pass 'triton'")

    monkeypatch.setitem(packed_matmul.FORWARD, "xla", Implementation(refuse))
    message = refused(capsys, "train", *flags(), "--run", tmp_path / "run")
    assert message == "packed_matmul: takes at most 3 rows, got 1024; pass 'triton'"

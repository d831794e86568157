"""Stopping and going on: the same integers, rows and data order as a run that was never interrupted."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import SAVE_INTERVAL, STEPS, Reference, call, compiled, finish, flags, restore, start, tags, wait_for_step
from support import assert_trees_equal

from arbs_jax.cli.display import Bar
from arbs_jax.run.checkpoints import Checkpointer
from arbs_jax.run.limbs import to_device, to_host

CANARY = 2**40


def assert_same_run(run: Path, expected: Path, steps: int = STEPS) -> None:
    """Every leaf, the losses on record and the position in the data, all bit for bit."""
    (tree, metadata), (wanted_tree, wanted_metadata) = restore(run, "final"), restore(expected, "final")
    assert_trees_equal(tree, wanted_tree)
    assert int(tree["step"]) == steps
    assert metadata == wanted_metadata
    assert (run / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    assert tags(run) == tags(expected)


@pytest.mark.slow
def test_a_terminated_process_goes_on_bit_for_bit(reference: Callable[..., Reference], tmp_path: Path):
    run = tmp_path / "run"
    process = start("train", "--run", run, *flags("integral", 2))
    wait_for_step(process, run, 10)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, err
    at = tags(run)["latest"]
    assert 10 <= at < STEPS
    assert f"stopped by SIGTERM after step {at} of {STEPS}; go on with: arbs train --run {run} --resume" in out
    assert "finishing this step" in err
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert call("train", "--run", run, "--resume") == 0
    assert_same_run(run, reference("integral", 2).run)


@pytest.mark.slow
def test_a_killed_process_goes_on_bit_for_bit_from_its_last_checkpoint(
    reference: Callable[..., Reference], tmp_path: Path
):
    run = tmp_path / "run"
    process = start("train", "--run", run, *flags("bigint", 1))
    wait_for_step(process, run, SAVE_INTERVAL + 15)
    process.kill()
    process.communicate()
    at = tags(run)["latest"]
    # A kill may come while a checkpoint is being written; then the one before it counts.
    assert at % SAVE_INTERVAL == 0
    assert at < STEPS
    assert (resumed := finish("train", "--run", run, "--resume")).returncode == 0, resumed.stderr
    assert_same_run(run, reference("bigint", 1).run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "accum", "steps", "stops"),
    [
        ("integral", 2, STEPS, (33, SAVE_INTERVAL)),
        ("bigint", 1, STEPS, (33, SAVE_INTERVAL)),
        ("latent10", 2, 24, (7, 15)),
        ("latent18", 1, 24, (7, 15)),
    ],
)
def test_a_run_in_three_parts_is_the_run_in_one(
    reference: Callable[..., Reference],
    tmp_path: Path,
    rule: str,
    accum: int,
    steps: int,
    stops: tuple[int, int],
    capsys: pytest.CaptureFixture[str],
):
    run = tmp_path / "run"
    first, second = stops
    # The second stop is at a step that is saved anyway.
    begin = (*flags(rule, accum, steps), "--save-interval", second)
    assert call("train", "--run", run, *begin, "--stop-at", first) == 0
    assert f"stopped by --stop-at after step {first} of {steps}; go on with" in capsys.readouterr().out
    assert tags(run)["latest"] == first
    assert "final" not in tags(run)
    for words in (("--stop-at", second), ()):
        assert call("train", "--run", run, "--resume", *words) == 0
        # What one start compiles the next one reads.
        assert compiled(capsys.readouterr().out)["training step"] is False
    assert_same_run(run, reference(rule, accum, steps).run, steps)


def test_going_on_from_an_earlier_checkpoint(reference: Callable[..., Reference], tmp_path: Path):
    expected = reference("integral", 2).run
    run = tmp_path / "run"
    shutil.copytree(expected, run)
    earlier = SAVE_INTERVAL * (STEPS // SAVE_INTERVAL)
    assert call("train", "--run", run, "--resume", "--checkpoint", earlier) == 0
    assert_same_run(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    stepped = Bar.stepped

    def interrupted(self: Bar, progress: Any) -> None:
        stepped(self, progress)
        if progress.step == 8:
            signal.raise_signal(number)

    monkeypatch.setattr(Bar, "stepped", interrupted)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert call("train", "--run", run, *flags("integral", 2)) == 128 + number
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    out = capfd.readouterr().out
    at = tags(run)["latest"]
    assert at in (8, 9)
    assert f"stopped by {number.name} after step {at}" in out
    assert f"go on with: arbs train --run {run} --resume" in out


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once_and_loses_nothing_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"

    def twice(self: Bar, progress: Any) -> None:
        if progress.step == 8:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Bar, "stepped", twice)
    assert call("train", "--run", run, *flags("integral", 2)) == 130
    assert f"arbs train --run {run} --resume" in capsys.readouterr().err
    assert tags(run) == {"latest": 0}
    tree, _ = restore(run)
    assert int(tree["step"]) == 0


def _with_canaries(run: Path) -> dict[str, Any]:
    """Puts values past 32 bits into a run's last checkpoint; returns the edited tree."""
    with Checkpointer(run / "checkpoints") as keeper:
        tree, metadata = keeper.restore()
        # The row of a special byte is never read, so the value stays and its scale of 2^65536 harms nobody.
        tree["ternary"]["embed"]["corr"][280, 1] = CANARY + 5
        # A group of scale 2^-65536 is a zero weight whose accumulator still takes votes.
        tree["ternary"]["blocks"]["mlp"]["down_proj"]["corr"][1, :, 3] = -CANARY - 7
        tree["ternary"]["head"]["votes"][...] = CANARY + 11
        keeper.save(int(tree["step"]), tree, metadata)
    return tree["ternary"]


@pytest.mark.parametrize("rule", ["integral", pytest.param("bigint", marks=pytest.mark.slow)])
def test_values_past_32_bits_survive_training_saving_and_resuming(tmp_path: Path, rule: str):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert call("train", "--run", run, *flags(rule, 2), "--stop-at", 3) == 0
    before = _with_canaries(run)
    shutil.copytree(run, whole)
    assert call("train", "--run", run, "--resume", "--stop-at", 5) == 0
    assert call("train", "--run", run, "--resume", "--stop-at", 7) == 0
    assert call("train", "--run", whole, "--resume", "--stop-at", 7) == 0
    after = restore(run)[0]["ternary"]
    assert_trees_equal(restore(whole)[0]["ternary"], after)
    assert after["embed"]["corr"][280, 1] == CANARY + 5
    assert after["head"]["votes"] == CANARY + 11 + 4 * 2
    untouched, moved = (tree["blocks"]["mlp"]["down_proj"]["corr"][1, :, 3] for tree in (before, after))
    assert after["head"]["corr"].dtype == np.int64
    difference = moved - untouched
    assert np.any(difference != 0)
    # Four steps of two votes, each of at most 32 signs, at integral's largest rate per sign.
    assert np.abs(difference).max() <= 4 * 2 * 32 * (2**24 if rule == "integral" else 1)
    assert_trees_equal(to_host(to_device(after)), after)


@pytest.mark.slow
def test_another_architecture_is_refused_with_a_table_and_merged_when_asked(
    reference: Callable[..., Reference], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    shutil.copytree(reference("integral", 2).run, run)
    (run / "untouched").write_bytes((run / "config.json").read_bytes())
    old, _ = restore(run)
    # A tied head is dropped; everything else stays as it is.
    more = ("--resume", "--steps", STEPS + 2, "--tied", "yes")
    capsys.readouterr()
    assert call("train", "--run", run, *more) == 1
    err = capsys.readouterr().err
    assert "ternary/head/trits" in err
    assert "dropped" in err
    assert "--merge" in err
    assert (run / "config.json").read_bytes() == (run / "untouched").read_bytes()

    assert call("train", "--run", run, *more, "--merge", "--stop-at", STEPS + 1) == 0
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if "ternary/head/" in line and "dropped" in line]) == 4
    assert len([line for line in out.splitlines() if "ternary/blocks/" in line and "loaded" in line]) == 28
    new, _ = restore(run)
    assert "head" not in new["ternary"]
    np.testing.assert_array_equal(new["ternary"]["embed"]["trits"], old["ternary"]["embed"]["trits"])
    # From here it is an ordinary run again.
    assert call("sample", "--run", run, "--bytes", 4) == 0

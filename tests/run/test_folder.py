"""A run folder belongs to one configuration and one trainer at a time."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import arbs_jax
from arbs_jax.errors import CheckpointError, ConfigError
from arbs_jax.run import folder
from arbs_jax.run.checkpoints import Checkpointer
from arbs_jax.run.folder import RunFolder, config_differences

CONFIG = {"z_first": 1, "model": {"width": 128, "depths": (1, 2)}, "train": {"steps": 10, "lr": 0.1}, "note": "naïve"}
SAVED = {**CONFIG, "model": {"width": 128, "depths": [1, 2]}}


def started(path: Path) -> Path:
    """A run with a checkpoint, left by its trainer."""
    with RunFolder.create(path, CONFIG, resume=False) as run, Checkpointer(run.checkpoints) as saver:
        saver.save(1, {"a": np.array(2**40)}, {})
    return path


def changed(**train) -> dict:
    return {**CONFIG, "train": {**CONFIG["train"], **train}}


def test_paths(tmp_path):
    run = RunFolder(str(tmp_path))
    assert run.path == tmp_path
    names = [run.config, run.metrics, run.loss_plot, run.samples, run.checkpoints, run.tensorboard]
    assert [path.relative_to(tmp_path).as_posix() for path in names] == [
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "sample.txt",
        "checkpoints",
        "tensorboard",
    ]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.path = tmp_path / "other"


def test_create_writes_the_config_in_its_order(tmp_path):
    with RunFolder.create(tmp_path / "deep" / "run", CONFIG, resume=False) as run:
        text = run.config.read_text()
        assert text.startswith('{\n  "z_first": 1,\n  "model": {')
        assert list(json.loads(text)) == list(CONFIG)
        assert run.read_config() == SAVED
        assert RunFolder(run.path) == run


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    RunFolder.create(tmp_path, CONFIG, resume=False).release()
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already; pass --resume or choose another --run"):
        RunFolder.create(tmp_path, {"other": 1}, resume=False)
    assert (tmp_path / "config.json").read_bytes() == before


def test_checkpoints_without_a_config_are_not_run_over(tmp_path):
    (started(tmp_path) / "config.json").unlink()
    with pytest.raises(ConfigError, match="holds a run already"):
        RunFolder.create(tmp_path, CONFIG, resume=False)


def test_resume_with_the_same_config(tmp_path):
    with RunFolder.create(started(tmp_path), CONFIG, resume=True) as run:
        assert run.read_config() == SAVED
        assert Checkpointer(run.checkpoints).restore()[0]["a"] == 2**40


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing to resume in --run .*none: it has no config.json"):
        RunFolder.create(tmp_path / "none", CONFIG, resume=True)
    assert not (tmp_path / "none").exists()


def test_resume_needs_a_checkpoint(tmp_path):
    RunFolder.create(tmp_path, CONFIG, resume=False).release()
    with pytest.raises(CheckpointError, match="has no checkpoint to resume from"):
        RunFolder.create(tmp_path, CONFIG, resume=True)


def test_resume_with_another_config_names_every_key_and_both_values(tmp_path):
    other = {"model": {"width": 256, "depths": [1, 2]}, "train": {"steps": 10, "lr": 0.1, "new": None}, "note": "naïve"}
    before = (started(tmp_path) / "config.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        RunFolder.create(tmp_path, other, resume=True)
    message = str(caught.value)
    assert "z_first: saved 1, now '(absent)'" in message
    assert "model.width: saved 128, now 256" in message
    assert "train.new: saved '(absent)', now None" in message
    assert "train.steps" not in message
    assert (tmp_path / "config.json").read_bytes() == before


def test_keys_that_may_change_are_taken_over(tmp_path):
    longer = changed(steps=20, lr=0.2)
    with pytest.raises(ConfigError, match=r"\(train.lr: saved 0.1, now 0.2\)"):
        RunFolder.create(started(tmp_path), longer, resume=True, may_change=frozenset({"train.steps"}))
    # The refusal gave the lock back.
    with RunFolder.create(tmp_path, longer, resume=True, may_change=frozenset({"train.steps", "train.lr"})) as run:
        assert run.read_config()["train"] == {"steps": 20, "lr": 0.2}


def test_config_differences():
    assert config_differences(SAVED, SAVED) == []
    assert config_differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 4}}, frozenset({"a"})) == []
    # A key allows what lies below it, not whatever starts with the same letters.
    assert config_differences({"ab": 1}, {"ab": 2}, frozenset({"a"})) == [("ab", 1, 2)]
    assert config_differences({"a": 1}, {"a": {"b": 1}}) == [("a", 1, "(absent)"), ("a.b", "(absent)", 1)]
    assert config_differences({"a": {}}, {"a": {"b": 1}}) == [("a", {}, "(absent)"), ("a.b", "(absent)", 1)]


@pytest.mark.parametrize("value", [float("nan"), np.int64(3), b"bytes"])
def test_a_config_that_json_cannot_hold(tmp_path, value):
    with pytest.raises(ConfigError, match="the configuration must be plain, finite JSON"):
        RunFolder.create(tmp_path / "run", {"a": value}, resume=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[]", "holds a list, not an object")])
def test_a_broken_config(tmp_path, text, message):
    (started(tmp_path) / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        RunFolder.create(tmp_path, CONFIG, resume=True)


def test_read_config_of_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run: it has no config.json"):
        RunFolder(tmp_path).read_config()


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="cannot be used as a run folder"):
        RunFolder.create(tmp_path / "run", CONFIG, resume=False)


def test_a_full_disk_gives_the_lock_back(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_atomic", full)
        with pytest.raises(ConfigError, match="the configuration cannot be written: No space left"):
            RunFolder.create(tmp_path, CONFIG, resume=False)
    RunFolder.create(tmp_path, CONFIG, resume=False).release()


def test_two_trainers_do_not_share_a_folder(tmp_path):
    first = RunFolder.create(started(tmp_path), CONFIG, resume=True)
    before = first.config.read_bytes()
    with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()}; wait for it, or"):
        RunFolder.create(tmp_path, changed(steps=99), resume=True, may_change=frozenset({"train"}))
    assert first.config.read_bytes() == before
    first.release()
    first.release()
    RunFolder.create(tmp_path, CONFIG, resume=True).release()


HOLDER = """
import sys
from arbs_jax.run.folder import RunFolder
run = RunFolder.create(sys.argv[1], {}, resume=False)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_killed_trainer_leaves_no_lock(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(arbs_jax.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ConfigError, match=f"in use by process {holder.pid}"):
                RunFolder.create(tmp_path / "run", {}, resume=False)
        finally:
            holder.kill()
    with pytest.raises(ConfigError, match="holds a run already"):
        RunFolder.create(tmp_path / "run", {}, resume=False)

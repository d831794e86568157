"""Checkpoints: nothing is lost, nothing half-written counts, and damage is named."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import arbs_jax
from arbs_jax.errors import CheckpointError, ConfigError
from arbs_jax.run import checkpoints, manifest
from arbs_jax.run.checkpoints import Checkpointer, list_steps
from arbs_jax.run.compare import Difference, LeafSpec, compare_trees, merge_trees, resume_tree
from arbs_jax.run.limbs import PERSISTENT_DTYPES, flatten_tree, from_limbs, to_device


def make_tree(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    extremes = {
        name: np.array([[np.iinfo(name).min, seed % 100], [1, np.iinfo(name).max]], name) for name in PERSISTENT_DTYPES
    }
    return {
        "layer.0": {
            "trits": rng.integers(0, 243, (16, 32), dtype=np.uint8),
            "corr": np.array([[2**40, -(2**40), seed]], np.int64),
            "votes": np.array(2**40 + seed, np.int64),
        },
        "extremes": extremes,
        "nothing": {},
        "no_rows": np.zeros((0, 3), np.int64),
    }


def assert_same(tree: dict, wanted: dict) -> None:
    have, want = flatten_tree(tree), flatten_tree(wanted)
    assert list(have) == list(want)
    for path, leaf in want.items():
        if isinstance(leaf, dict):
            assert have[path] == {}
        else:
            assert type(have[path]) is np.ndarray
            np.testing.assert_array_equal(have[path], leaf, strict=True)


def save_all(folder: Path, steps: list[int]) -> None:
    with Checkpointer(folder, keep=10) as saver:
        for step in steps:
            saver.save(step, make_tree(step), {"step": step})


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if "tmp" in path.name]


def in_subprocess(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(arbs_jax.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)


def largest_data_file(checkpoint: Path) -> Path:
    files = (path for path in (checkpoint / "state").rglob("*") if path.is_file() and path.parent.name == "d")
    return max(files, key=lambda path: path.stat().st_size)


# Round trips.


@pytest.mark.parametrize("place", [lambda tree: tree, to_device], ids=["numpy", "jax"])
def test_round_trip(tmp_path, place):
    metadata = {"step": 7, "config": {"lr": 0.1, "shape": [1, 2]}, "big": 2**60, "best": None, "text": "naïve"}
    with Checkpointer(tmp_path / "new" / "checkpoints") as saver:
        saver.save(7, place(make_tree(7)), metadata)
        tree, saved = saver.restore()
    assert_same(tree, make_tree(7))
    assert saved == metadata


def test_a_reader_changes_nothing(tmp_path):
    """A reader may look on while a trainer saves, so it must not even tidy up."""
    save_all(tmp_path, [1])
    (tmp_path / ".tmp-000000002").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with Checkpointer(tmp_path) as reader:
        assert_same(reader.restore(1)[0], make_tree(1))
        assert reader.steps() == [1]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_save_copies_before_it_returns(tmp_path, monkeypatch):
    """The writer is held back until the caller has donated its arrays and overwritten the rest."""
    release = threading.Event()
    real = checkpoints.write_checkpoint

    def slow(*args):
        assert release.wait(60)
        real(*args)

    monkeypatch.setattr(checkpoints, "write_checkpoint", slow)
    placed = to_device({"a": np.arange(5000, dtype=np.int64) + 2**40})
    mine = np.arange(5000, dtype=np.int32)
    metadata = {"list": [1]}
    with Checkpointer(tmp_path) as saver:
        saver.save(1, {**placed, "b": mine}, metadata)
        assert saver.steps() == []  # asynchronous: save has returned and nothing is there yet
        jax.jit(lambda tree: {"a": tree["a"] * 0}, donate_argnums=0)(placed)["a"].block_until_ready()
        mine[:] = 0
        metadata["list"].append(2)
        release.set()
        saver.wait()
        assert saver.steps() == [1]
        tree, saved = saver.restore()
    np.testing.assert_array_equal(tree["a"], np.arange(5000, dtype=np.int64) + 2**40, strict=True)
    np.testing.assert_array_equal(tree["b"], np.arange(5000, dtype=np.int32), strict=True)
    assert saved == {"list": [1]}


def test_an_empty_tree_round_trips(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(0, {}, {})
        assert saver.restore(0) == ({}, {})


def test_orbax_itself_never_sees_int64(tmp_path):
    """Whatever reads the state through Orbax, as JAX arrays too, finds limbs that hold every bit."""
    save_all(tmp_path, [1])
    arguments = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in flatten_tree(make_tree(1))}
    del arguments["nothing"], arguments["no_rows"]  # not stored: the manifest brings them back
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        stored = reader.restore(tmp_path / "000000001" / "state", ocp.args.PyTreeRestore(restore_args=arguments))
    assert {leaf.dtype.name for leaf in stored.values()} == set(PERSISTENT_DTYPES) - {"int64"}
    np.testing.assert_array_equal(stored["layer.0/votes"], np.array([1, 256], np.uint32), strict=True)
    np.testing.assert_array_equal(from_limbs(stored["layer.0/corr"]), make_tree(1)["layer.0"]["corr"], strict=True)


def test_large_leaf_round_trips(tmp_path):
    tree = {"a": np.random.default_rng(0).integers(-(2**62), 2**62, (300, 1000))}
    with Checkpointer(tmp_path) as saver:
        saver.save(1, tree, {})
        assert_same(saver.restore()[0], tree)


# Names and retention.


def test_keeps_the_last_and_the_tagged(tmp_path):
    with Checkpointer(tmp_path, keep=2) as saver:
        for step in range(10, 80, 10):
            saver.save(step, make_tree(step), {"step": step}, tags=("latest", "best") if step == 20 else ("latest",))
        saver.wait()
        assert saver.steps() == [20, 60, 70]
        assert saver.tags() == {"latest": 70, "best": 20}
        assert saver.restore("best")[1] == {"step": 20}
        assert saver.restore("latest")[1] == {"step": 70}
        assert saver.restore(60)[1] == {"step": 60}
        saver.tag(70, "best", "final")
        saver.save(80, make_tree(80), {"step": 80})
        saver.wait()
        assert saver.steps() == [70, 80]
        assert saver.restore("final")[1] == {"step": 70}
    assert hidden(tmp_path) == []


def test_latest_without_a_pointer_is_the_highest(tmp_path):
    save_all(tmp_path, [9, 10])
    (tmp_path / "latest").unlink()
    assert Checkpointer(tmp_path).restore()[1] == {"step": 10}


def test_going_back_drops_the_abandoned_future(tmp_path):
    with Checkpointer(tmp_path, keep=3) as saver:
        saver.save(1, make_tree(1), {})
        saver.save(2, make_tree(2), {}, tags=("latest", "best"))
        saver.save(3, make_tree(3), {})
    with Checkpointer(tmp_path, keep=3) as saver:
        assert saver.restore(1)
        saver.save(1, make_tree(11), {"again": True})
        saver.wait()
        assert saver.steps() == [1, 2]
        assert saver.tags() == {"latest": 1, "best": 2}


def test_saving_a_step_again_replaces_it(tmp_path):
    with Checkpointer(tmp_path) as saver:
        for seed in range(3):
            saver.save(5, make_tree(seed), {"seed": seed})
        saver.wait()
        assert saver.steps() == [5]
        tree, metadata = saver.restore(5)
    assert metadata == {"seed": 2}
    assert_same(tree, make_tree(2))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["000000005.2"]


def test_missing_checkpoints(tmp_path):
    reader = Checkpointer(tmp_path / "none")
    assert reader.steps() == []
    assert not (tmp_path / "none").exists()
    with pytest.raises(CheckpointError, match=r"no checkpoint 'latest' in .*no checkpoint is there"):
        reader.restore()
    save_all(tmp_path, [1, 2])
    reader = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 .*checkpoints there: 1, 2"):
        reader.restore(3)
    with pytest.raises(CheckpointError, match="no checkpoint 'best'"):
        reader.restore("best")
    with pytest.raises(CheckpointError, match="unknown checkpoint name 'newest'"):
        reader.restore("newest")
    with pytest.raises(CheckpointError, match="cannot tag step 3"):
        reader.tag(3, "best")


def test_a_pointer_to_a_removed_checkpoint(tmp_path):
    save_all(tmp_path, [1])
    (tmp_path / "best").write_text("4\n")
    with pytest.raises(CheckpointError, match=r"no checkpoint 'best' \(step 4\)"):
        Checkpointer(tmp_path).restore("best")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, {"w": {"x": np.zeros(2, np.float32)}}, {}), "leaf w/x has dtype float32"),
        ((1, {"w": 3}, {}), "leaf w is a int"),
        ((-1, {}, {}), "must not be negative, got -1"),
        ((1, {}, {"loss": float("nan")}), "metadata must be plain, finite JSON"),
        ((1, {}, {"loss": np.int64(3)}), "metadata must be plain, finite JSON"),
    ],
)
def test_save_refuses_at_once(tmp_path, arguments, message):
    saver = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        saver.save(*arguments)
    with pytest.raises(CheckpointError, match="unknown checkpoint name 'good'"):
        saver.save(1, {}, {}, tags=("good",))
    saver.close()
    assert list(tmp_path.iterdir()) == []


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        Checkpointer(tmp_path, keep=0)


# Damage.


def damage_truncate(checkpoint: Path) -> str:
    file = largest_data_file(checkpoint)
    file.write_bytes(file.read_bytes()[:-7])
    return f"000000003/state/.*{file.name} has .* bytes instead of"


def damage_flip(checkpoint: Path) -> str:
    flip_last_byte(largest_data_file(checkpoint))
    return "000000003/state cannot be read|leaf .* does not match"


def damage_remove_file(checkpoint: Path) -> str:
    file = largest_data_file(checkpoint)
    file.unlink()
    return f"{file.name} is missing"


def damage_remove_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").unlink()
    return "000000003/manifest.json is missing"


def damage_truncate_manifest(checkpoint: Path) -> str:
    path = checkpoint / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])
    return "000000003/manifest.json cannot be read"


def damage_edit_metadata(checkpoint: Path) -> str:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"step": 3\n', '"step": 4\n', 1))
    return "manifest.json was changed"


def damage_binary_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").write_bytes(b"\xff\xfe\x00")
    return "manifest.json cannot be read"


def damage_wrong_kind_of_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").write_text("[]")
    return "manifest.json is not a checkpoint manifest"


def damage_newer_format(checkpoint: Path) -> str:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    return "has format 9, this version reads 1"


def rewrite_manifest(checkpoint: Path, change) -> None:
    """Change a manifest and mend its digest, as somebody who means it would."""
    path = checkpoint / "manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    change(body)
    path.write_text(json.dumps({**body, "sha256": manifest._digest(body)}))


def damage_leaf_hash(checkpoint: Path) -> str:
    rewrite_manifest(checkpoint, lambda body: body["leaves"][1].update(sha256="0" * 64))
    return "leaf layer.0/corr in 000000003 does not match its SHA-256"


def damage_leaf_dtype(checkpoint: Path) -> str:
    rewrite_manifest(checkpoint, lambda body: body["leaves"][0].update(dtype="int8"))
    return r"leaf layer.0/trits came back as uint8 \(16, 32\) instead of int8"


def damage_leaf_dropped(checkpoint: Path) -> str:
    rewrite_manifest(checkpoint, lambda body: body["leaves"].append({**body["leaves"][0], "path": "other"}))
    return "000000003/state cannot be read"


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_last_good_one_offered(tmp_path, damage):
    save_all(tmp_path, [1, 2, 3])
    (tmp_path / "000000002" / "manifest.json").write_text("{")
    message = damage(tmp_path / "000000003")
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpointer(tmp_path).restore()
    first, second = str(caught.value).splitlines()
    assert first.startswith("checkpoint 3 is damaged: ")
    assert second == "checkpoint 1 is good: ask for step 1 instead"
    assert_same(Checkpointer(tmp_path).restore(1)[0], make_tree(1))


def test_offers_a_newer_one_when_no_older_is_good(tmp_path):
    save_all(tmp_path, [1, 2, 3])
    flip_last_byte(largest_data_file(tmp_path / "000000001"))
    with pytest.raises(CheckpointError, match="checkpoint 2 is good"):
        Checkpointer(tmp_path).restore(1)
    for step in (2, 3):
        (tmp_path / f"{step:09d}" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no other checkpoint in .* is good"):
        Checkpointer(tmp_path).restore(1)


def test_a_renamed_checkpoint_is_noticed(tmp_path):
    save_all(tmp_path, [1])
    (tmp_path / "000000001").rename(tmp_path / "000000002")
    with pytest.raises(CheckpointError, match="000000002 holds step 1"):
        Checkpointer(tmp_path).restore(2)


# Failing and dying while saving.


@pytest.mark.parametrize("stage", ["_save_state", "write_manifest"])
@pytest.mark.parametrize("call", ["save", "wait", "close", "restore", "tag"])
def test_an_error_of_the_thread_is_raised_by_the_next_call(tmp_path, monkeypatch, stage, call):
    saver = Checkpointer(tmp_path)
    saver.save(1, make_tree(1), {})
    saver.wait()
    with monkeypatch.context() as patch:

        def full(folder, *_):
            folder.mkdir(exist_ok=True)
            (folder / "half").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(f"arbs_jax.run.storage.{stage}", full)
        saver.save(2, make_tree(2), {})
        calls = {"save": (3, make_tree(3), {}), "tag": (1, "best")}
        with pytest.raises(CheckpointError, match=r"saving step 2 .*No space left.*checkpoints there: 1$"):
            getattr(saver, call)(*calls.get(call, ()))
    assert hidden(tmp_path) == []
    assert saver.tags() == {"latest": 1}
    assert_same(Checkpointer(tmp_path).restore()[0], make_tree(1))
    if call != "close":
        saver.save(4, make_tree(4), {})
        saver.close()
        assert list_steps(tmp_path) == [1, 4]


LIMITED = """
import resource, sys
import numpy as np
from arbs_jax.errors import CheckpointError
from arbs_jax.run.checkpoints import Checkpointer
saver = Checkpointer(sys.argv[1])
saver.save(1, {"a": np.arange(1000) + 2**40}, {})
saver.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
saver.save(2, {"a": np.random.default_rng(0).integers(0, 2**62, 1_000_000)}, {})
try:
    saver.close()
except CheckpointError as error:
    print(error)
"""


def test_a_real_write_error_leaves_the_earlier_checkpoint(tmp_path):
    """The kernel refuses to let the file grow, in the middle of TensorStore's own writing."""
    done = in_subprocess(LIMITED, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"saving step 2 in {tmp_path} failed: "), done.stderr
    assert done.stdout.rstrip().endswith("checkpoints there: 1")
    assert hidden(tmp_path) == []
    np.testing.assert_array_equal(Checkpointer(tmp_path).restore()[0]["a"], np.arange(1000) + 2**40, strict=True)


KILLED = """
import os, signal, sys
import numpy as np
from arbs_jax.run import storage
from arbs_jax.run.checkpoints import Checkpointer
saver = Checkpointer(sys.argv[1])
saver.save(1, {"a": np.arange(1000) + 2**40}, {})
saver.wait()
storage.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
saver.save(2, {"a": np.arange(1000)}, {})
saver.wait()
"""


def test_kill_while_saving_leaves_the_earlier_checkpoint(tmp_path):
    assert in_subprocess(KILLED, tmp_path).returncode == -9
    assert hidden(tmp_path) != []  # it did die in the middle
    with Checkpointer(tmp_path) as saver:
        assert saver.steps() == [1]
        np.testing.assert_array_equal(saver.restore()[0]["a"], np.arange(1000) + 2**40, strict=True)
        saver.save(2, make_tree(2), {})
        saver.wait()
        assert hidden(tmp_path) == []
        assert_same(saver.restore()[0], make_tree(2))


FORGETFUL = """
import sys
import numpy as np
from arbs_jax.run import storage
from arbs_jax.run.checkpoints import Checkpointer
def full(*_):
    raise OSError("No space left on device")
storage.write_manifest = full
Checkpointer(sys.argv[1]).save(1, {"a": np.arange(1000)}, {})
"""


def test_an_error_is_told_even_if_nobody_closes(tmp_path):
    assert f"CheckpointError: saving step 1 in {tmp_path} failed" in in_subprocess(FORGETFUL, tmp_path).stderr
    assert list(tmp_path.iterdir()) == []


def test_kill_between_rename_and_pruning_is_mended_by_the_next_save(tmp_path):
    save_all(tmp_path, [1])
    shutil.copytree(tmp_path / "000000001", tmp_path / "000000001.1")
    with Checkpointer(tmp_path) as saver:
        assert saver.steps() == [1]
        saver.save(2, make_tree(2), {})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["000000001.1", "000000002"]


# Comparing and merging.

FRESH = {
    "a": np.zeros((2, 3), np.int8),
    "b": {"c": np.zeros(4, np.int64), "d": np.zeros(4, np.uint8)},
    "added": np.zeros(1, np.int32),
    "empty": {},
}
SAVED = {
    "b": {"d": np.ones(4, np.int8), "c": np.full(4, 2**40)},
    "a": np.ones((2, 4), np.int8),
    "gone": np.ones(3, np.uint8),
    "kept": {},
}


def test_compare_names_every_difference():
    assert compare_trees(SAVED, FRESH) == [
        Difference("a", LeafSpec("int8", (2, 4)), LeafSpec("int8", (2, 3)), "changed"),
        Difference("b/d", LeafSpec("int8", (4,)), LeafSpec("uint8", (4,)), "changed"),
        Difference("added", None, LeafSpec("int32", (1,)), "new"),
        Difference("gone", LeafSpec("uint8", (3,)), None, "dropped"),
    ]
    assert compare_trees(SAVED, SAVED) == []


def test_compare_takes_abstract_and_device_arrays():
    tree = make_tree()
    assert compare_trees(tree, to_device(tree)) == []
    assert compare_trees({"a": np.zeros(2, np.int64)}, {"a": jax.ShapeDtypeStruct((2,), np.uint8)}) == [
        Difference("a", LeafSpec("int64", (2,)), LeafSpec("uint8", (2,)), "changed")
    ]


def test_merge_loads_what_agrees():
    tree, report = merge_trees(SAVED, FRESH)
    assert (report.loaded, report.new) == (("b/c",), ("added",))
    assert (report.changed, report.dropped) == (("a", "b/d"), ("gone",))
    assert list(flatten_tree(tree)) == list(flatten_tree(FRESH))
    assert tree["b"]["c"] is SAVED["b"]["c"]
    assert tree["a"] is FRESH["a"]
    assert tree["b"]["d"] is FRESH["b"]["d"]
    assert tree["empty"] == {}
    np.testing.assert_array_equal(FRESH["b"]["c"], np.zeros(4, np.int64))  # the inputs are as they were


def test_a_changed_architecture_is_refused_unless_merging():
    with pytest.raises(CheckpointError, match="differ in 4 leaves") as caught:
        resume_tree(SAVED, FRESH, merge=False)
    table = str(caught.value)
    for words in (("a", "int8 (2, 4)", "int8 (2, 3)", "changed"), ("added", "-", "new"), ("gone", "uint8 (3,)")):
        assert any(all(word in line for word in words) for line in table.splitlines())
    assert resume_tree(SAVED, FRESH, merge=True)[1] == merge_trees(SAVED, FRESH)[1]
    tree, report = resume_tree(SAVED, SAVED, merge=False)
    assert_same(tree, SAVED)
    assert (report.new, report.changed, report.dropped) == ((), (), ())


def test_the_table_folds_long_paths_instead_of_cutting_them():
    path = "layer_" + "x" * 150
    with pytest.raises(CheckpointError) as caught:
        resume_tree({}, {path: np.zeros(1, np.int8)}, merge=False)
    assert str(caught.value).count("x") >= 150

"""Checkpoints: nothing is lost, the right ones are kept, and differences from what is expected are named."""

import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_trees import assert_same, hidden, make_tree, save_all

from arbs_jax.errors import CheckpointError, ConfigError
from arbs_jax.run import checkpoints
from arbs_jax.run.checkpoints import Checkpointer
from arbs_jax.run.compare import Difference, LeafSpec, compare_trees, merge_trees, resume_tree
from arbs_jax.run.limbs import PERSISTENT_DTYPES, flatten_tree, from_limbs, to_device

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

"""Damaged and interrupted checkpoints: nothing half-written counts, damage is named, and the last good one is kept."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_trees import assert_same, hidden, make_tree, save_all

import arbs_jax
from arbs_jax.errors import CheckpointError
from arbs_jax.run import manifest
from arbs_jax.run.checkpoints import Checkpointer, list_steps
from arbs_jax.run.storage import late_callbacks_ignored


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


# Damage.


def damage_truncate(checkpoint: Path) -> str:
    file = largest_data_file(checkpoint)
    file.write_bytes(file.read_bytes()[:-7])
    return f"000000003/state/.*{file.name} has .* bytes instead of"


def damage_flip(checkpoint: Path) -> str:
    file = largest_data_file(checkpoint)
    flip_last_byte(file)
    return f"000000003/state/.*{file.name} does not match its SHA-256"


def damage_remove_file(checkpoint: Path) -> str:
    file = largest_data_file(checkpoint)
    file.unlink()
    return f"{file.name} is missing"


def damage_folder_for_file(checkpoint: Path) -> str:
    file = largest_data_file(checkpoint)
    file.unlink()
    file.mkdir()
    return f"000000003/state/.*{file.name} cannot be read"


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
    path.write_text(path.read_text().replace(f'"format": {manifest.FORMAT}', '"format": 9'))
    return f"has format 9, this version reads {manifest.FORMAT};"


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


def test_orbax_never_meets_a_damaged_file(tmp_path, monkeypatch):
    """Its reads run side by side, and those that a failing one leaves behind complain on stderr about a closed loop."""
    save_all(tmp_path, [1])
    monkeypatch.setattr("arbs_jax.run.storage._load_state", lambda *_: pytest.fail("Orbax was asked to read"))
    files = [path for path in (tmp_path / "000000001" / "state").rglob("*") if path.is_file()]
    assert len(files) > 4
    for file in files:
        whole = file.read_bytes()
        flip_last_byte(file)
        with pytest.raises(CheckpointError, match=f"{file.name} does not match its SHA-256"):
            Checkpointer(tmp_path).restore()
        file.write_bytes(whole)


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


def test_only_the_closed_loop_is_kept_from_stderr(monkeypatch: pytest.MonkeyPatch):
    """An error nobody can catch is reported as ever, unless it is TensorStore's call of a loop that Orbax closed."""
    reported: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(str(unraisable.exc_value)))

    class Late:
        def __init__(self, message: str):
            self.message = message

        def __del__(self):
            raise RuntimeError(self.message)

    def fail() -> None:
        with late_callbacks_ignored():
            Late("Event loop is closed")
            Late("something else")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert reported == ["something else"]
    Late("Event loop is closed")
    assert reported == ["something else", "Event loop is closed"]

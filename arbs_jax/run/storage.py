"""The contents of one checkpoint folder: leaves through Orbax, everything about them in the manifest."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from arbs_jax.errors import CheckpointError
from arbs_jax.run.limbs import Tree, from_storable, to_storable, unflatten_tree
from arbs_jax.run.manifest import EMPTY, hash_array, read_manifest, write_manifest

_STATE = "state"


def brief(error: BaseException) -> str:
    """The first line of an error, short enough for a terminal; TensorStore's own run to a page."""
    text = str(error).strip().splitlines()
    line = text[0] if text else ""
    return f"{type(error).__name__}: {line[:160]}{'...' if len(line) > 160 else ''}"


@contextmanager
def late_callbacks_ignored() -> Iterator[None]:
    """Keeps stderr free of "Event loop is closed" while Orbax works, and of nothing else.

    Orbax reads and writes leaves side by side. Where one fails it cancels the others and closes its event loop, and
    TensorStore's threads then call the closed loop: an error after the error, which nobody could catch.
    """
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            usual(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    except BaseException:
        time.sleep(0.1)  # The callbacks come within a millisecond.
        raise
    finally:
        sys.unraisablehook = usual


def _save_state(folder: Path, flat: Mapping[str, Any]) -> None:
    # Orbax refuses arrays without elements; the manifest alone brings those back.
    stored = {path: to_storable(leaf) for path, leaf in flat.items() if not isinstance(leaf, dict) and leaf.size}
    if stored:
        with late_callbacks_ignored(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder.absolute(), ocp.args.PyTreeSave(stored))


def _load_state(folder: Path, paths: list[str]) -> dict[str, np.ndarray]:
    if not paths:
        return {}
    arguments = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths}
    with late_callbacks_ignored(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder.absolute(), ocp.args.PyTreeRestore(restore_args=arguments))


def write_checkpoint(folder: Path, step: int, flat: Mapping[str, Any], metadata: dict[str, Any]) -> None:
    """Fill an empty folder with state and manifest. Not atomic: the caller renames the folder when it is whole.

    Args:
      flat: {path: NumPy array of a persistent dtype, or an empty dict}.

    Raises:
      OSError and whatever else Orbax raises: the folder is then of no use.
    """
    _save_state(folder / _STATE, flat)
    write_manifest(folder, step, flat, metadata)


def read_checkpoint(folder: Path, step: int) -> tuple[Tree, dict[str, Any]]:
    """Read one checkpoint's folder and verify every file and leaf.

    Returns:
      The tree, of NumPy arrays in the dtypes and shapes that were saved, and the metadata.

    Raises:
      CheckpointError: something is missing, truncated or changed; the message names the leaf or file.
    """
    # This verifies the files before Orbax sees them, which would read past a flipped byte or fail in words of its own.
    manifest = read_manifest(folder)
    if manifest["step"] != step:
        raise CheckpointError(f"{folder.name} holds step {manifest['step']}; was the folder renamed?")
    specs = {leaf["path"]: leaf for leaf in manifest["leaves"]}
    with_data = [path for path, leaf in specs.items() if leaf["dtype"] != EMPTY and 0 not in leaf["shape"]]
    try:
        stored = _load_state(folder / _STATE, with_data)
    except Exception as error:  # Orbax and TensorStore raise whatever they like for damaged data.
        raise CheckpointError(f"{folder.name}/{_STATE} cannot be read: {brief(error)}") from error
    flat: dict[str, Any] = {}
    for path, spec in specs.items():
        if spec["dtype"] == EMPTY:
            flat[path] = {}
            continue
        shape = tuple(spec["shape"])
        if path in with_data:
            flat[path] = from_storable(path, stored[path], spec["dtype"], shape)
        else:
            flat[path] = np.zeros(shape, spec["dtype"])
        if hash_array(flat[path]) != spec["sha256"]:
            raise CheckpointError(f"leaf {path} in {folder.name} does not match its SHA-256")
    return unflatten_tree(flat), manifest["metadata"]

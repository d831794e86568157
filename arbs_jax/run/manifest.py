"""The manifest of a checkpoint: its leaves and files with a SHA-256 each, the metadata, and a digest of itself."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arbs_jax.errors import CheckpointError
from arbs_jax.run.files import to_json, write_atomic

FORMAT = 2
NAME = "manifest.json"
# An empty dict is part of a tree but nothing that Orbax stores; it appears in the manifest under this dtype.
EMPTY = "empty"


def hash_array(array: np.ndarray) -> str:
    """SHA-256 of a contiguous array's bytes, in hexadecimal."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8)).hexdigest()


def _describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file. Raises OSError."""
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def check_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of the metadata as JSON will give it back (tuples become lists).

    Raises:
      CheckpointError: a value that JSON cannot hold.
    """
    try:
        return json.loads(to_json(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint metadata must be plain, finite JSON (None for no value): {error}") from error


def write_manifest(folder: Path, step: int, flat: Mapping[str, Any], metadata: dict[str, Any]) -> None:
    """Describe the finished contents of `folder` in `folder/manifest.json`.

    Args:
      flat: {path: NumPy array or empty dict}, the leaves as the caller sees them (int64 as int64).

    Raises:
      OSError: the manifest could not be written, or a file of `folder` not be read.
    """
    leaves = [
        {"path": path, "dtype": EMPTY, "shape": [], "sha256": ""}
        if isinstance(leaf, dict)
        else {"path": path, "dtype": leaf.dtype.name, "shape": list(leaf.shape), "sha256": hash_array(leaf)}
        for path, leaf in flat.items()
    ]
    written = (file for file in sorted(folder.rglob("*")) if file.is_file())
    files = {str(file.relative_to(folder)): _describe_file(file) for file in written}
    body = {"format": FORMAT, "step": step, "metadata": metadata, "leaves": leaves, "files": files}
    text = to_json({**body, "sha256": _digest(body)}, indent=1)
    write_atomic(folder / NAME, text.encode() + b"\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after checking its own digest and every byte of the files it lists.

    Raises:
      CheckpointError: it is of another format, or it or a file is missing, unreadable, truncated or changed.
    """
    path = folder / NAME
    shown = f"{folder.name}/{NAME}"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{shown} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CheckpointError(f"{shown} is not a checkpoint manifest")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{shown} has format {manifest['format']!r}, this version reads {FORMAT}; use the version that wrote it"
        )
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != _digest(body):
        raise CheckpointError(f"{shown} was changed after it was written: its digest does not match")
    for name, wanted in manifest["files"].items():
        try:
            found = _describe_file(folder / name)
        except FileNotFoundError:
            raise CheckpointError(f"{folder.name}/{name} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{folder.name}/{name} cannot be read: {error}") from error
        if found["bytes"] != wanted["bytes"]:
            raise CheckpointError(f"{folder.name}/{name} has {found['bytes']} bytes instead of {wanted['bytes']}")
        if found["sha256"] != wanted["sha256"]:
            raise CheckpointError(f"{folder.name}/{name} does not match its SHA-256")
    return manifest

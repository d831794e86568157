"""Small files that are either the old one or the new one, never half of one."""

import json
import os
from pathlib import Path
from typing import Any


def sync_folder(folder: Path) -> None:
    """Make the renames inside `folder` survive a power cut. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_for(path: Path) -> Path:
    """The hidden neighbour of `path` that is written first and then renamed to `path`."""
    return path.with_name(f".{path.name}.tmp")


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one rename; on failure the old file stays and no temporary is left.

    Raises:
      OSError: the disk is full, the folder is missing or not writable.
    """
    temporary = temporary_for(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON in the order given: NaN and infinity, which JSON does not have, raise ValueError.

    Raises:
      TypeError: a value that JSON cannot hold (a NumPy number, bytes, ...).
      ValueError: NaN, infinity, or a value that contains itself.
    """
    return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)

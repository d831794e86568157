"""Checkpoints of integer state: atomic, asynchronous, verified on the way back.

    checkpoints/
      000001000/          one checkpoint: state/ (Orbax) and manifest.json; the folder appears in one rename
      000001000.1/        the same step saved again; the highest suffix counts, the others go
      latest best final   one-line pointer files that name a step

One process writes a folder at a time (`RunFolder` holds the lock for it); any number may read.
"""

import atexit
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from arbs_jax.errors import CheckpointError, ConfigError
from arbs_jax.run.files import sync_folder, write_atomic
from arbs_jax.run.limbs import Tree, flatten_tree, to_host
from arbs_jax.run.manifest import check_metadata
from arbs_jax.run.storage import brief, read_checkpoint, write_checkpoint

TAGS = ("latest", "best", "final")
_TEMPORARY = ".tmp-"
_STEP_NAME = re.compile(r"(\d{9,})(?:\.(\d+))?")


def _generations(folder: Path) -> dict[int, list[tuple[int, Path]]]:
    """{step: [(generation, folder), ...]}, both ascending."""
    found: dict[int, list[tuple[int, Path]]] = {}
    if folder.is_dir():
        for entry in folder.iterdir():
            match = _STEP_NAME.fullmatch(entry.name)
            if match and entry.is_dir():
                found.setdefault(int(match[1]), []).append((int(match[2] or 0), entry))
    return {step: sorted(found[step]) for step in sorted(found)}


def list_steps(folder: str | os.PathLike[str]) -> list[int]:
    """The steps that have a checkpoint in `folder`, ascending; none where the folder does not exist."""
    return list(_generations(Path(folder)))


class Checkpointer:
    """Saves and restores integer trees in one folder.

    `save` returns once the tree lies on the host; writing goes on in a thread of its own, one checkpoint at a time.
    An error there is raised by the next `save`, `tag`, `wait`, `restore` or `close`. Close it, or use it as a context:
    Python starts no threads once the main program is over, so a save under way then fails (and says so on stderr).
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3):
        """Look at the folder; nothing is written yet.

        Args:
          folder: created by the first save; a reader needs no right to write.
          keep: how many of the last checkpoints stay, besides those that a tag points at.

        Raises:
          ConfigError: keep < 1.
        """
        if keep < 1:
            raise ConfigError(f"keep must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._pending_step = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self, step: int, tree: Mapping[str, Any], metadata: Mapping[str, Any], *, tags: Iterable[str] = ("latest",)
    ) -> None:
        """Start saving `tree` as the checkpoint of `step`, and point `tags` at it once it is whole.

        Saving a step again replaces it. Checkpoints above `step` belong to a future that was abandoned when training
        went back to an earlier one; they are removed unless a tag other than "latest" holds them.

        Args:
          step: not negative.
          tree: nested dict of JAX or NumPy integer arrays, copied before this returns: the caller may donate them.
          metadata: plain JSON values; NaN and infinity are refused (use None).
          tags: any of "latest", "best", "final".

        Raises:
          CheckpointError: the previous save failed (then this one is not started), a leaf is not an integer array,
            the metadata are not JSON, or a tag is unknown.
        """
        names = _check_tags(tags)
        if step < 0:
            raise CheckpointError(f"a checkpoint's step must not be negative, got {step}")
        self.wait()
        plain = check_metadata(metadata)
        flat = flatten_tree(to_host(tree))
        atexit.unregister(self.wait)
        atexit.register(self.wait)  # the last chance to report an error if nobody closes this
        self._pending_step = step
        self._pending = self._worker.submit(self._write, step, flat, plain, names)

    def tag(self, step: int, *tags: str) -> None:
        """Point `tags` at a checkpoint that exists, after waiting for the save under way.

        Raises:
          CheckpointError: the save under way failed, there is no such checkpoint, or a tag is unknown.
        """
        names = _check_tags(tags)
        self.wait()
        if step not in self.steps():
            raise CheckpointError(f"cannot tag step {step}: {self._inventory()}")
        try:
            self._point(step, names)
        except OSError as error:
            raise CheckpointError(f"cannot tag step {step} in {self.folder}: {brief(error)}") from error

    def wait(self) -> None:
        """Wait until the save under way is on disk.

        Raises:
          CheckpointError: it failed; every earlier checkpoint is as it was.
        """
        if self._pending is None:
            return
        error = self._pending.exception()
        self._pending = None
        if error is None:
            return
        message = f"saving step {self._pending_step} in {self.folder} failed: {brief(error)}; {self._inventory()}"
        raise CheckpointError(message) from error

    def close(self) -> None:
        """`wait`, then end the thread. May be called twice. Raises what `wait` raises."""
        try:
            self.wait()
        finally:
            atexit.unregister(self.wait)
            self._worker.shutdown()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending (not one that is still being written)."""
        return list_steps(self.folder)

    def tags(self) -> dict[str, int]:
        """{tag: step} of the pointers that exist and can be read."""
        found = ((tag, self._pointer(tag)) for tag in TAGS)
        return {tag: step for tag, step in found if step is not None}

    def restore(self, which: str | int = "latest") -> tuple[Tree, dict[str, Any]]:
        """Read a checkpoint and check every byte of it against its manifest.

        Args:
          which: "latest", "best", "final", or a step. "latest" without a pointer file is the highest step.

        Returns:
          The tree, of NumPy arrays in the dtypes and shapes that were saved, and the metadata.

        Raises:
          CheckpointError: there is no such checkpoint, or it is damaged; the message then names the leaf or file and
            the nearest checkpoint that is good.
        """
        self.wait()
        step = self._resolve(which)
        try:
            return self._read(step)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {step} is damaged: {error}\n{self._offer(step)}") from error

    def _read(self, step: int) -> tuple[Tree, dict[str, Any]]:
        _, folder = _generations(self.folder)[step][-1]
        return read_checkpoint(folder, step)

    def _resolve(self, which: str | int) -> int:
        steps = self.steps()
        if isinstance(which, int):
            step, shown = which, f"of step {which}"
        else:
            _check_tags((which,))
            pointed = self._pointer(which)
            step = steps[-1] if pointed is None and which == "latest" and steps else pointed
            shown = f"{which!r}" if step is None else f"{which!r} (step {step})"
        if step is None or step not in steps:
            raise CheckpointError(f"there is no checkpoint {shown} in {self.folder}; {self._inventory()}")
        return step

    def _offer(self, damaged: int) -> str:
        """Name the newest older checkpoint that verifies, else the oldest newer one."""
        steps = self.steps()
        for step in [s for s in reversed(steps) if s < damaged] + [s for s in steps if s > damaged]:
            try:
                self._read(step)
            except CheckpointError:
                continue
            return f"checkpoint {step} is good: ask for step {step} instead"
        return f"no other checkpoint in {self.folder} is good"

    def _inventory(self) -> str:
        steps = self.steps()
        return f"checkpoints there: {', '.join(map(str, steps))}" if steps else "no checkpoint is there"

    def _pointer(self, tag: str) -> int | None:
        try:
            return int((self.folder / tag).read_text())
        except (OSError, ValueError):
            return None

    def _point(self, step: int, tags: Iterable[str]) -> None:
        for tag in tags:
            write_atomic(self.folder / tag, f"{step}\n".encode())

    def _write(self, step: int, flat: dict[str, Any], metadata: dict[str, Any], tags: tuple[str, ...]) -> None:
        """The asynchronous half of `save`: everything under a hidden name, then one rename, then the pointers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        temporary = self.folder / f"{_TEMPORARY}{step:09d}"
        try:
            temporary.mkdir()
            write_checkpoint(temporary, step, flat, metadata)
            present = _generations(self.folder).get(step, [])
            suffix = f".{present[-1][0] + 1}" if present else ""
            os.rename(temporary, self.folder / f"{step:09d}{suffix}")
            sync_folder(self.folder)
        except BaseException:
            self._remove_leftovers()
            raise
        self._point(step, tags)
        self._prune(step)

    def _remove_leftovers(self) -> None:
        """Remove what a killed or failed save left; only the writer does this, since a reader may look on meanwhile."""
        for entry in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(entry, ignore_errors=True)

    def _prune(self, saved: int) -> None:
        present = _generations(self.folder)
        wanted = {*[step for step in present if step <= saved][-self.keep :], *self.tags().values()}
        for step, generations in present.items():
            for _, folder in generations[:-1] if step in wanted else generations:
                # First out of sight in one rename, so that a kill here cannot leave half a checkpoint under its name.
                doomed = self.folder / f"{_TEMPORARY}{folder.name}"
                os.rename(folder, doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def _check_tags(tags: Iterable[str]) -> tuple[str, ...]:
    names = (tags,) if isinstance(tags, str) else tuple(tags)
    for name in names:
        if name not in TAGS:
            raise CheckpointError(f"unknown checkpoint name {name!r}; it is one of {', '.join(TAGS)}, or a step number")
    return names

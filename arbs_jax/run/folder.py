"""The folder of one training run: where things lie, its configuration, and the lock that keeps trainers apart."""

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from arbs_jax.errors import CheckpointError, ConfigError
from arbs_jax.run.checkpoints import list_steps
from arbs_jax.run.files import to_json, write_atomic

_ABSENT = "(absent)"


@dataclass
class RunLock:
    """An exclusive lock on a run folder. It ends with `release` or with the process, however that dies."""

    handle: int | None

    @classmethod
    def acquire(cls, folder: Path) -> Self:
        """Take the lock of a folder that exists.

        Raises:
          ConfigError: another process holds it; the message gives its process id.
          OSError: the lock file cannot be made.
        """
        # A bare descriptor rather than a file object: the lock must not end because somebody dropped a reference.
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise ConfigError(
                f"--run {folder} is in use by process {owner}; wait for it, or choose another --run"
            ) from None
        except OSError as error:
            # Some network filesystems have no locks; a run there goes without one.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(handle)
                raise
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        return cls(handle)

    def release(self) -> None:
        """Give the lock back; may be called twice."""
        handle, self.handle = self.handle, None
        if handle is not None:
            os.close(handle)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _may_change(key: str, allowed: frozenset[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:length]) in allowed for length in range(1, len(parts) + 1))


def config_differences(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], may_change: frozenset[str] = frozenset()
) -> list[tuple[str, Any, Any]]:
    """[(dotted key, saved value, wanted value)] of the keys that differ and may not; "(absent)" where one lacks it.

    Args:
      saved, wanted: nested dicts of JSON values.
      may_change: dotted keys to leave out; "train" leaves out all of "train.*".
    """
    old, new = _flatten(saved), _flatten(wanted)
    keys = [*old, *(key for key in new if key not in old)]
    pairs = [(key, old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys]
    return [(key, was, now) for key, was, now in pairs if was != now and not _may_change(key, may_change)]


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder. `RunFolder(path)` only looks; a trainer gets its own from `create`."""

    path: Path
    """The folder itself."""
    lock: RunLock | None = field(default=None, repr=False, compare=False)
    """Held by the trainer that `create` made this for; None for a reader."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def config(self) -> Path:
        """The configuration, JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def loss_plot(self) -> Path:
        """The picture of the losses."""
        return self.path / "loss.png"

    @property
    def samples(self) -> Path:
        """Text that the model wrote."""
        return self.path / "sample.txt"

    @property
    def checkpoints(self) -> Path:
        """Folder for a `Checkpointer`."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard events."""
        return self.path / "tensorboard"

    def read_config(self) -> dict[str, Any]:
        """The saved configuration.

        Raises:
          ConfigError: it is missing or is not a JSON object.
        """
        try:
            config = json.loads(self.config.read_bytes())
        except FileNotFoundError:
            raise ConfigError(f"--run {self.path} is not a run: it has no {self.config.name}") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.config} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{self.config} holds a {type(config).__name__}, not an object")
        return config

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        resume: bool,
        may_change: frozenset[str] = frozenset(),
    ) -> Self:
        """Start a run in a folder of its own, or go on with one; `config.json` then holds `config`.

        Args:
          config: nested dict of JSON values (tuples are saved as lists), written in its own order.
          resume: go on with the run that is there, rather than start one.
          may_change: dotted keys that may differ on resuming, such as "train.steps"; a key covers all below it.

        Returns:
          The run folder, locked until `release`, the end of the `with` block, or the end of the process.

        Raises:
          ConfigError: a run is there and was not to be resumed, none is there to resume, it was made with another
            configuration, another process trains in it, or the folder or the configuration cannot be written.
          CheckpointError: the run to be resumed has no checkpoint.
        """
        path = Path(path)
        try:
            wanted = json.loads(to_json(dict(config)))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the configuration must be plain, finite JSON: {error}") from error
        if resume and not (path / "config.json").is_file():
            raise ConfigError(f"nothing to resume in --run {path}: it has no config.json; start it without --resume")
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, RunLock.acquire(path))
        except OSError as error:
            raise ConfigError(f"--run {path} cannot be used as a run folder: {error}") from error
        try:
            run._check(wanted, resume, may_change)
            write_atomic(run.config, f"{to_json(wanted, indent=2)}\n".encode())
        except OSError as error:
            run.release()
            raise ConfigError(f"--run {path}: the configuration cannot be written: {error}") from error
        except BaseException:
            run.release()
            raise
        return run

    def _check(self, wanted: dict[str, Any], resume: bool, may_change: frozenset[str]) -> None:
        if not resume:
            if self.config.exists() or list_steps(self.checkpoints):
                raise ConfigError(f"--run {self.path} holds a run already; pass --resume or choose another --run")
            return
        if not list_steps(self.checkpoints):
            raise CheckpointError(
                f"--run {self.path} has no checkpoint to resume from; delete the folder or choose another --run, "
                "and start without --resume"
            )
        differences = config_differences(self.read_config(), wanted, may_change)
        if differences:
            listed = "; ".join(f"{key}: saved {was!r}, now {now!r}" for key, was, now in differences)
            raise ConfigError(
                f"--run {self.path} was started with another configuration ({listed}); "
                "give the saved values or choose another --run"
            )

    def release(self) -> None:
        """Give the lock back; may be called twice."""
        if self.lock is not None:
            self.lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

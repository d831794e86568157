"""Opening a finished or unfinished run for looking at it: sample, eval, audit."""

from dataclasses import dataclass, replace
from pathlib import Path

from arbs_jax.audit import Audit, require_integers
from arbs_jax.cli.display import errors, megabytes
from arbs_jax.cli.options import newest_run, saved_config
from arbs_jax.config import RunConfig
from arbs_jax.run.checkpoints import Checkpointer
from arbs_jax.run.folder import RunFolder
from arbs_jax.run.limbs import to_device
from arbs_jax.training.program import Program
from arbs_jax.training.room import check_room, device_room, reserve
from arbs_jax.training.step import TrainState


@dataclass(frozen=True)
class OpenRun:
    """A run's program and one checkpoint's state."""

    path: Path
    program: Program
    state: TrainState
    """On the device."""

    @property
    def step(self) -> int:
        """Step of the checkpoint."""
        return int(self.state.step)


def admitted(program: Program) -> tuple[Audit, int | None]:
    """(the program's account, the bytes that each of its devices has for it), before anything is allocated.

    Raises:
        StateError: the model keeps floats. ConfigError: its state does not fit a device, or devices are missing.
    """
    rooms = [room for device in program.devices if (room := device_room(device)) is not None]
    account, room = program.account, min(rooms, default=None)
    require_integers(account)
    check_room(account.state_bytes, room, f"the state of {program.config.preset}")
    return account, room


def make_room(need: int, program: Program) -> None:
    """Reserves bytes for what will run; says so where a device does not have them in one piece."""
    reserved = [reserve(need, device) for device in program.devices]
    if not all(reserved):
        errors.print(
            f"warning: the device does not give {megabytes(need)} in one piece, though it has as many; other processes "
            "may hold them, and this one may run out of memory",
            style="yellow",
        )


def run_path(path: Path | None) -> Path:
    """The path given, or the newest run below `runs/`."""
    return newest_run() if path is None else path


def checkpoint_name(text: str) -> str | int:
    """A checkpoint as `Checkpointer.restore` takes it, from the command line."""
    return int(text) if text.isdecimal() else text


def open_run(
    path: Path | None, checkpoint: str | None = None, config: RunConfig | None = None, kernel: str | None = None
) -> OpenRun:
    """Loads a checkpoint of a run; validated leaf by leaf.

    Args:
        path: run folder, None for the newest below `runs/`.
        checkpoint: "latest", "best", "final" or a step number; None for the best, or the latest while none is.
        config: in place of the run's own (for another batch size, say).
        kernel: in place of the configuration's.

    Raises:
        ConfigError: no such run, or its kernel does not run here. CheckpointError: none such, or a damaged one.
        StateError: the state does not fit the model.
    """
    path = run_path(path)
    config = config or saved_config(path)
    if kernel is not None:
        config = replace(config, train=replace(config.train, kernel=kernel))
    # One device looks at a run, however many trained it.
    program = Program(replace(config, train=replace(config.train, devices=1)))
    with Checkpointer(RunFolder(path).checkpoints) as reader:
        chosen = checkpoint or ("best" if "best" in reader.tags() else "latest")
        tree, _ = reader.restore(checkpoint_name(chosen))
    program.check(tree["ternary"])
    return OpenRun(path, program, TrainState(**to_device(tree)))

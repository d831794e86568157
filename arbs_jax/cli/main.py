"""The command line `arbs`: parse, dispatch, and turn the user's mistakes into a line or two."""

import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import tyro

from arbs_jax.cli import audit, bench, evaluate, sample, smoke, train, warmup
from arbs_jax.cli.display import errors
from arbs_jax.errors import UserError
from arbs_jax.signals import handled
from arbs_kernels.selection import UnsupportedError

Command = (
    Annotated[train.Train, tyro.conf.subcommand("train")]
    | Annotated[sample.Sample, tyro.conf.subcommand("sample")]
    | Annotated[evaluate.Evaluate, tyro.conf.subcommand("eval")]
    | Annotated[audit.AuditCommand, tyro.conf.subcommand("audit")]
    | Annotated[warmup.Warmup, tyro.conf.subcommand("warmup")]
    | Annotated[smoke.Smoke, tyro.conf.subcommand("smoke")]
    | Annotated[bench.Bench, tyro.conf.subcommand("bench")]
)

_RUN: dict[type, Callable[[Any], int | None]] = {
    train.Train: train.run,
    sample.Sample: sample.run,
    evaluate.Evaluate: evaluate.run,
    audit.AuditCommand: audit.run,
    warmup.Warmup: warmup.run,
    smoke.Smoke: smoke.run,
    bench.Bench: bench.run,
}


class Terminated(BaseException):
    """SIGTERM outside the training loop, which has a handler of its own."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    0: done. 1: the user's mistake, said in a line or two. 2: the command line cannot be parsed. 130 and 143: ended by
    Ctrl-C and by SIGTERM; what `arbs train` had learnt by then is saved.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # A terminal that cannot show a character must not end a run.
            stream.reconfigure(errors="replace")
    # Orbax logs the traceback of a failed write, from a thread of its own; we say it in a line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        # Lets `finally` blocks run on SIGTERM: checkpoints under way are finished, files closed.
        with handled(_terminate, signal.SIGTERM):
            command = tyro.cli(
                Command,  # pyrefly: ignore[bad-argument-type]
                prog="arbs",
                description="Train and run neural networks whose persistent state is integers only.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
            return _RUN[type(command)](command) or 0
    except (UserError, UnsupportedError) as error:  # Kernels refuse shapes while the step is traced.
        errors.print(f"error: {error}", style="red")
        return 1
    except KeyboardInterrupt:
        errors.print("interrupted")
        return 130
    except Terminated:
        errors.print("terminated")
        return 143
    except BrokenPipeError:
        # Who read our output has left, as `| head` does. Python would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _terminate(_number: int, _frame: object) -> None:
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())

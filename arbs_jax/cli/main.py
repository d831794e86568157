"""The command line `arbs`: parse, dispatch, and turn the user's mistakes into a line or two."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import tyro

from arbs_jax.cli import audit, evaluate, sample, train, warmup
from arbs_jax.cli.display import errors
from arbs_jax.errors import UserError

Command = (
    Annotated[train.Train, tyro.conf.subcommand("train")]
    | Annotated[sample.Sample, tyro.conf.subcommand("sample")]
    | Annotated[evaluate.Evaluate, tyro.conf.subcommand("eval")]
    | Annotated[audit.AuditCommand, tyro.conf.subcommand("audit")]
    | Annotated[warmup.Warmup, tyro.conf.subcommand("warmup")]
)

_RUN: dict[type, Callable[[Any], None]] = {
    train.Train: train.run,
    sample.Sample: sample.run,
    evaluate.Evaluate: evaluate.run,
    audit.AuditCommand: audit.run,
    warmup.Warmup: warmup.run,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for the user's mistakes, 130 when interrupted."""
    command = tyro.cli(
        Command,  # pyrefly: ignore[bad-argument-type]
        prog="arbs",
        description="Train and run neural networks whose persistent state is integers only.",
        args=arguments,
    )
    try:
        _RUN[type(command)](command)
    except UserError as error:
        errors.print(f"error: {error}", markup=False, style="red")
        return 1
    except KeyboardInterrupt:
        errors.print("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

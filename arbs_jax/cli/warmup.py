"""`arbs warmup`: compile a run's exact shapes ahead of time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from arbs_jax.cli.display import console, megabytes, table
from arbs_jax.cli.options import LogFlags, ModelFlags, saved_config
from arbs_jax.compilation import enable_cache, measured
from arbs_jax.training.program import Program
from arbs_jax.training.room import peak_bytes


@dataclass(frozen=True)
class Warmup:
    """Compile the training step, the initial state and the validation of these flags into the persistent cache, where
    `arbs train` with the same flags finds them.

    Prints seconds and the device memory that a step will need. Nothing is trained and no state is allocated. The cache
    is $ARBS_CACHE_DIR, else ~/.cache/arbs_jax.
    """

    model: Annotated[ModelFlags, tyro.conf.arg(name="")] = ModelFlags()  # noqa: RUF009
    log: Annotated[LogFlags, tyro.conf.arg(name="")] = LogFlags()  # noqa: RUF009
    run: Annotated[
        Path | None,
        tyro.conf.arg(help="Take the configuration of this run.", help_behavior_hint="(default: none)", metavar="DIR"),
    ] = None


def run(args: Warmup) -> None:
    """Carries out `arbs warmup`."""
    cache = enable_cache()
    # The intervals change nothing here; they are taken so that the flags of `arbs train` can stay as they are.
    base = None if args.run is None else saved_config(args.run)
    program = Program(args.log.resolve(args.model.resolve(base)))
    with measured() as step:
        compiled = program.compile_step()
    with measured() as init:
        program.compile_init()
    with measured() as evaluation:
        program.compile_evaluation()
    memory = compiled.memory_analysis()
    rows = [
        ("training step", str(step)),
        ("initial state", str(init)),
        ("validation", str(evaluation)),
        ("state and batch", megabytes(memory.argument_size_in_bytes)),
        ("temporaries", megabytes(memory.temp_size_in_bytes)),
        ("predicted device memory", megabytes(peak_bytes(compiled))),
        ("cache", str(cache)),
    ]
    console.print(table(f"{program.config.preset}, rule {program.config.rule.name}", ("", "value"), rows))

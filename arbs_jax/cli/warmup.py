"""`arbs warmup`: compile a run's exact shapes ahead of time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from arbs_jax.cli.display import console, megabytes, table
from arbs_jax.cli.options import ModelFlags, saved_config
from arbs_jax.compilation import enable_cache, measured
from arbs_jax.training.program import Program


@dataclass(frozen=True)
class Warmup:
    """Compile the training step of these flags into the persistent cache, which `arbs train` then uses.

    Takes the flags of `arbs train`; prints seconds and the device memory that the step will need. Nothing is trained
    and no state is allocated.
    """

    model: Annotated[ModelFlags, tyro.conf.arg(name="")] = ModelFlags()  # noqa: RUF009
    run: Annotated[Path | None, tyro.conf.arg(help="Take the configuration of this run.", metavar="DIR")] = None


def run(args: Warmup) -> None:
    """Carries out `arbs warmup`."""
    cache = enable_cache()
    program = Program(args.model.resolve(None if args.run is None else saved_config(args.run)))
    with measured() as step:
        compiled = program.compile_step()
    with measured() as init:
        program.compile_init()
    memory = compiled.memory_analysis()
    rows = [
        ("training step", str(step)),
        ("initial state", str(init)),
        ("state and batch", megabytes(memory.argument_size_in_bytes)),
        ("temporaries", megabytes(memory.temp_size_in_bytes)),
        ("predicted device memory", megabytes(peak_bytes(memory))),
        ("cache", str(cache)),
    ]
    console.print(table(f"{program.config.preset}, rule {program.config.rule.name}", ("", "value"), rows))


def peak_bytes(memory: object) -> int:
    """Arguments, results that do not share their memory, temporaries and code, from a compiled memory analysis."""
    read = {
        name: getattr(memory, f"{name}_size_in_bytes")
        for name in ("argument", "output", "alias", "temp", "generated_code")
    }
    return read["argument"] + read["output"] - read["alias"] + read["temp"] + read["generated_code"]

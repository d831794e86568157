"""`arbs audit`: what persists, of a preset or a run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from arbs_jax.cli.display import audit_table, console
from arbs_jax.cli.options import ModelFlags, saved_config
from arbs_jax.training.program import Program


@dataclass(frozen=True)
class AuditCommand:
    """Count logical ternary weights, bytes by leaf kind, bits per weight, and floats (there are none).

    Nothing is allocated: any preset can be audited on any machine.
    """

    model: Annotated[ModelFlags, tyro.conf.arg(name="")] = ModelFlags()  # noqa: RUF009
    run: Annotated[
        Path | None,
        tyro.conf.arg(help="Audit this run in place of a preset.", help_behavior_hint="(default: none)", metavar="DIR"),
    ] = None
    json: bool = False
    """Print one JSON object in place of the table."""


def run(args: AuditCommand) -> None:
    """Carries out `arbs audit`."""
    config = args.model.resolve(None if args.run is None else saved_config(args.run))
    account = Program(config).account
    if args.json:
        print(json.dumps(account.to_json()))
        return
    console.print(audit_table(account, f"{args.run or config.preset}, rule {config.rule.name}"))

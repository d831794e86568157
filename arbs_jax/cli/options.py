"""Flags that several commands share, and how they become a configuration."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from arbs_jax.config import RunConfig
from arbs_jax.errors import ConfigError
from arbs_jax.models.presets import PRESETS, preset
from arbs_jax.rules import RULES
from arbs_jax.run.folder import RunFolder

RUNS = Path("runs")

# Choices for the parser; to a type checker they are strings, checked where they are used.
if TYPE_CHECKING:
    _Preset = str
    _Rule = str
else:
    _Preset = Literal[tuple(PRESETS)]
    _Rule = Literal[RULES]


@dataclass(frozen=True)
class ModelFlags:
    """What is trained. Flags left out take the run's value when resuming, else the default shown."""

    preset: Annotated[
        _Preset | None,
        tyro.conf.arg(help="Model shape (default byte-0.4m)."),
    ] = None
    rule: Annotated[
        _Rule | None,
        tyro.conf.arg(help="Learning rule (default integral)."),
    ] = None
    learning_rate: Annotated[float | None, tyro.conf.arg(help="Peak rate, in the rule's unit (default: its own).")] = (
        None
    )
    strength: Annotated[float | None, tyro.conf.arg(help="bigint: shift when all votes agree (default 4).")] = None
    warmup_steps: Annotated[int | None, tyro.conf.arg(help="Steps of linear warm-up (default 100).")] = None
    group_size: Annotated[int | None, tyro.conf.arg(help="Columns that share one scale (default 32).")] = None
    tied: Annotated[bool | None, tyro.conf.arg(help="Use the embedding table as output head (default no).")] = None
    dtype: Annotated[Literal["float32", "bfloat16"] | None, tyro.conf.arg(help="Activations (default float32).")] = None
    remat: Annotated[
        bool | None, tyro.conf.arg(help="Recompute blocks in backward to save memory (default: the preset's).")
    ] = None
    ctx: Annotated[int | None, tyro.conf.arg(help="Bytes the model sees in a window (default 64).")] = None
    batch: Annotated[int | None, tyro.conf.arg(help="Windows in a micro-batch (default 16).")] = None
    accum: Annotated[int | None, tyro.conf.arg(help="Micro-batches a step, each a vote (default 1).")] = None
    steps: Annotated[int | None, tyro.conf.arg(help="Steps in the whole run (default 1500).")] = None
    seed: Annotated[int | None, tyro.conf.arg(help="Seed of state, data order and samples (default 0).")] = None
    kernel: Annotated[
        str | None, tyro.conf.arg(help="Packed operators: auto, or xla (default auto).", metavar="auto|xla")
    ] = None
    data: Annotated[
        str | None,
        tyro.conf.arg(help="File, folder, glob or hf:NAME[:CONFIG][@SPLIT][#FIELD] (default: text shipped in Python)."),
    ] = None

    def resolve(self, base: RunConfig | None = None) -> RunConfig:
        """The configuration these flags ask for, on top of a run's saved one or of the defaults.

        Raises:
            ConfigError: a value is out of range, or two contradict each other.
        """
        base = base or RunConfig()
        name = self.preset or base.preset
        model = preset(name) if self.preset and self.preset != base.preset else base.model
        model = replace(model, **_given(tied=self.tied, dtype=self.dtype, remat=self.remat))
        rule = _given(
            name=self.rule, learning_rate=self.learning_rate, strength=self.strength, warmup=self.warmup_steps
        )
        if self.rule not in (None, base.rule.name):
            rule.setdefault("learning_rate", None)
        train = _given(
            context=self.ctx,
            batch=self.batch,
            accum=self.accum,
            steps=self.steps,
            seed=self.seed,
            kernel=self.kernel,
        )
        return replace(
            base,
            preset=name,
            model=model,
            group_size=base.group_size if self.group_size is None else self.group_size,
            rule=replace(base.rule, **rule),
            data=replace(base.data, **_given(source=self.data)),
            train=replace(base.train, **train),
        )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def saved_config(run: Path) -> RunConfig:
    """The configuration of a run folder.

    Raises:
        ConfigError: it is not one.
    """
    return RunConfig.from_json(RunFolder(run).read_config())


def new_run_path(config: RunConfig) -> Path:
    """The first free numbered folder below `runs/` for this configuration."""
    stem = f"{config.preset}-{config.rule.name}"
    for number in range(1, 10_000):
        path = RUNS / f"{stem}-{number:03d}"
        if not path.exists():
            return path
    raise ConfigError(f"{RUNS} holds 9999 runs called {stem}; pass --run")


def newest_run() -> Path:
    """The run folder below `runs/` that was written last.

    Raises:
        ConfigError: there is none.
    """
    found = sorted(RUNS.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"no run below {RUNS}/; train one with `arbs train`, or pass --run")
    return found[-1].parent

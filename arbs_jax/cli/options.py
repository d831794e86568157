"""Flags that several commands share, and how they become a configuration."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from arbs_jax.config import DEFAULT_PRESET, KERNELS, PRODUCTS, LogConfig, RunConfig, TrainConfig
from arbs_jax.errors import ConfigError
from arbs_jax.models import ModelConfig
from arbs_jax.models.arb.config import ArbConfig
from arbs_jax.models.presets import FAMILIES, preset
from arbs_jax.rules import RULES, RuleConfig, default_group_size
from arbs_jax.run.folder import RunFolder

RUNS = Path("runs")
DEFAULT_ARB_PRESET = "arb-tiny"
PRESET_NAMES = tuple(name for presets in FAMILIES.values() for name in presets)


def parsed(
    flag: str, convert: Callable[[str], Any], metavar: str, wanted: str
) -> tyro.constructors.PrimitiveConstructorSpec:
    """How tyro reads one value: a wrong one is the user's mistake like any other, said in one line.

    Args:
        flag: with its dashes, for the message.
        convert: from the word on the command line; a ValueError or KeyError means that it does not fit.
        metavar: stands for the value in `--help`.
        wanted: completes "FLAG must be ...".
    """

    def read(words: list[str]) -> Any:
        try:
            return convert(words[0])
        except (KeyError, ValueError):
            raise ConfigError(f"{flag} must be {wanted}, got {words[0]!r}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
    )


def whole(flag: str) -> tyro.constructors.PrimitiveConstructorSpec:
    """A whole number."""
    return parsed(flag, int, "N", "a whole number")


def real(flag: str) -> tyro.constructors.PrimitiveConstructorSpec:
    """A number."""
    return parsed(flag, float, "X", "a number")


def yes_no(flag: str) -> tyro.constructors.PrimitiveConstructorSpec:
    """A switch that may also be left as it is."""
    return parsed(flag, {"yes": True, "no": False}.__getitem__, "yes|no", "yes or no")


def choice(flag: str, choices: Iterable[str]) -> tyro.constructors.PrimitiveConstructorSpec:
    """One of some names."""
    names = {name: name for name in choices}
    return parsed(flag, names.__getitem__, "|".join(names) if len(names) < 5 else "NAME", f"one of {', '.join(names)}")


def about(text: str, default: str) -> Any:
    """Help for a flag whose dataclass default, None, says nothing to people."""
    return tyro.conf.arg(help=text, help_behavior_hint=f"(default: {default})")


RunFlag = Annotated[
    Path | None,
    tyro.conf.arg(help="Run folder.", help_behavior_hint=f"(default: the newest below {RUNS}/)", metavar="DIR"),
]
"""`--run` of the commands that look at a run."""
CheckpointFlag = Annotated[
    str | None,
    tyro.conf.arg(
        help="latest, best, final or a step number.",
        help_behavior_hint="(default: best, or latest where nothing was validated yet)",
        metavar="NAME|STEP",
    ),
]
"""`--checkpoint` of the commands that look at a run."""
KernelFlag = Annotated[
    str | None,
    choice("--kernel", KERNELS),
    about("Implementation of the packed operators; auto is the best that runs here.", "as trained"),
]
"""`--kernel` of the commands that look at a run, which may have been trained on another machine."""


@dataclass(frozen=True)
class ArbFlags:
    """Switches of the ARB model (`--model arb`). Flags left out take the run's value where there is a run."""

    disable_moe: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """No experts."""
    disable_vq: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """No motifs; needs --disable-graph as well."""
    disable_graph: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """No messages between motifs."""
    disable_attention: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """No context blocks and no ledger."""
    enable_memory: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Remember n-grams of motifs."""
    max_moe_iters: Annotated[
        int | None, whole("--max-moe-iters"), about("Iterations of the loop, at most.", "the preset's")
    ] = None
    top_k: Annotated[int | None, whole("--top-k"), about("Experts a position reaches.", "the preset's")] = None

    def resolve(self, model: Any) -> Any:
        """The model's configuration with these flags on top.

        Raises:
            ConfigError: the model is of another family, or flags contradict each other.
        """
        given = [name for name in _ARB_FLAGS if getattr(self, name) not in (None, False)]
        if not isinstance(model, ArbConfig):
            if given:
                raise ConfigError(f"{_flag(given[0])} is for the ARB model; pass --model arb as well, or leave it out")
            return model
        for one, other in (("disable_vq", "enable_memory"), ("disable_moe", "top_k")):
            if one in given and other in given:
                raise ConfigError(f"{_flag(one)} and {_flag(other)} contradict each other; leave one of them out")
        if {"disable_moe", "disable_graph", "max_moe_iters"} <= set(given):
            raise ConfigError(
                "--max-moe-iters with --disable-moe and --disable-graph: there is no loop; leave one of the three out"
            )
        parts = ("moe", "vq", "graph", "attention")
        changes: dict[str, Any] = {name: False for name in parts if getattr(self, f"disable_{name}")}
        changes |= {"memgram": True} if self.enable_memory else {}
        return replace(model, **changes, **_given(max_moe_iters=self.max_moe_iters, top_k=self.top_k))


_ARB_FLAGS = tuple(entry.name for entry in fields(ArbFlags))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class ModelFlags:
    """What is trained. Flags left out take the run's value where there is a run, else the default shown."""

    model: Annotated[
        str | None, choice("--model", FAMILIES), about("Family of models: byte or arb.", "that of the preset")
    ] = None
    preset: Annotated[
        str | None,
        choice("--preset", PRESET_NAMES),
        about(f"Model shape: {', '.join(PRESET_NAMES)}.", f"{DEFAULT_PRESET}, or {DEFAULT_ARB_PRESET} for --model arb"),
    ] = None
    rule: Annotated[str | None, choice("--rule", RULES), about("Learning rule.", RuleConfig.name)] = None
    learning_rate: Annotated[
        float | None, real("--learning-rate"), about("Peak rate, in the rule's unit.", "the rule's own")
    ] = None
    strength: Annotated[
        float | None, real("--strength"), about("bigint: shift when all votes agree.", str(RuleConfig.strength))
    ] = None
    warmup_steps: Annotated[
        int | None, whole("--warmup-steps"), about("Steps of linear warm-up.", str(RuleConfig.warmup))
    ] = None
    group_size: Annotated[
        int | None, whole("--group-size"), about("Columns that share one scale.", "the rule's own")
    ] = None
    tied: Annotated[bool | None, yes_no("--tied"), about("Use the embedding table as output head.", "no")] = None
    dtype: Annotated[
        str | None, choice("--dtype", ("float32", "bfloat16")), about("Activations.", ModelConfig.dtype)
    ] = None
    arb: Annotated[ArbFlags, tyro.conf.arg(name="")] = ArbFlags()
    remat: Annotated[
        bool | None, yes_no("--remat"), about("Recompute blocks in backward to save memory.", "the preset's")
    ] = None
    ctx: Annotated[int | None, whole("--ctx"), about("Bytes the model sees in a window.", str(TrainConfig.context))] = (
        None
    )
    batch: Annotated[
        int | None, whole("--batch"), about("Windows in a micro-batch.", f"{TrainConfig.batch}, of arbs smoke 1")
    ] = None
    accum: Annotated[
        int | None, whole("--accum"), about("Micro-batches a step, each a vote.", "as many as --devices")
    ] = None
    devices: Annotated[
        int | None,
        whole("--devices"),
        about("Devices that share the micro-batches of a step.", str(TrainConfig.devices)),
    ] = None
    steps: Annotated[int | None, whole("--steps"), about("Steps in the whole run.", str(TrainConfig.steps))] = None
    seed: Annotated[
        int | None, whole("--seed"), about("Seed of state, data order and samples.", str(TrainConfig.seed))
    ] = None
    kernel: Annotated[
        str | None,
        choice("--kernel", KERNELS),
        about("Implementation of the packed operators; auto is the best that runs here.", TrainConfig.kernel),
    ] = None
    products: Annotated[
        str | None,
        choice("--products", PRODUCTS),
        about("Operands of large products: as --dtype, or float8 (from Ada on faster).", TrainConfig.products),
    ] = None
    layers_at_once: Annotated[
        int | None,
        whole("--layers-at-once"),
        about("Layers that move together: fewer launches, more memory.", "one on a CPU, on GPUs what is cheap"),
    ] = None
    data: Annotated[
        str | None,
        tyro.conf.arg(
            help="File, folder, glob or hf:NAME[:CONFIG][@SPLIT][#FIELD].",
            help_behavior_hint="(default: text that comes with Python)",
            metavar="PATH",
        ),
    ] = None

    def resolve(self, base: RunConfig | None = None) -> RunConfig:
        """The configuration these flags ask for, on top of a run's saved one or of the defaults.

        Raises:
            ConfigError: a value is out of range, or two contradict each other.
        """
        # A run that is there keeps its micro-batches, which decide its data order.
        accum = self.devices if self.accum is None and base is None else self.accum
        base = base or RunConfig()
        name = self._preset(base)
        model = preset(name) if name != base.preset else base.model
        if self.tied is not None and isinstance(model, ArbConfig):
            raise ConfigError("--tied is for the byte model; leave it out, or pass --model byte")
        model = self.arb.resolve(replace(model, **_given(tied=self.tied, dtype=self.dtype, remat=self.remat)))
        rule = _given(
            name=self.rule, learning_rate=self.learning_rate, strength=self.strength, warmup=self.warmup_steps
        )
        if self.rule not in (None, base.rule.name):
            rule.setdefault("learning_rate", None)
        train = _given(
            context=self.ctx,
            batch=self.batch,
            devices=self.devices,
            accum=accum,
            steps=self.steps,
            seed=self.seed,
            kernel=self.kernel,
            products=self.products,
            layers_at_once=self.layers_at_once,
        )
        return replace(
            base,
            preset=name,
            model=model,
            group_size=self._group_size(base),
            rule=replace(base.rule, **rule),
            data=replace(base.data, **_given(source=self.data)),
            train=replace(base.train, **train),
        )

    def _preset(self, base: RunConfig) -> str:
        """The name of the shape asked for."""
        if self.model is None:
            return self.preset or base.preset
        if self.preset is not None:
            if self.preset not in FAMILIES[self.model]:
                raise ConfigError(
                    f"--preset {self.preset} is no shape of --model {self.model}; its presets are "
                    f"{', '.join(FAMILIES[self.model])}"
                )
            return self.preset
        if base.preset in FAMILIES[self.model]:
            return base.preset
        return {"byte": DEFAULT_PRESET, "arb": DEFAULT_ARB_PRESET}[self.model]

    def _group_size(self, base: RunConfig) -> int:
        if self.group_size is not None:
            return self.group_size
        same = self.rule is None or self.rule == base.rule.name
        return base.group_size if same else default_group_size(str(self.rule))


@dataclass(frozen=True)
class LogFlags:
    """How often to look and save. Flags left out take the run's value where there is a run, else the default shown."""

    eval_interval: Annotated[
        int | None, whole("--eval-interval"), about("Steps between validations.", str(LogConfig.eval_interval))
    ] = None
    save_interval: Annotated[
        int | None, whole("--save-interval"), about("Steps between checkpoints.", str(LogConfig.save_interval))
    ] = None
    log_interval: Annotated[
        int | None, whole("--log-interval"), about("Steps between rows of metrics.", str(LogConfig.log_interval))
    ] = None

    def resolve(self, config: RunConfig) -> RunConfig:
        """The configuration with these flags on top.

        Raises:
            ConfigError: an interval is below 1.
        """
        intervals = _given(
            eval_interval=self.eval_interval, save_interval=self.save_interval, log_interval=self.log_interval
        )
        return replace(config, log=replace(config.log, **intervals))


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

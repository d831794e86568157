"""The resolved configuration of a run, to and from the JSON in its folder."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.config import ArbConfig
from arbs_jax.models.arb.sequencer import TRIGRAM
from arbs_jax.models.byte_lm import ModelConfig
from arbs_jax.models.presets import PRESETS, family_name
from arbs_jax.rules import DEFAULT_RULE, RuleConfig, default_group_size
from arbs_jax.state import InitConfig
from arbs_kernels.backends import float8_missing, triton_missing
from arbs_kernels.shapes import GROUP_SIZES

DEFAULT_PRESET = "byte-0.4m"
KERNELS = ("auto", "xla", "triton")
"""Values of `--kernel`: the best implementation of each operator, or one by name for all operators of a step.

"mosaic_gpu" is no value: only the score and products of few rows have it, and what is named must not fall back. "auto"
takes it where it runs.
"""
_MISSING = {"triton": triton_missing}
PRODUCTS = ("dtype", "float8")
"""Values of `--products`: operands of a step's large products are of the activations' dtype, or float8."""


@dataclass(frozen=True)
class DataConfig:
    """Where bytes come from."""

    source: str | None = None
    """File, folder, glob, `hf:` dataset, or None for the text that comes with Python."""
    validation_fraction: float = 0.05
    """Share of the bytes, the last ones, held out."""
    validation_bytes: int = 1_000_000
    """Bytes held out of a streamed dataset, the first ones."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and shape of training."""

    steps: int = 1200
    """Updates of the state."""
    batch: int = 16
    """Windows in a micro-batch."""
    context: int = 64
    """Bytes the model sees in a window."""
    accum: int = 1
    """Micro-batches a step; each is a vote of its own."""
    devices: int = 1
    """Devices of this process that share the micro-batches of a step, each with the whole state."""
    seed: int = 0
    """Seeds initial state, data order and sampled votes."""
    kernel: str = "auto"
    """Implementation of the packed operators, or "auto" for the best that works."""
    products: str = "dtype"
    """Operands of large products: of the activations' dtype, or "float8". Validation has none of it."""
    layers_at_once: int | None = None
    """Layers whose state moves together: fewer, larger operations, for that many layers' temporaries. None leaves it to
    the device (`arbs_jax.training.program`)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "context", "devices", "accum", "layers_at_once"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                flag = "ctx" if name == "context" else name.replace("_", "-")
                raise ConfigError(f"--{flag} must be at least 1, got {getattr(self, name)}")
        if self.accum % self.devices:
            raise ConfigError(
                f"--devices must divide the micro-batches of --accum, got {self.devices} and {self.accum}; "
                f"pass --accum {self.devices} or a multiple of it"
            )
        # JAX keeps 32 bits of a seed: a longer one would repeat the state of a shorter one without a word.
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed must be in [0, 2^32), got {self.seed}")
        if self.kernel not in KERNELS:
            raise ConfigError(f"--kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}")
        if self.products not in PRODUCTS:
            raise ConfigError(f"--products must be one of {', '.join(PRODUCTS)}, got {self.products!r}")

    @property
    def implementation(self) -> str | None:
        """`kernel` as operators take it: None for the best that works.

        Asks the device, so that a configuration can be read and shown where it cannot run.

        Raises:
            ConfigError: this machine cannot run it.
        """
        missing = _MISSING[self.kernel]() if self.kernel in _MISSING else None
        if missing is not None:
            raise ConfigError(f"--kernel {self.kernel} needs {missing}; pass --kernel auto")
        return None if self.kernel == "auto" else self.kernel

    @property
    def float8(self) -> bool:
        """`products` as layers take it.

        Raises:
            ConfigError: this machine's GPU has no float8 products.
        """
        missing = float8_missing() if self.products == "float8" else None
        if missing is not None:
            raise ConfigError(f"--products float8 needs {missing}; pass --products dtype")
        return self.products == "float8"


@dataclass(frozen=True)
class LogConfig:
    """How often to look; none of it changes what is learnt."""

    log_interval: int = 10
    """Steps between rows of metrics."""
    eval_interval: int = 100
    """Steps between validations."""
    save_interval: int = 500
    """Steps between checkpoints."""
    eval_windows: int = 128
    """Validation windows, at most."""
    keep: int = 3
    """Last checkpoints kept, besides best and final."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            if getattr(self, entry.name) < 1:
                raise ConfigError(
                    f"--{entry.name.replace('_', '-')} must be at least 1, got {getattr(self, entry.name)}"
                )


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run does."""

    preset: str = DEFAULT_PRESET
    """Name the model's shape came from."""
    model: ModelConfig | ArbConfig = PRESETS[DEFAULT_PRESET]
    """The resolved shape."""
    group_size: int = default_group_size(DEFAULT_RULE)
    """`G`, columns that share one scale."""
    init: InitConfig = field(default_factory=InitConfig)
    """Distribution of fresh state."""
    rule: RuleConfig = field(default_factory=RuleConfig)
    """Learning rule."""
    data: DataConfig = field(default_factory=DataConfig)
    """Bytes."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and shape."""
    log: LogConfig = field(default_factory=LogConfig)
    """Looking."""

    def __post_init__(self) -> None:
        if self.train.context > self.model.context:
            raise ConfigError(
                f"--ctx {self.train.context} is longer than the model's context of {self.model.context} bytes; "
                "lower it or choose another --preset"
            )
        if isinstance(self.model, ArbConfig) and self.train.context < TRIGRAM:
            raise ConfigError(
                f"--ctx {self.train.context} is too short for an ARB model, whose positions take {TRIGRAM} bytes; "
                f"pass at least {TRIGRAM}"
            )
        if self.model.layers % (self.train.layers_at_once or 1):
            raise ConfigError(
                f"--layers-at-once must divide the model's {self.model.layers} layers, got {self.train.layers_at_once}"
            )
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(f"--group-size must be one of {', '.join(map(str, GROUP_SIZES))}, got {self.group_size}")

    @property
    def validation_batch(self) -> int:
        """Windows in a validation batch, which needs no room for backward."""
        return min(self.log.eval_windows, 4 * self.train.batch)

    def to_json(self) -> dict[str, Any]:
        """Nested dict of JSON values."""
        config: dict[str, Any] = {"family": family_name(self.model), **asdict(self)}
        config["init"]["exponent_range"] = list(self.init.exponent_range)
        if isinstance(self.model, ArbConfig):
            config["model"]["shield"] = list(self.model.shield)
        return config

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "RunConfig":
        """The configuration in a run folder; keys that are not configuration are ignored.

        Raises:
            ConfigError: a section is missing, or holds a key or value that this version does not know.
        """
        sections = {
            "rule": RuleConfig,
            "data": DataConfig,
            "train": TrainConfig,
            "log": LogConfig,
        }
        try:
            values: dict[str, Any] = {name: kind(**saved[name]) for name, kind in sections.items()}
            init = dict(saved["init"])
            values["init"] = InitConfig(**(init | {"exponent_range": tuple(init["exponent_range"])}))
            values["model"] = {"byte": ModelConfig, "arb": ArbConfig}[saved["family"]](**saved["model"])
            return cls(preset=saved["preset"], group_size=saved["group_size"], **values)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the saved configuration does not fit this version: {error}") from error


MAY_CHANGE = frozenset(
    {
        "train.steps",
        "train.devices",
        "train.kernel",
        "train.products",
        "train.layers_at_once",
        "rule.learning_rate",
        "data.source",
        "log",
        "facts",
    }
)
"""Keys of `config.json` that may differ when a run is resumed: the rest decides the state bit for bit.

More steps or another rate are asked for with open eyes; another kernel, other products, more layers at once or other
devices round differently (votes add exactly); a text may have moved, and its fingerprint is compared.
"""

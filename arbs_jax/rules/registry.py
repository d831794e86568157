"""Rules by name, as the command line and run folders speak of them."""

from dataclasses import dataclass, replace

from arbs_jax.errors import ConfigError
from arbs_jax.rules.base import Rule
from arbs_jax.rules.bigint import BigInt
from arbs_jax.rules.integral import Integral
from arbs_jax.rules.latent import Latent
from arbs_jax.rules.schedule import Schedule

LATENT_RULES: dict[str, Latent] = {
    "latent4": Latent(planes=2, rank_divisor=32, learning_rate=0.05, mix=0.0, moment_decay=0.0, cautious=True),
    "latent6": Latent(planes=3, learning_rate=0.1, table_rate=1.0, mix=0.0),
    "latent10": Latent(),
    "latent18": Latent(momentum="int8", learning_rate=0.05, beta=0.9, mix=0.0, power=1.0),
}
"""Settings of `Latent` by the bits of state that they stay under at widths from 256: 4, 6.5, 10.3 and 18.3 a weight.
Chosen in experiments/2026_11_20_rule_search."""

RULES = ("bigint", "integral", *LATENT_RULES)
DEFAULT_RULE = "latent10"


@dataclass(frozen=True)
class RuleConfig:
    """A rule and its settings, before the length of a run is known."""

    name: str = DEFAULT_RULE
    """One of `RULES`."""
    learning_rate: float | None = None
    """Peak rate in the rule's own unit; None takes the rule's default."""
    strength: float = 4.0
    """`bigint`: shift, in powers of two, when all votes agree."""
    warmup: int = 100
    """Steps of linear warm-up, at most a fifth of the run."""

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ConfigError(f"no rule {self.name!r}; pass one of {', '.join(RULES)}")


def default_group_size(rule: str) -> int:
    """Columns that share a scale, where nothing else is asked for.

    Rules whose trits move need few scales, and an accumulator costs 72/G bits a weight; the others learn by their
    scales alone.
    """
    return 256 if rule in LATENT_RULES else 32


def make_rule(
    config: RuleConfig, *, steps: int, votes_per_step: int, dtype: str = "float32", implementation: str | None = None
) -> Rule:
    """The rule for a run of `steps` steps whose every step takes `votes_per_step` votes on each matrix.

    `dtype` is that of the activations; rules that multiply matrices in their update use it there. `implementation` is
    of the operators that a rule calls, None for the best that works.

    Raises:
        ConfigError: a setting is out of range.
    """
    warmup = min(config.warmup, max(steps // 5, 1))
    if config.name == "bigint":
        return BigInt(strength=config.strength)
    if config.name == "integral":
        rate = Integral.learning_rate if config.learning_rate is None else config.learning_rate
        return Integral(rate, Schedule(steps=steps, warmup=warmup), votes_per_step)
    rule = LATENT_RULES[config.name]
    rate = rule.learning_rate if config.learning_rate is None else config.learning_rate
    schedule = Schedule(steps=steps, warmup=warmup, final=0.0)
    return replace(rule, learning_rate=rate, schedule=schedule, dtype=dtype, implementation=implementation)

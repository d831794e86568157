"""Rules by name, as the command line and run folders speak of them."""

from dataclasses import dataclass

from arbs_jax.errors import ConfigError
from arbs_jax.rules.base import Rule
from arbs_jax.rules.bigint import BigInt
from arbs_jax.rules.integral import Integral
from arbs_jax.rules.schedule import Schedule

RULES = ("bigint", "integral")


@dataclass(frozen=True)
class RuleConfig:
    """A rule and its settings, before the length of a run is known."""

    name: str = "integral"
    """One of `RULES`."""
    learning_rate: float | None = None
    """Peak rate in the rule's own unit; None takes the rule's default."""
    strength: float = 4.0
    """`bigint`: shift, in powers of two, when all votes agree."""
    warmup: int = 100
    """Steps of linear warm-up."""
    final: float = 0.05
    """Share of the peak rate left at the end of the cosine."""

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ConfigError(f"no rule {self.name!r}; pass one of {', '.join(RULES)}")


def make_rule(config: RuleConfig, *, steps: int, votes_per_step: int) -> Rule:
    """The rule for a run of `steps` steps whose every step takes `votes_per_step` votes on each matrix.

    Raises:
        ConfigError: a setting is out of range.
    """
    schedule = Schedule(steps=steps, warmup=min(config.warmup, max(steps // 5, 1)), final=config.final)
    if config.name == "bigint":
        return BigInt(strength=config.strength)
    rate = Integral.learning_rate if config.learning_rate is None else config.learning_rate
    return Integral(learning_rate=rate, schedule=schedule, votes_per_step=votes_per_step)

"""Learning rules: how votes move the integer state."""

from arbs_jax.rules.base import Rule, Votes
from arbs_jax.rules.bigint import BigInt
from arbs_jax.rules.integral import Integral
from arbs_jax.rules.latent import Latent
from arbs_jax.rules.registry import DEFAULT_RULE, RULES, RuleConfig, default_group_size, make_rule
from arbs_jax.rules.schedule import Schedule

__all__ = [
    "DEFAULT_RULE",
    "RULES",
    "BigInt",
    "Integral",
    "Latent",
    "Rule",
    "RuleConfig",
    "Schedule",
    "Votes",
    "default_group_size",
    "make_rule",
]

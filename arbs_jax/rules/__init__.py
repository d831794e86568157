"""Learning rules: how votes move the integer state."""

from arbs_jax.rules.base import Rule, Votes
from arbs_jax.rules.bigint import BigInt
from arbs_jax.rules.integral import Integral
from arbs_jax.rules.registry import RULES, RuleConfig, make_rule
from arbs_jax.rules.schedule import Schedule

__all__ = ["RULES", "BigInt", "Integral", "Rule", "RuleConfig", "Schedule", "Votes", "make_rule"]

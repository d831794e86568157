"""A small chain of stages that compiles in a moment: matrix, stacked matrices, matrix; squared error."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax import Integral, TernaryConfig, TernaryDense, TernaryRMSNorm
from arbs_jax.models.stages import Stage
from arbs_jax.rules import Latent, RuleConfig, Schedule, make_rule
from arbs_jax.state import MatrixSpec, init_matrix

WIDTH, LAYERS, GROUP = 24, 3, 8
RULE = Integral(schedule=Schedule(steps=20, warmup=2), votes_per_step=2, fraction_bits=40)
CANARY = 2**40
"""One octave in units of RULE's accumulator, and more than 32 bits hold."""


VOTED = 2**10
"""Unit in which Sampling adds the noise of its votes; the noise of its update is below it, to be told apart."""


@dataclass(frozen=True)
class Sampling(Integral):
    """A rule with random bits in its votes and in its update, as rules that round stochastically have."""

    def vote(self, collected, matrix, spec, key):
        votes = super().vote(collected, matrix, spec, key)
        return votes | {"noise": jax.random.randint(key, votes["score"].shape, 0, 2**10, jnp.int32)}

    def update(self, matrix, votes, spec, step, key):
        moved, report = super().update(matrix, votes, spec, step, key)
        own = jax.random.randint(key, matrix["corr"].shape, 0, VOTED, jnp.int32)
        noise = jnp.where(votes["count"] > 0, VOTED * votes["noise"] + own, 0)
        return moved | {"corr": moved["corr"] + noise.astype(jnp.int64)}, report


def specs(tied: bool = False, width: int = WIDTH) -> dict[str, Any]:
    """Specs nested like the state."""
    spec = MatrixSpec(width, width, GROUP)
    return {"first": spec, "blocks": {"dense": spec}} | ({} if tied else {"last": spec})


def stages(rule: Any = RULE, tied: bool = False, width: int = WIDTH) -> tuple[Stage, ...]:
    """The chain; the batch is {"x": (B, width), "y": (B, width)}, both float32."""
    dense = TernaryDense(features=width, config=TernaryConfig(rule=rule, group_size=GROUP))
    norm = TernaryRMSNorm()

    def of(variables, *path):
        found = {}
        for collection, tree in variables.items():
            for name in path:
                tree = tree[name]
            found[collection] = tree
        return found

    def first(variables, carry, batch):
        return dense.apply(of(variables, "first"), batch["x"])

    def block(variables, x, batch):
        return x + jnp.tanh(dense.apply(of(variables, "blocks", "dense"), norm.apply({}, x)))

    def last(variables, x, batch):
        y = dense.apply(of(variables, "first" if tied else "last"), norm.apply({}, x))
        return jnp.mean((y - batch["y"]) ** 2)

    return (
        Stage(("first",), first),
        Stage(("blocks",), block, stacked=True),
        Stage(("first",) if tied else ("last",), last),
    )


def state(tied: bool = False, layers: int = LAYERS, width: int = WIDTH, rule: Any = RULE) -> dict[str, Any]:
    """Fresh state; for RULE and its like with one octave moved from every exponent into the accumulator, where it is
    the canary."""
    spec = MatrixSpec(width, width, GROUP)

    @jax.jit
    def make(key):
        fresh = init_matrix(key, spec)
        if not isinstance(rule, Integral):
            return rule.init(jax.random.fold_in(key, 1), fresh, spec)
        canary = jnp.full(fresh["corr"].shape, CANARY, jnp.int64)
        return fresh | {"exponent": fresh["exponent"] - jnp.int8(1), "corr": canary}

    keys = jax.random.split(jax.random.key(7), layers + 2)
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(make, keys[:layers]))
    tree = {"first": make(keys[-1]), "blocks": {"dense": blocks}}
    return tree if tied else tree | {"last": make(keys[-2])}


def batches(micro: int, rows: int = 4, seed: int = 0, width: int = WIDTH) -> dict[str, jax.Array]:
    """Random micro-batches."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal((micro, rows, width)), jnp.float32) for name in ("x", "y")}


def latent() -> Latent:
    """The default rule, whose votes and updates round at random and whose update computes with floats."""
    return make_rule(RuleConfig("latent10", warmup=2), steps=20, votes_per_step=2)


def sampling() -> Sampling:
    """The sampling rule, scheduled as the plain one."""
    return Sampling(schedule=RULE.schedule, votes_per_step=2, fraction_bits=40)

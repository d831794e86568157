"""Experts that move by turns against experts that move together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_jax.layers import COLLECTION, TernaryConfig, TernaryExperts
from arbs_jax.rules import Integral
from arbs_jax.rules.base import empty_report
from arbs_jax.state import MatrixSpec
from arbs_jax.training.layerwise import _by_turns
from arbs_jax.votes import each_expert

SPEC = MatrixSpec(out_features=4, in_features=6, group_size=4, experts=3)


@pytest.fixture
def experts():
    layer = TernaryExperts(experts=3, features=4, config=TernaryConfig(group_size=4))
    return layer.init(jax.random.key(1), jnp.ones((3, 6)), jnp.ones((3,), jnp.int32))[COLLECTION]


def test_turns_change_nothing(experts):
    """Neither the state, in which each expert has its own votes and random bits, nor the report."""
    votes = {
        "score": np.random.default_rng(0).integers(-4, 5, (3, 4, 2)).astype(np.int32),
        "count": np.asarray([1, 0, 2], np.int32),
    }
    rule = Integral()

    def moved(spec, key, matrix, found):
        new = rule.update(dict(matrix), found, spec, jnp.int32(5), key)
        noise = jax.random.randint(key, new["corr"].shape, 0, 9, jnp.int32)
        report = empty_report() | {"weights": jnp.sum(noise).astype(jnp.float32)}
        return new | {"corr": new["corr"] + noise.astype(jnp.int64)}, report

    @jax.jit
    def both(matrix, votes):
        key = jax.random.key(7)
        return [function(moved, SPEC, key, matrix, votes) for function in (_by_turns, each_expert)]

    (turns, one_report), (together, reports) = both(experts, votes)
    jax.tree.map(np.testing.assert_array_equal, turns, together)
    assert (np.asarray(turns["corr"]) != np.asarray(experts["corr"])).any(axis=(1, 2)).all()
    jax.tree.map(np.testing.assert_array_equal, one_report, jax.tree.map(jnp.sum, reports))

"""Experts that move by turns against experts that move together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_jax.layers import COLLECTION, TernaryConfig, TernaryExperts
from arbs_jax.rules import Integral
from arbs_jax.rules.base import empty_report
from arbs_jax.state import MatrixSpec
from arbs_jax.training.matrices import by_turns
from arbs_jax.votes import dense_gradients, each_expert
from arbs_kernels.grouped_autodiff import make_factor_probe

SPEC = MatrixSpec(out_features=4, in_features=6, group_size=4, experts=3)


@pytest.fixture
def experts():
    layer = TernaryExperts(experts=3, features=4, config=TernaryConfig(group_size=4))
    return layer.init(jax.random.key(1), jnp.ones((3, 6), jnp.float32), jnp.ones((3,), jnp.int32))[COLLECTION]


def test_turns_change_nothing(experts):
    """Neither the state, in which each expert has its own votes and random bits, nor the report."""
    votes = {
        "score": np.random.default_rng(0).integers(-4, 5, (3, 4, 2)).astype(np.int32),
        "count": np.asarray([1, 0, 2], np.int32),
    }
    rule = Integral()

    def moved(spec, key, matrix, found):
        new, _ = rule.update(dict(matrix), found, spec, jnp.int32(5), key)
        noise = jax.random.randint(key, new["corr"].shape, 0, 9, jnp.int32)
        report = empty_report() | {"weights": jnp.sum(noise).astype(jnp.float32)}
        return new | {"corr": new["corr"] + noise.astype(jnp.int64)}, report

    @jax.jit
    def both(matrix, votes):
        key = jax.random.key(7)
        return [function(moved, SPEC, key, matrix, votes) for function in (by_turns, each_expert)]

    (turns, one_report), (together, reports) = both(experts, votes)
    jax.tree.map(np.testing.assert_array_equal, turns, together)
    assert (np.asarray(turns["corr"]) != np.asarray(experts["corr"])).any(axis=(1, 2)).all()
    jax.tree.map(np.testing.assert_array_equal, one_report, jax.tree.map(jnp.sum, reports))


def test_turns_make_gradients_of_factors(experts):
    """One expert's at a time, those that all at once would be."""
    rng = np.random.default_rng(2)
    shapes = make_factor_probe(2, 5, 3, 4, 6, jnp.float32)
    factors = {name: rng.standard_normal(shapes[name].shape).astype(np.float32) for name in ("x", "dy")}
    factors |= {"sizes": np.float32([[1, 0, 3], [2, 2, 1]]), "count": np.float32([2, 1, 2])}

    def moved(spec, key, matrix, found):
        new = found["gradient"].sum(axis=1, keepdims=True) + found["count"]
        corr = matrix["corr"] + jnp.round(2**16 * new).astype(jnp.int64)
        return dict(matrix) | {"corr": corr}, empty_report()

    @jax.jit
    def both(matrix, factors):
        turns = by_turns(moved, SPEC, jax.random.key(7), matrix, factors)
        return turns[0], each_expert(moved, SPEC, jax.random.key(7), matrix, dense_gradients(SPEC, factors))[0]

    turns, together = both(experts, factors)
    np.testing.assert_allclose(turns["corr"], together["corr"], rtol=0, atol=2)
    assert (np.asarray(turns["corr"]) != np.asarray(experts["corr"])).all()

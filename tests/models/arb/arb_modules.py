"""What the tests of the ARB model's parts share: a module with fresh state, and its votes."""

from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from fresh import fresh

from arbs_jax import Integral, TernaryConfig, value_and_votes
from arbs_jax.state import flatten_specs

TERNARY = TernaryConfig(rule=Integral(), group_size=8)
# Float sums of equal terms in another order: a few dozen operations deep, values of order one.
RELATIVE = 200 * 2.0**-24


def normal(seed: int, *shape: int) -> np.ndarray:
    """float32 normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got, expected):
    """Equal but for rounding."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=RELATIVE * np.abs(expected).max())


def influence_of(function, x: np.ndarray) -> np.ndarray:
    """bool (S, S): whether each output position of `(B, S, D) -> (B, S, D)` depends on each input position, by the
    gradient."""

    def by_position(x):
        return jnp.sum(function(x), axis=(0, 2))

    gradient = np.asarray(jax.jit(jax.jacrev(by_position))(x))
    assert np.isfinite(gradient).all()
    return np.abs(gradient).max(axis=(1, 3)) != 0


class Built:
    """A module with fresh variables, made by a call with `inputs`; its forward pass compiled when first asked for."""

    def __init__(self, module, *inputs):
        self.module, self.inputs = module, inputs
        self.variables, self.specs = fresh(module, *inputs)
        self.apply = jax.jit(module.apply)

    @cached_property
    def output(self):
        return self.apply(self.variables, *self.inputs)

    def votes(self, *inputs):
        """Votes of a loss in which every output counts differently."""

        def loss(variables):
            outputs = jax.tree.leaves(self.module.apply(variables, *inputs))
            floats = [leaf for leaf in outputs if jnp.issubdtype(leaf.dtype, jnp.floating)]
            return sum(jnp.sum(leaf * normal(7, *leaf.shape)) for leaf in floats)

        run = jax.jit(value_and_votes(loss, TERNARY.rule, self.specs))
        return run(self.variables["ternary"])[1]

    def assert_every_matrix_votes_once(self, *inputs):
        """In every layer of a stack, and with something to say; `inputs` other than those of the first call, if any."""
        votes = self.votes(*(inputs or self.inputs))
        for path in flatten_specs(self.specs):
            node = votes
            for name in path.split("/"):
                node = node[name]
            np.testing.assert_array_equal(node["count"], 1, path)
            assert (np.asarray(node["score"]) != 0).any(axis=(-2, -1)).all(), path

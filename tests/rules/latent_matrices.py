"""Matrices of the latent rules: fresh and trained ones, gradients, and the votes on them."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_jax.rules import Latent, Schedule
from arbs_jax.rules.registry import LATENT_RULES
from arbs_jax.state import MatrixSpec, init_matrix
from arbs_kernels.codec import unpack_rows
from arbs_kernels.latents import decode

KEY = jax.random.key(0)
CONSTANT = Schedule(steps=1, warmup=0, final=1.0)
SPEC = MatrixSpec(48, 83, 32)
TABLE = MatrixSpec(48, 83, 32, fan_in=1, table=True)
RULES = {name: replace(rule, schedule=CONSTANT) for name, rule in LATENT_RULES.items()}
PLAIN = Latent(planes=3, momentum="none", moment_decay=0.0, mix=0.0, power=1.0, schedule=CONSTANT)
"""The step is the sample itself, orthogonalised."""

every_rule = pytest.mark.parametrize("name", RULES)


@cache
def updater(rule, spec=SPEC):
    """Compiled once for a rule and a shape."""
    return jax.jit(lambda matrix, votes, step, key=KEY: rule.update(matrix, votes, spec, step, key)[0])


@cache
def voter(spec=SPEC):
    """A vote depends on the trits alone."""

    def vote(matrix, gradient, key):
        return PLAIN.vote({"gradient": gradient, "count": jnp.float32(1)}, matrix, spec, key)

    return jax.jit(vote)


@cache
def fresh(rule, spec=SPEC):
    """A fresh matrix, always the same."""
    make = jax.jit(lambda key: rule.init(key, init_matrix(key, spec), spec))
    return make(jax.random.key(1))


def gradient(seed=0, scale=1e-3, spec=SPEC):
    """Rows and columns of very different size, as gradients have."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.standard_normal((spec.out_features, 1))) * np.exp(rng.standard_normal((1, spec.in_features)))
    return jnp.asarray(scale * sizes * rng.standard_normal(spec.shape), jnp.float32)


def vote_on(matrix, g, seed=0, spec=SPEC):
    """The vote of a gradient."""
    return voter(spec)(matrix, g, jax.random.key(100 + seed))


def latents(rule, matrix, spec=SPEC) -> np.ndarray:
    """The latents that the planes hold."""
    return np.asarray(decode(matrix["trits"], matrix.get("residual"), spec.in_features)).astype(int)


def trits(matrix) -> np.ndarray:
    """One trit an entry."""
    return np.asarray(unpack_rows(matrix["trits"], SPEC.in_features)).astype(int)


def trained(rule, steps=5, spec=SPEC, seed=0):
    """A matrix that has taken a few steps on random gradients."""
    matrix = fresh(rule, spec)
    for step in range(steps):
        votes = vote_on(matrix, gradient(seed + step, spec=spec), step, spec)
        matrix = updater(rule, spec)(matrix, votes, jnp.int32(step))
    return matrix


def types(tree):
    """{leaf: (dtype, shape)}."""
    return {name: (leaf.dtype, leaf.shape) for name, leaf in tree.items()}

"""What several tests share: random matrices with their NumPy twins, and walks over jaxprs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from arbs_kernels.codec import pack_rows

pack = jax.jit(pack_rows)

ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
"""Unit roundoff: the largest relative error of rounding to nearest."""


@dataclass(frozen=True)
class PowerLaw:
    """`S = 2^E`: with small integers as activations products are exact in float32, and operands in float8."""

    def scale(self, leaves, group_size):
        return jnp.exp2(leaves["exponent"].astype(jnp.float32))


@dataclass(frozen=True)
class Sample:
    """A random matrix as the operators take it, and the same in plain NumPy."""

    trits: jax.Array
    """uint8 (N, P)."""
    scale: jax.Array
    """float32 (N, R)."""
    dense_trits: np.ndarray
    """int8 (N, K)."""
    weight: np.ndarray
    """float64 (N, K)."""

    @property
    def in_features(self) -> int:
        """`K`."""
        return self.dense_trits.shape[1]


def random_matrix(rng: np.random.Generator, out_features: int, in_features: int, group_size: int) -> Sample:
    """Uniform trits, scales spread over four octaves."""
    trits = rng.integers(-1, 2, (out_features, in_features)).astype(np.int8)
    scale = np.exp2(rng.uniform(-4, 0, (out_features, -(-in_features // group_size)))).astype(np.float32)
    column_group = np.arange(in_features) // group_size
    weight = trits.astype(np.float64) * scale.astype(np.float64)[:, column_group]
    return Sample(pack(trits), jnp.asarray(scale), trits, weight)


def activations(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, np.ndarray]:
    """Normal activations on the device, and exactly their values in float64."""
    array = rng.standard_normal(shape).astype(jnp.dtype(dtype))
    return jnp.asarray(array), array.astype(np.float64)


def score_by_hand(dw: np.ndarray, trits: np.ndarray, group_size: int) -> np.ndarray:
    """`sum over each group of sign(dW) * T`, a column at a time."""
    score = np.zeros((dw.shape[0], -(-dw.shape[1] // group_size)), np.int64)
    for column in range(dw.shape[1]):
        score[:, column // group_size] += np.sign(dw[:, column]).astype(np.int64) * trits[:, column]
    return score


def product_bound(left: np.ndarray, right: np.ndarray, dtype: str) -> np.ndarray:
    """Largest error of `left @ right` accumulated in float32 in any order and rounded once to `dtype`.

    For a `dtype` shorter than float32 one operand (the decoded weight) may have been rounded to it beforehand.
    """
    magnitude = np.abs(left) @ np.abs(right)
    length = left.shape[-1]
    summation = (length + 1) * ROUNDOFF["float32"]
    rounding = ROUNDOFF[dtype] * (2.0 + ROUNDOFF[dtype]) if dtype != "float32" else ROUNDOFF[dtype]
    return magnitude * (summation + rounding) * (1 + 2 * ROUNDOFF[dtype])


def values_of(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[jax.core.AbstractValue]:
    """Every array that a jaxpr makes, those of its inner jaxprs included; inputs and constants are left out."""
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    for equation in inner.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for parameter in equation.params.values():
            for node in jax.tree.leaves(parameter, is_leaf=lambda leaf: isinstance(leaf, Jaxpr | ClosedJaxpr)):
                if isinstance(node, Jaxpr | ClosedJaxpr):
                    yield from values_of(node)


def is_float(array: Any) -> bool:
    """Whether an array or abstract value holds floats."""
    return jnp.issubdtype(array.dtype, jnp.floating)


def assert_trees_equal(got: Any, expected: Any) -> None:
    """Same structure, dtypes and values, with no tolerance."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, one), two in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two), jax.tree_util.keystr(path), strict=True)


def int64(values: Any) -> jax.Array:
    """An int64 array on the device whatever the mode; plain transfers of NumPy arrays narrow."""
    return jnp.asarray(np.asarray(values, np.int64), dtype=jnp.int64)

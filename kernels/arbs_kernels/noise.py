"""Rounding noise as a pure function of a seed and of (row, column): an integer hash, the same bits on every backend.

Cheaper than a cryptographic generator on every weight, and independent of how a matrix is sharded or batched.
"""

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = np.uint32(2654435769)
"""2^32 divided by the golden ratio: the increment of the Weyl sequence with the smallest discrepancy."""
COLUMN_STRIDE = np.uint32(0x9E3779B1)
FIRST_FACTOR, SECOND_FACTOR = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


def mix(bits: jax.Array) -> jax.Array:
    """A 32-bit integer finaliser with low bias (xor-shift-multiply, two rounds)."""
    bits = (bits ^ (bits >> 16)) * FIRST_FACTOR
    bits = (bits ^ (bits >> 15)) * SECOND_FACTOR
    return bits ^ (bits >> 16)


def positions(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of `shape` (N, K), a hash of the seed uint32 (), the row and the column."""
    rows = jax.lax.broadcasted_iota(jnp.uint32, (shape[0], 1), 0)
    columns = jax.lax.broadcasted_iota(jnp.uint32, (1, shape[1]), 1)
    return mix(mix(rows ^ seed) + columns * COLUMN_STRIDE)


def dither(seed: jax.Array, offset: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform float32 in [0, 1) of `shape` (N, K): a start hashed from seed and position, plus `offset` uint32 ()."""
    return unit(positions(seed, shape) + offset)


def unit(bits: jax.Array) -> jax.Array:
    """Uniform float32 in [0, 1) of uint32, from the upper 24 bits."""
    return (bits >> 8).astype(jnp.float32) * np.float32(2.0**-24)

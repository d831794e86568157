"""Random bits for rounding, a pure function of (run and matrix, stream, step, row, column).

An integer hash of the position: the same bits on every backend, however the matrix is sharded and in whatever order
layers are updated, and cheaper than a cryptographic generator on every weight and step.
"""

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = np.uint32(2654435769)
"""2^32 divided by the golden ratio: the increment of the Weyl sequence with the smallest discrepancy."""


def salt_of(key: jax.Array) -> jax.Array:
    """uint32 () that stands for a key of this run and matrix."""
    return jax.random.bits(key, (), jnp.uint32)


def white(salt: jax.Array, stream: int, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform float32 in [0, 1) of `shape` (N, K), independent from step to step and from stream to stream."""
    at = _mix(_of_stream(salt, stream) ^ _mix(jnp.asarray(step).astype(jnp.uint32)))
    return _unit(_positions(at, shape))


def dither(salt: jax.Array, stream: int, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform float32 in [0, 1) whose steps at one position form a golden-ratio (Weyl) sequence from a random start.

    As rounding noise it is unbiased like white noise, but its errors cancel within a few steps where independent draws
    add up: a weight that is pushed by 0.1 a step moves every tenth step, not at random.
    """
    phase = _positions(_mix(_of_stream(salt, stream)), shape)
    return _unit(phase + jnp.asarray(step).astype(jnp.uint32) * _GOLDEN)


def _of_stream(salt: jax.Array, stream: int) -> jax.Array:
    return salt + np.uint32(stream * int(_GOLDEN) % 2**32)


def _positions(salt: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    rows = jax.lax.broadcasted_iota(jnp.uint32, (shape[0], 1), 0)
    columns = jax.lax.broadcasted_iota(jnp.uint32, (1, shape[1]), 1)
    return _mix(_mix(rows ^ salt) + columns * np.uint32(0x9E3779B1))


def _mix(bits: jax.Array) -> jax.Array:
    """A 32-bit integer finaliser with low bias (xor-shift-multiply, two rounds)."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * np.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def _unit(bits: jax.Array) -> jax.Array:
    return (bits >> 8).astype(jnp.float32) * np.float32(2.0**-24)

"""Random bits for rounding, a pure function of (run and matrix, stream, step, row, column).

An integer hash of the position: the same bits on every backend, however the matrix is sharded and in whatever order
layers are updated, and cheaper than a cryptographic generator on every weight and step. `run_key` makes JAX keys whose
derivation is the same hash: a step derives a key for every layer, matrix and micro-batch, and each of JAX's own
derivations is several kernel launches where this is part of one.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl

from arbs_kernels.noise import GOLDEN, mix, positions, unit


def run_key(seed: jax.Array | int) -> jax.Array:
    """A JAX key of a run's seed (uint32 ()), cheap to fold numbers into; works wherever a JAX key does."""
    return jax.random.key(seed, impl=_IMPLEMENTATION)


def salt_of(key: jax.Array) -> jax.Array:
    """uint32 () that stands for a key of this run and matrix."""
    return jax.random.bits(key, (), jnp.uint32)


def white(salt: jax.Array, stream: int, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform float32 in [0, 1) of `shape` (N, K), independent from step to step and from stream to stream."""
    return unit(positions(white_seed(salt, stream, step), shape))


def white_seed(salt: jax.Array, stream: int, step: jax.Array) -> jax.Array:
    """Seed, uint32 (), of the positions (`arbs_kernels.noise.positions`) whose bits are `white`."""
    return mix(_of_stream(salt, stream) ^ mix(jnp.asarray(step).astype(jnp.uint32)))


def dither_seed(salt: jax.Array, stream: int, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Seed and offset, uint32 () each, of a noise (`arbs_kernels.noise.dither`) whose steps at one position form a
    golden-ratio (Weyl) sequence from a random start.

    As rounding noise it is unbiased like white noise, but its errors cancel within a few steps where independent draws
    add up: a weight that is pushed by 0.1 a step moves every tenth step, not at random.
    """
    return mix(_of_stream(salt, stream)), jnp.asarray(step).astype(jnp.uint32) * GOLDEN


def _of_stream(salt: jax.Array, stream: int) -> jax.Array:
    return salt + np.uint32(stream * int(GOLDEN) % 2**32)


def _fold(key: jax.Array, data: Any) -> jax.Array:
    return mix(mix(key ^ np.uint32(0x85EBCA6B)) + jnp.asarray(data).astype(jnp.uint32) * GOLDEN)


def _random_bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    """Unsigned integers of 8, 16 or 32 bits, or 64 in two halves."""
    counter = jax.lax.iota(jnp.uint32, int(np.prod(shape))).reshape(shape)
    bits = mix(mix(counter ^ key[0]) + np.uint32(0xC2B2AE35))
    if width == 64:
        other = mix(bits ^ np.uint32(0x27D4EB2F))
        return (bits.astype(jnp.uint64) << 32) | other.astype(jnp.uint64)
    return (bits >> np.uint32(32 - width)).astype(f"uint{width}")


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _fold(key, jax.lax.iota(jnp.uint32, int(np.prod(shape))).reshape(*shape, 1))


_IMPLEMENTATION = define_prng_impl(
    key_shape=(1,),
    seed=lambda seed: mix(jnp.asarray(seed).astype(jnp.uint32)).reshape(1),
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold,
    name="arbs_mix32",
    tag="mix",
)

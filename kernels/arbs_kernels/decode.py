"""Effective weights from packed trits and group scales, in plain XLA."""

import jax
import jax.numpy as jnp

from arbs_kernels.codec import unpack_rows


def expand_groups(values: jax.Array, in_features: int, group_size: int) -> jax.Array:
    """Repeats per-group values `(..., N, R)` over their columns: `(..., N, K)`."""
    return jnp.repeat(values, group_size, axis=-1)[..., :in_features]


def decode(packed: jax.Array, scale: jax.Array, in_features: int, group_size: int, dtype: jnp.dtype) -> jax.Array:
    """`W = S * T` of shape `(..., N, K)` in `dtype`, from `uint8 (..., N, P)` and `float32 (..., N, R)`."""
    trits = unpack_rows(packed, in_features).astype(dtype)
    return trits * expand_groups(scale.astype(dtype), in_features, group_size)


def group_sum(values: jax.Array, group_size: int) -> jax.Array:
    """Sums `(..., N, K)` over each group of columns (the last may be short): `(..., N, R)`."""
    columns = values.shape[-1]
    groups = -(-columns // group_size)
    padding = [(0, 0)] * (values.ndim - 1) + [(0, groups * group_size - columns)]
    padded = jnp.pad(values, padding)
    return padded.reshape(*values.shape[:-1], groups, group_size).sum(axis=-1, dtype=values.dtype)

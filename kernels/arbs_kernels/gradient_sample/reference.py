"""A sample of a gradient in plain XLA."""

import jax
import jax.numpy as jnp

from arbs_kernels.codec import unpack_rows
from arbs_kernels.decode import group_sum
from arbs_kernels.noise import positions, unit

LARGEST = 4.0
"""Normalised entries are clipped to this."""
STEPS = 31
"""int8 steps of an entry of one: 4 * 31 = 124 fits."""


def sample(
    gradient: jax.Array, rows: jax.Array, columns: jax.Array, trits: jax.Array, seed: jax.Array, *, group_size: int
) -> tuple[jax.Array, jax.Array]:
    """See `api.gradient_sample`."""
    g = gradient.astype(jnp.float32)
    u = jnp.clip(g * (rows[:, None] * columns[None, :]), -LARGEST, LARGEST)
    rounded = jnp.floor(u * STEPS + unit(positions(seed, g.shape))).astype(jnp.int8)
    return rounded, group_sum(g * unpack_rows(trits, g.shape[1]), group_size)

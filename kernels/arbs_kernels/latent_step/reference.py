"""One step of integer latents in plain XLA."""

import jax
import jax.numpy as jnp

from arbs_kernels import latents
from arbs_kernels.noise import dither

LARGEST = 4.0
"""Entries of a step are clipped to this."""


def step(
    direction: jax.Array,
    trits: jax.Array,
    residual: jax.Array,
    norm: jax.Array,
    rate: jax.Array,
    seed: jax.Array,
    offset: jax.Array,
    *,
    power: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.latent_step`; for one matrix."""
    planes = residual.shape[0] + 1
    d = direction.astype(jnp.float32)
    if power != 1:
        d = jnp.sign(d) * norm * (jnp.abs(d) / norm) ** power
    change = jnp.floor(-rate * jnp.clip(d, -LARGEST, LARGEST) + dither(seed, offset, d.shape))
    change = jnp.where(rate == 0, 0, change)  # A direction that is not finite times nothing would not be nothing.
    v = latents.decode(trits, residual, d.shape[1])
    half = latents.half_range(planes)
    moved = jnp.clip(v.astype(jnp.float32) + change, -half, half).astype(jnp.int16)
    leaves = latents.encode(moved, planes)
    now = latents.leading(moved, planes)
    conditions = (latents.leading(v, planes) != now, now == 0, jnp.abs(moved) == half)
    counts = jnp.stack([jnp.sum(condition, axis=1, dtype=jnp.int32) for condition in conditions], axis=1)
    return leaves["trits"], leaves.get("residual", residual), counts

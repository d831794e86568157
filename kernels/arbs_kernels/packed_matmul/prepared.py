"""Scales in the order and dtype in which kernels for few rows read them: made at each call, or once for inference."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


@jax.jit
def prepared_scale(scale: jax.Array) -> jax.Array:
    """Scales `float32 (..., N, R)` as those kernels read them, bfloat16 `(..., R, N)`, joined with what makes them.

    Without the constraint it would rather turn what they are made of, the accumulators of all layers ahead of their
    loop: a fifth of a gigabyte in a step of `arb-3b`.
    """
    held = with_layout_constraint(scale.astype(jnp.bfloat16), Layout(tuple(range(scale.ndim))))
    return jnp.swapaxes(held, -1, -2)


def is_prepared(scale: jax.Array) -> bool:
    """Whether scales are `(R, N)` already."""
    return scale.dtype == jnp.bfloat16


def as_prepared(scale: jax.Array) -> jax.Array:
    """Scales of either kind, prepared."""
    return scale if is_prepared(scale) else prepared_scale(scale)


def as_rows(scale: jax.Array) -> jax.Array:
    """Scales of either kind, `float32 (N, R)`."""
    return scale.T.astype(jnp.float32) if is_prepared(scale) else scale


def joined(scales: Sequence[jax.Array]) -> jax.Array:
    """The scales of several matrices, of one kind, as those of one with the rows of all."""
    return jnp.concatenate(scales, axis=1 if is_prepared(scales[0]) else 0)

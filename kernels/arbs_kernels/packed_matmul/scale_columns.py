"""Scales in the order in which kernels for few rows read them."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


@jax.jit
def columns_of(scale: jax.Array) -> jax.Array:
    """Scales `(N, R)` as those kernels read them, bfloat16 `(R, N)`: the compiler joins it with what makes them.

    Without the constraint it would rather turn what they are made of, the accumulators of all layers ahead of their
    loop: a fifth of a gigabyte in a step of `arb-3b`.
    """
    return with_layout_constraint(scale.astype(jnp.bfloat16), Layout((0, 1))).T

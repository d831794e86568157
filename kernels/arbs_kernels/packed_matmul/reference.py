"""Packed matmul and its input gradient in plain XLA: decode, then a dense product.

A bfloat16 product is asked for as such: XLA accumulates it in float32 all the same, and rounding a float32 result
afterwards would cost a pass over it or a slower product that rounds.
"""

import jax
import jax.numpy as jnp

from arbs_kernels.decode import decode
from arbs_kernels.packed_matmul.prepared import as_rows


def precision_of(dtype: jnp.dtype) -> str | None:
    """float32 operands are multiplied as float32 (accelerators would take a shorter format by default)."""
    return "highest" if dtype == jnp.float32 else None


def forward(x: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int) -> jax.Array:
    """`y = x W^T`; see `api.packed_matmul`."""
    w_NxK = decode(trits, as_rows(scale), x.shape[1], group_size, x.dtype)
    return jax.lax.dot_general(x, w_NxK, (((1,), (1,)), ((), ())), precision=precision_of(x.dtype))


def input_gradient(
    dy: jax.Array, trits: jax.Array, scale: jax.Array, *, in_features: int, group_size: int
) -> jax.Array:
    """`dx = dy W`; see `api.packed_matmul_input_gradient`."""
    w_NxK = decode(trits, scale, in_features, group_size, dy.dtype)
    return jax.lax.dot_general(dy, w_NxK, (((1,), (0,)), ((), ())), precision=precision_of(dy.dtype))

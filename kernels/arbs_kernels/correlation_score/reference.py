"""Weight gradient and correlation score in plain XLA."""

import jax
import jax.numpy as jnp

from arbs_kernels.codec import unpack_rows
from arbs_kernels.decode import group_sum
from arbs_kernels.packed_matmul.reference import precision_of


def weight_gradient(x: jax.Array, dy: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """`dW = dy^T x`, `(N, K)` in `dtype`, from `x (M, K)` and `dy (M, N)`; summed in float32."""
    return jax.lax.dot_general(
        dy, x, (((0,), (0,)), ((), ())), precision=precision_of(x.dtype), preferred_element_type=dtype
    )


def score_of_gradient(dw: jax.Array, trits: jax.Array, *, group_size: int) -> jax.Array:
    """`int32 (..., N, R)`: sum over each group of `sign(dW) * T`; a zero or NaN gradient votes for neither side."""
    t_NxK = unpack_rows(trits, dw.shape[-1])
    agreement = jnp.where(dw > 0, t_NxK, jnp.where(dw < 0, -t_NxK, jnp.int8(0)))
    return group_sum(agreement.astype(jnp.int32), group_size)


def score(x: jax.Array, dy: jax.Array, trits: jax.Array, *, group_size: int) -> jax.Array:
    """`score_of_gradient(dy^T x)`; see `api.correlation_score`. Rounding a sum to bfloat16 keeps its sign."""
    return score_of_gradient(weight_gradient(x, dy, x.dtype), trits, group_size=group_size)

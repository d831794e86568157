"""The effective weight itself, for products that are large enough to pay for writing it."""

import jax
import jax.numpy as jnp

from arbs_kernels.backends import triton_missing
from arbs_kernels.packed_decode import reference
from arbs_kernels.selection import Implementation, select
from arbs_kernels.shapes import check_matrix
from arbs_kernels.triton_launch import lazily
from arbs_kernels.tuning import tuned

DECODE = {
    "xla": Implementation(reference.weight),
    "triton": Implementation(lazily("arbs_kernels.packed_decode.triton", "weight"), triton_missing),
}


def packed_decode(
    trits: jax.Array,
    scale: jax.Array,
    *,
    in_features: int,
    group_size: int,
    dtype: jnp.dtype,
    implementation: str | None = None,
) -> jax.Array:
    """`W = S * T`: the scale is rounded to `dtype`, the product is exact.

    Args:
        trits: `uint8 (N, P)`, rows as in `arbs_kernels.codec`.
        scale: `float32 (N, ceil(K/group_size))`.
        in_features: `K`, which the packed shape does not determine.
        group_size: columns that share one scale.
        dtype: of the result, float32, bfloat16 or float8_e4m3fn (scales above 448 are not finite there).
        implementation: "xla", "triton", or None for the best that works here.

    Returns:
        `(N, K)` in `dtype`.

    Raises:
        ValueError: shapes or dtypes do not fit. UnsupportedError: no such implementation.
    """
    select("packed_decode", DECODE, implementation)  # a wrong name is said first
    check_matrix("packed_decode", trits, scale, in_features, group_size)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn):
        raise ValueError(f"packed_decode: dtype must be float32, bfloat16 or float8_e4m3fn, got {jnp.dtype(dtype)}")
    run = tuned("packed_decode", DECODE, implementation, (1, trits.shape[0], in_features, group_size), dtype)
    return run(trits, scale, in_features=in_features, group_size=group_size, dtype=jnp.dtype(dtype))

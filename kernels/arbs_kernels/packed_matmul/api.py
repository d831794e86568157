"""`y = x W^T` and `dx = dy W` straight from packed trits and group scales."""

import jax

from arbs_kernels.backends import mosaic_gpu_missing, triton_missing
from arbs_kernels.packed_matmul import reference
from arbs_kernels.packed_matmul.prepared import is_prepared
from arbs_kernels.selection import Implementation, select
from arbs_kernels.shapes import check_activations, check_matrix, check_trits, group_count
from arbs_kernels.triton_launch import lazily
from arbs_kernels.tuning import tuned

FORWARD = {
    "xla": Implementation(reference.forward),
    "triton": Implementation(lazily("arbs_kernels.packed_matmul.triton", "forward"), triton_missing),
    "mosaic_gpu": Implementation(lazily("arbs_kernels.packed_matmul.mosaic_gpu", "forward"), mosaic_gpu_missing),
}
INPUT_GRADIENT = {
    "xla": Implementation(reference.input_gradient),
    "triton": Implementation(lazily("arbs_kernels.packed_matmul.triton", "input_gradient"), triton_missing),
}


def packed_matmul(
    x: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int, implementation: str | None = None
) -> jax.Array:
    """Product with the transposed effective weight.

    Args:
        x: activations `(M, K)`, float32 or bfloat16.
        trits: `uint8 (N, P)`, rows as in `arbs_kernels.codec`.
        scale: `float32 (N, ceil(K/group_size))`; or what `prepared_scale` makes of it once for inference,
            `bfloat16 (ceil(K/group_size), N)`, for which no gradient is made.
        group_size: columns that share one scale.
        implementation: "xla", "triton", "mosaic_gpu" (up to 64 rows of bfloat16 on Hopper), or None for the best that
            works here.

    Returns:
        `(M, N)` in the dtype of `x`, accumulated in float32.

    Raises:
        ValueError: shapes or dtypes do not fit. UnsupportedError: no such implementation.
    """
    select("packed_matmul", FORWARD, implementation)  # a wrong name is said first
    check_activations("packed_matmul", "x", x, x.shape[-1])
    if is_prepared(scale):
        check_trits("packed_matmul", trits, x.shape[1], group_size)
        expected = (group_count(x.shape[1], group_size), trits.shape[0])
        if scale.shape != expected:
            raise ValueError(f"packed_matmul: a prepared scale must be bfloat16 {expected}, got {scale.shape}")
    else:
        check_matrix("packed_matmul", trits, scale, x.shape[1], group_size)
    shape = (x.shape[0], trits.shape[0], x.shape[1], group_size)
    run = tuned("packed_matmul", FORWARD, implementation, shape, x.dtype)
    return run(x, trits, scale, group_size=group_size)


def packed_matmul_input_gradient(
    dy: jax.Array,
    trits: jax.Array,
    scale: jax.Array,
    *,
    in_features: int,
    group_size: int,
    implementation: str | None = None,
) -> jax.Array:
    """Gradient of `packed_matmul` in its activations, from the same packed state.

    Args:
        dy: cotangent `(M, N)`, float32 or bfloat16.
        trits: `uint8 (N, P)`.
        scale: `float32 (N, ceil(K/group_size))`.
        in_features: `K`, which the packed shape does not determine.
        group_size: columns that share one scale.
        implementation: "xla", "triton", or None for the best that works here.

    Returns:
        `(M, K)` in the dtype of `dy`, accumulated in float32.

    Raises:
        ValueError: shapes or dtypes do not fit. UnsupportedError: no such implementation.
    """
    select("packed_matmul_input_gradient", INPUT_GRADIENT, implementation)
    check_matrix("packed_matmul_input_gradient", trits, scale, in_features, group_size)
    check_activations("packed_matmul_input_gradient", "dy", dy, trits.shape[0])
    shape = (dy.shape[0], trits.shape[0], in_features, group_size)
    run = tuned("packed_matmul_input_gradient", INPUT_GRADIENT, implementation, shape, dy.dtype)
    return run(dy, trits, scale, in_features=in_features, group_size=group_size)

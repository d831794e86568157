"""The integer vote of one backward contribution: per group, how far the gradient's signs agree with the trits."""

import jax

from arbs_kernels.backends import mosaic_gpu_missing, triton_missing
from arbs_kernels.correlation_score import reference
from arbs_kernels.selection import Implementation, select
from arbs_kernels.shapes import check_activations, check_pair, check_trits
from arbs_kernels.triton_launch import lazily
from arbs_kernels.tuning import tuned

SCORE = {
    "xla": Implementation(reference.score),
    "mosaic_gpu": Implementation(lazily("arbs_kernels.correlation_score.mosaic_gpu", "score"), mosaic_gpu_missing),
    "triton": Implementation(lazily("arbs_kernels.correlation_score.triton", "score"), triton_missing),
}


def correlation_score(
    x: jax.Array, dy: jax.Array, trits: jax.Array, *, group_size: int, implementation: str | None = None
) -> jax.Array:
    """`score = sum over the group's columns of sign(dL/dW) * T`, with `dL/dW = dy^T x` accumulated in float32.

    Args:
        x: activations `(M, K)`, float32 or bfloat16.
        dy: cotangent of the outputs `(M, N)`, same dtype as `x`.
        trits: `uint8 (N, P)`.
        group_size: columns that share one scale.
        implementation: "xla", "mosaic_gpu", "triton", or None for the best that works here.

    Returns:
        `int32 (N, ceil(K/group_size))`, each in `[-group_size, group_size]`.

    Raises:
        ValueError: shapes or dtypes do not fit. UnsupportedError: no such implementation.
    """
    select("correlation_score", SCORE, implementation)  # a wrong name is said first
    check_activations("correlation_score", "x", x, x.shape[-1])
    check_activations("correlation_score", "dy", dy, trits.shape[0])
    check_pair("correlation_score", x, dy)
    check_trits("correlation_score", trits, x.shape[1], group_size)
    shape = (x.shape[0], trits.shape[0], x.shape[1], group_size)
    run = tuned("correlation_score", SCORE, implementation, shape, x.dtype)
    return run(x, dy, trits, group_size=group_size)

"""`F`, upper triangular, with `F^T (gram + ridge I) F = I`."""

import jax
import jax.numpy as jnp

from arbs_kernels.backends import triton_missing
from arbs_kernels.inverse_cholesky import reference
from arbs_kernels.selection import Implementation, select
from arbs_kernels.triton_launch import lazily

FACTOR = {
    "xla": Implementation(reference.factor),
    "triton": Implementation(lazily("arbs_kernels.inverse_cholesky.triton", "factor"), triton_missing),
}


def inverse_cholesky(gram: jax.Array, ridge: float, *, implementation: str | None = None) -> jax.Array:
    """The inverse of the transposed Cholesky factor; under `vmap` all matrices go in one launch.

    Of columns `x` with `gram = x^T x` the product `x F` has orthonormal ones, but for the ridge.

    Args:
        gram: float32 `(R, R)`, symmetric, no eigenvalue below zero but for rounding.
        ridge: positive; what is added to the diagonal, some roundoffs of the largest entry at least.
        implementation: "xla", "triton", or None for the best that works here.

    Returns:
        float32 `(R, R)`, zero below the diagonal.

    Raises:
        ValueError: shape, dtype or ridge do not fit. UnsupportedError: no such implementation.
    """
    run = select("inverse_cholesky", FACTOR, implementation, ("triton",))
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.dtype != jnp.float32:
        raise ValueError(f"inverse_cholesky: gram must be float32 (R, R), got {gram.dtype} {gram.shape}")
    if not ridge > 0:
        raise ValueError(f"inverse_cholesky: ridge must be above 0, got {ridge}")
    return run(gram, ridge=ridge)

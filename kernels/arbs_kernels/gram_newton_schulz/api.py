"""The matrix by which Newton-Schulz iterations multiply columns of which only the Gram matrix is known."""

import math

import jax
import jax.numpy as jnp

from arbs_kernels.backends import triton_missing
from arbs_kernels.gram_newton_schulz import reference
from arbs_kernels.gram_newton_schulz.reference import Coefficients
from arbs_kernels.selection import Implementation, select
from arbs_kernels.triton_launch import lazily

MOST_TRITON = 64
"""Columns up to which a program holds all of its matrices in registers."""
ITERATE = {
    "xla": Implementation(reference.iterate),
    "triton": Implementation(lazily("arbs_kernels.gram_newton_schulz.triton", "iterate"), triton_missing),
}


def gram_newton_schulz(
    gram: jax.Array, coefficients: Coefficients, *, ridge: float = 0.0, implementation: str | None = None
) -> jax.Array:
    """`F` of the iterations `y <- y (a + b G + c G G)`, `G = y^T y`, which end in `x F` for an `x` with this Gram
    matrix; under `vmap` all matrices go in one launch.

    With a ridge they start from the columns of `x` brought to length one and divided by the root of their Gram matrix's
    Frobenius norm, if that is above one, so that no singular value is; without, from `x` as it is.

    Args:
        gram: float32 `(R, R)`, symmetric, no eigenvalue below zero but for rounding.
        coefficients: `(a, b, c)` of every iteration, at least one.
        ridge: what is then added to the diagonal, against eigenvalues that rounding left below zero; 0 for neither
            ridge nor scaling.
        implementation: "xla"; "triton", for at most 64 columns; or None for the best that works here.

    Returns:
        float32 `(R, R)`; a float32 product of the iterations is exact to its rounding.

    Raises:
        ValueError: shape, dtype, coefficients or ridge do not fit. UnsupportedError: no such implementation, or more
            columns than it takes.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.dtype != jnp.float32:
        raise ValueError(f"gram_newton_schulz: gram must be float32 (R, R), got {gram.dtype} {gram.shape}")
    if not coefficients or any(len(each) != 3 for each in coefficients):
        raise ValueError(f"gram_newton_schulz: coefficients must be triples, at least one, got {coefficients}")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"gram_newton_schulz: ridge must be finite and at least 0, got {ridge}")
    preferred = ("triton",) if gram.shape[0] <= MOST_TRITON else ()
    run = select("gram_newton_schulz", ITERATE, implementation, preferred)
    return run(gram, coefficients=tuple(coefficients), ridge=float(ridge))

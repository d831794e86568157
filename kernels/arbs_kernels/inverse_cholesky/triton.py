"""An inverse Cholesky factor by a Triton kernel: one matrix a program, which never leaves its registers.

Gaussian elimination of `[gram | I]` in the place of `gram`: where a column of the one is eliminated, the column of the
other that takes its place is all that was not there before. Matrices too large for a program are cut in two.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from arbs_kernels.triton_launch import in_one_launch, launch

_MOST = 64
"""Columns of a program's matrix: 4096 registers of a multiprocessor's 65,536, and as many for what becomes of them."""


@triton.jit
def _eliminate(gram_ptr, factor_out, R: tl.constexpr, RIDGE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    i, j = at[:, None], at[None, :]
    start = tl.program_id(0).to(tl.int64) * (R * R)
    inside = (i < R) & (j < R)
    t = tl.load(gram_ptr + start + i * R + j, mask=inside, other=0.0) + tl.where(i == j, RIDGE, 0.0)
    # Before step k: on and right of the diagonal, and below it from column k on, what is left of gram, whose rest is
    # symmetric; below it left of column k the inverse of the unit lower factor.
    for k in range(R):
        row = tl.sum(tl.where(i == k, t, 0.0), axis=0)
        # No less but for rounding, so that a matrix of lower rank does no harm.
        pivot = tl.maximum(tl.sum(tl.where(at == k, row, 0.0)), RIDGE)
        multiplier = tl.where(at > k, row / pivot, 0.0)
        t = tl.where((j == k) & (i > k), 0.0, t) - multiplier[:, None] * tl.where(at == k, 1.0, row)[None, :]
    pivots = tl.maximum(tl.sum(tl.where(i == j, t, 0.0), axis=1), RIDGE)
    lower = tl.where(i > j, t, tl.where(i == j, 1.0, 0.0)) * tl.rsqrt(pivots)[:, None]
    tl.store(factor_out + start + j * R + i, lower, mask=inside)


def factor(gram: jax.Array, *, ridge: float) -> jax.Array:
    """See `api.inverse_cholesky`."""
    return in_one_launch(_factors, gram, ridge=ridge)


def _factors(gram: jax.Array, *, ridge: float) -> jax.Array:
    """Of a stack of matrices."""
    R = gram.shape[-1]
    if R > _MOST:
        return _of_halves(gram, R // 2, ridge)
    return launch(
        _eliminate,
        gram,
        out=jax.ShapeDtypeStruct(gram.shape, jnp.float32),
        num_warps=4,
        num_stages=1,
        grid=(gram.shape[0],),
        R=R,
        RIDGE=ridge,
        SIZE=max(16, triton.next_power_of_2(R)),
    )


def _of_halves(gram: jax.Array, half: int, ridge: float) -> jax.Array:
    """By blocks: the second half is factored when what the first explains is taken from it."""
    first = _factors(gram[:, :half, :half], ridge=ridge)
    across = _product(jnp.swapaxes(first, 1, 2), gram[:, :half, half:])
    left = gram[:, half:, half:] - _product(jnp.swapaxes(across, 1, 2), across)
    second = _factors(left, ridge=ridge)
    corner = -_product(first, _product(across, second))
    below = jnp.zeros((gram.shape[0], gram.shape[1] - half, half), jnp.float32)
    return jnp.block([[first, corner], [below, second]])


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

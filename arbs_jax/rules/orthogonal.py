"""Orthogonalising by matrix products alone.

Newton-Schulz iterations with quintic polynomials of the Gram matrix bring all singular values near one. Two things
keep them few: the starting matrix is divided by the root of its Gram matrix's Frobenius norm, a bound on the largest
singular value that is tighter than the matrix's own Frobenius norm; and where it matters the coefficients differ from
step to step. Sums and scales are taken of small square matrices, not of the wide one. Where the matrix is longer than
wide, even the iterations are those of small square matrices.
"""

import jax
import jax.numpy as jnp

from arbs_kernels.gram_newton_schulz import MOST_TRITON, gram_newton_schulz
from arbs_kernels.gram_newton_schulz.reference import TINY, Coefficients, polynomials

# Quintic coefficients of K. Jordan's Muon: after three, singular values from 0.02 on end between 0.68 and 1.21.
_FAST = ((3.4445, -4.7750, 2.0315),) * 3
# Minimax quintics step after step (Amsel et al., 2025, "The Polar Express") for singular values from 0.001 to 1.02,
# each step's range widened by a percent against rounding: beyond it such polynomials explode. After six steps all are
# within 0.23% of one. The last, a cubic, brings them within 0.001% and none above: a momentum that is projected on a
# basis longer than one grows from step to step.
_EXACT_START = (
    (8.305, -23.663, 16.876),
    (4.145, -3.020, 0.553),
    (3.940, -2.881, 0.538),
    (3.311, -2.440, 0.490),
)
_EXACT_END = (
    (2.320, -1.669, 0.410),
    (1.895, -1.270, 0.375),
    (1.5, -0.5, 0.0),
)
_LONG = 1.5
"""From so many times as long as wide on, three iterations on the Gram matrix, which are nine products of small squares
and two with the whole matrix, are fewer operations than on the matrix itself: three and six."""
_RIDGE = 1e-6
"""The square of the least singular value that the polynomials bring up."""


def newton_schulz(x: jax.Array) -> jax.Array:
    """A step with singular values near one, scaled to a root-mean-square of about 1.

    `x` is `(N, K)` in float32, or in bfloat16, which is enough on accelerators; so are the products and the result.
    """
    iterate = _iterate_on_gram if max(x.shape) >= _LONG * min(x.shape) else _iterate
    return iterate(x) * max(x.shape) ** 0.5


def orthonormal_columns(x: jax.Array, implementation: str | None = None) -> jax.Array:
    """Nearly orthonormal columns that span those of a tall float32 `(N, r)`.

    Columns are first brought to one length, so that directions of little weight are not lost. Directions that are
    nearly dependent come out shorter. `implementation` is that of `arbs_kernels.gram_newton_schulz`, up to the columns
    that a kernel takes; more are products for XLA, as all others here are.
    """
    implementation = implementation if x.shape[1] <= MOST_TRITON else None

    def factor(x: jax.Array, coefficients: Coefficients, ridge: float) -> jax.Array:
        gram = _product(x.T, x)
        return gram_newton_schulz(gram, coefficients, ridge=ridge, implementation=implementation)

    half = _product(x, factor(x, _EXACT_START, _RIDGE))
    return _product(half, factor(half, _EXACT_END, 0.0))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _bound(gram: jax.Array) -> jax.Array:
    """The inverse of a bound on the largest eigenvalue.

    By the trace first, so that squares neither overflow nor vanish. (The root is at least 1 over the number of rows,
    but for a matrix of zeros.)
    """
    trace = jnp.trace(gram.astype(jnp.float32)) + TINY
    norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(gram.astype(jnp.float32) / trace)), 1e-6))
    return 1 / (norm * trace)


def _iterate_on_gram(x: jax.Array) -> jax.Array:
    """`_iterate`, with all of its polynomials taken of the first Gram matrix."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return a.astype(x.dtype) @ b.astype(x.dtype)

    gram = _gram_of_shorter(x)
    bound = _bound(gram)
    return _times((jnp.sqrt(bound) * polynomials(bound * gram, _FAST, product)).astype(x.dtype), x)


def _iterate(x: jax.Array) -> jax.Array:
    """`x <- (a + b G + c G G) x`, with `G` the Gram matrix of its shorter side, in its dtype; singular values first go
    below one."""
    identity = jnp.eye(min(x.shape), dtype=jnp.float32)
    bound = jnp.float32(1)
    for index, (a, b, c) in enumerate(_FAST):
        gram = _gram_of_shorter(x)
        if index == 0:
            bound = _bound(gram)  # The long matrix itself is never rescaled.
        polynomial = a * identity + b * (bound * gram) + c * (bound * (bound * (gram @ gram)))
        x = _times((jnp.sqrt(bound) * polynomial).astype(x.dtype), x)
        bound = jnp.float32(1)
    return x


def _gram_of_shorter(x: jax.Array) -> jax.Array:
    return x.T @ x if x.shape[0] > x.shape[1] else x @ x.T


def _times(square: jax.Array, x: jax.Array) -> jax.Array:
    """The product over the shorter side of `x`; a tall one is not turned round, which would be a pass over it."""
    return x @ square.T if x.shape[0] > x.shape[1] else square @ x

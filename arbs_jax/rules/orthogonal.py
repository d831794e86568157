"""Orthogonalising by matrix products alone.

Newton-Schulz iterations with quintic polynomials of the Gram matrix bring all singular values near one. Two things
keep them few: the starting matrix is divided by the root of its Gram matrix's Frobenius norm, a bound on the largest
singular value that is tighter than the matrix's own Frobenius norm; and where it matters the coefficients differ from
step to step. Sums and scales are taken of small square matrices, not of the wide one.
"""

import jax
import jax.numpy as jnp

# Quintic coefficients of K. Jordan's Muon: after three, singular values from 0.02 on end between 0.68 and 1.21.
_FAST = ((3.4445, -4.7750, 2.0315),) * 3
# Minimax quintics step after step (Amsel et al., 2025, "The Polar Express") for singular values from 0.001 to 1.02,
# each step's range widened by a percent against rounding: beyond it such polynomials explode. After six steps all are
# within 0.23% of one. The last, a cubic, brings them within 0.001% and none above: a momentum that is projected on a
# basis longer than one grows from step to step.
_EXACT = (
    (8.305, -23.663, 16.876),
    (4.145, -3.020, 0.553),
    (3.940, -2.881, 0.538),
    (3.311, -2.440, 0.490),
    (2.320, -1.669, 0.410),
    (1.895, -1.270, 0.375),
    (1.5, -0.5, 0.0),
)
_TINY = 1e-30


def newton_schulz(x: jax.Array) -> jax.Array:
    """A step with singular values near one, scaled to a root-mean-square of about 1.

    `x` is `(N, K)` in float32, or in bfloat16, which is enough on accelerators; so are the products and the result.
    """
    tall = x.shape[0] > x.shape[1]
    y = _iterate(x.T if tall else x, _FAST) * max(x.shape) ** 0.5
    return y.T if tall else y


def orthonormal_columns(x: jax.Array) -> jax.Array:
    """Nearly orthonormal columns that span those of a tall float32 `(N, r)`.

    Columns are first brought to one length, so that directions of little weight are not lost. Directions that are
    nearly dependent come out shorter.
    """
    unit = x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=0) + _TINY)
    return _iterate(unit.T, _EXACT).T


def _iterate(y: jax.Array, coefficients: tuple[tuple[float, float, float], ...]) -> jax.Array:
    """`y <- (a + b G + c G G) y` with `G = y y^T`, for a wide `y`, in its dtype; singular values first go below one."""
    identity = jnp.eye(y.shape[0], dtype=jnp.float32)
    bound = jnp.float32(1)
    for index, (a, b, c) in enumerate(coefficients):
        gram = y @ y.T
        if index == 0:
            # By the trace first, so that squares neither overflow nor vanish. The wide matrix itself is never rescaled.
            trace = jnp.trace(gram.astype(jnp.float32)) + _TINY
            # (At least 1 over the number of rows, but for a matrix of zeros.)
            norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(gram.astype(jnp.float32) / trace)), 1e-6))
            bound = 1 / (norm * trace)
        polynomial = a * identity + b * (bound * gram)
        if c:
            polynomial += c * (bound * (bound * (gram @ gram)))
        y = (jnp.sqrt(bound) * polynomial).astype(y.dtype) @ y
        bound = jnp.float32(1)
    return y

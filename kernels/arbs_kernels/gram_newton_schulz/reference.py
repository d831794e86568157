"""Newton-Schulz iterations on a Gram matrix in plain XLA."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Coefficients = tuple[tuple[float, float, float], ...]
"""`(a, b, c)` of every iteration."""
TINY = 1e-30


def iterate(gram: jax.Array, *, coefficients: Coefficients, ridge: float) -> jax.Array:
    """See `api.gram_newton_schulz`."""
    if not ridge:
        return polynomials(gram, coefficients, _product)
    unit = jax.lax.rsqrt(jnp.diagonal(gram) + TINY)
    gram = gram * (unit[:, None] * unit[None, :])
    # With a column of length one it is at most one; without, squares have vanished that columns still have.
    bound = jnp.minimum(1 / (jnp.sqrt(jnp.sum(jnp.square(gram))) + TINY), 1)
    lifted = gram * bound + ridge * jnp.eye(gram.shape[0], dtype=jnp.float32)
    total = polynomials(lifted, coefficients, _product)
    return unit[:, None] * (total * jnp.sqrt(bound))


def polynomials(
    gram: jax.Array, coefficients: Coefficients, product: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """The square matrix by which iterations `y <- y (a + b G + c G G)`, `G = y^T y`, multiply a `y` with this Gram
    matrix: everything between is as small as that. What rounding does to small singular values is not seen until the
    next Gram matrix is taken."""
    identity = jnp.eye(gram.shape[0], dtype=jnp.float32)
    total = identity
    for index, (a, b, c) in enumerate(coefficients):
        polynomial = a * identity + b * gram
        if c:
            polynomial += c * product(gram, gram)
        total = product(polynomial, total) if index else polynomial
        if index + 1 < len(coefficients):
            # It is symmetric, and turned round here: products that share a left operand the compiler would join, which
            # takes copies of all three.
            gram = product(product(polynomial.T, gram), polynomial)
    return total


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

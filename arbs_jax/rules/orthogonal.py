"""Orthogonalising by matrix products alone.

Newton-Schulz iterations with quintic polynomials of the Gram matrix bring all singular values near one. Two things
keep them few: the starting matrix is divided by the root of its Gram matrix's Frobenius norm, a bound on the largest
singular value that is tighter than the matrix's own Frobenius norm; and where it matters the coefficients differ from
step to step. Sums and scales are taken of small square matrices, not of the wide one. Where the matrix is longer than
wide, even the iterations are those of small square matrices.
"""

import math

import jax
import jax.numpy as jnp

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
_TINY = 1e-30


def newton_schulz(x: jax.Array) -> jax.Array:
    """A step with singular values near one, scaled to a root-mean-square of about 1.

    `x` is `(N, K)` in float32, or in bfloat16, which is enough on accelerators; so are the products and the result.
    """
    if x.dtype == jnp.float32:
        return _iterated(x)
    # A CPU would round between a product and what is added to it, and is no faster in bfloat16.
    return jax.lax.platform_dependent(
        x, cpu=lambda x: _iterated(x.astype(jnp.float32)).astype(x.dtype), default=_iterated
    )


def orthonormal_columns(x: jax.Array) -> jax.Array:
    """Nearly orthonormal columns that span those of a tall float32 `(N, r)`.

    Columns are first brought to one length, so that directions of little weight are not lost. Directions that are
    nearly dependent come out shorter.
    """
    gram = _gram(x)
    unit = jax.lax.rsqrt(jnp.diagonal(gram) + _TINY)
    gram = gram * (unit[:, None] * unit[None, :])
    # With a column of length one it is at most one; without, squares have vanished that columns still have.
    bound = jnp.minimum(_bound(gram), 1)
    # Rounding may leave eigenvalues below zero, which the polynomials would blow up.
    start = _polynomials(gram * bound + _RIDGE * _identity(gram), _EXACT_START)
    half = _product(x, unit[:, None] * (start * jnp.sqrt(bound)))
    return _product(half, _polynomials(_gram(half), _EXACT_END))


def _polynomials(gram: jax.Array, coefficients: tuple[tuple[float, float, float], ...]) -> jax.Array:
    """The square matrix by which iterations `y <- y (a + b G + c G G)`, `G = y^T y`, multiply a `y` with this Gram
    matrix: everything between is as small as that. What rounding does to small singular values is not seen until the
    next Gram matrix is taken."""
    total = gram
    for index, (a, b, c) in enumerate(coefficients):
        polynomial = a * _identity(gram) + b * gram
        if c:
            polynomial += c * _product(gram, gram)
        total = _product(polynomial, total) if index else polynomial
        if index + 1 < len(coefficients):
            # Symmetric; turned round, because the compiler would join products that share a left operand, and copy.
            gram = _product(_product(polynomial.T, gram), polynomial)
    return total


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _gram(y: jax.Array) -> jax.Array:
    return _product(y.T, y)


def _identity(square: jax.Array) -> jax.Array:
    return jnp.eye(square.shape[0], dtype=jnp.float32)


def _bound(gram: jax.Array) -> jax.Array:
    """The inverse of a bound on the largest eigenvalue.

    By the trace first, so that squares neither overflow nor vanish. (The root is at least 1 over the number of rows,
    but for a matrix of zeros.)
    """
    trace = jnp.trace(gram.astype(jnp.float32)) + _TINY
    norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(gram.astype(jnp.float32) / trace)), 1e-6))
    return 1 / (norm * trace)


def _iterated(x: jax.Array) -> jax.Array:
    """Iterations `x <- (a + b G + c G G) x`, `G` the Gram matrix of the shorter side, after singular values went below
    one.

    Matrix products are all of the form `c + number * a b`, a single operation of GPUs' libraries, which reads and
    writes nothing between. Numbers that would stand before `c` are put off: with `G = scale * gram` the polynomial is
    `a (1 + weight * shape)`, and the `a` are a factor of the result. (Two products that share a number or a left
    operand would be no such operation: the compiler joins the one and does not recognise the other.)
    """
    iterate = _iterate_on_gram if max(x.shape) >= _LONG * min(x.shape) else _iterate
    return iterate(x, max(x.shape) ** 0.5)


def _iterate_on_gram(x: jax.Array, factor: float) -> jax.Array:
    """All polynomials are taken of the first Gram matrix, and multiplied before they meet `x`."""
    gram, scale = _gram_of_shorter(x), 1.0
    bound = _bound(gram)
    gram, total = (bound * gram).astype(x.dtype), gram
    whole = factor * math.prod(a for a, _, _ in _FAST) * jnp.sqrt(bound)
    for index, (a, b, c) in enumerate(_FAST):
        weight = b * scale / a
        shape = gram + (c * scale / b) * (gram.T @ gram)
        if index:
            total = total + weight * (shape @ total)
        else:
            total = (whole * (_identity(gram) + weight * shape.astype(jnp.float32))).astype(x.dtype)
        if index + 1 < len(_FAST):
            # The next Gram matrix, of a a P P G with P P = 1 + 2 weight * (shape + weight / 2 * shape shape).
            square = shape + (weight / 2) * (shape.T @ shape)
            gram = gram + (2 * weight) * (square @ gram)
            scale *= a * a
    return _times(total, x)


def _iterate(x: jax.Array, factor: float) -> jax.Array:
    """`y` is `ahead` times as large as what `x` has become, so that after the last iteration it is the result."""
    ahead = factor * math.prod(a for a, _, _ in _FAST)
    gram = _gram_of_shorter(x)
    bound = _bound(gram)
    y = (ahead * jnp.sqrt(bound) * x).astype(x.dtype)
    gram, scale = (bound * gram).astype(x.dtype), 1.0
    for index, (a, b, c) in enumerate(_FAST):
        if index:
            gram, scale = _gram_of_shorter(y), ahead**-2
        y = y + (b * scale / a) * _times(gram + (c * scale / b) * (gram @ gram), y)
        ahead /= a
    return y


def _gram_of_shorter(x: jax.Array) -> jax.Array:
    return x.T @ x if x.shape[0] > x.shape[1] else x @ x.T


def _times(square: jax.Array, x: jax.Array) -> jax.Array:
    """The product over the shorter side of `x`."""
    return x @ square.T if x.shape[0] > x.shape[1] else square @ x

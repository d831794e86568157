"""Orthogonalising a step by matrix products alone."""

import jax
import jax.numpy as jnp

# Quintic coefficients of K. Jordan's Muon: fast, ends with singular values between about 0.7 and 1.2.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: jax.Array, dtype: jnp.dtype, iterations: int = 5) -> jax.Array:
    """The step with all singular values near one, scaled to a root-mean-square of about 1.

    Five quintic Newton-Schulz iterations towards the polar factor `U V^T` of `x`, as in Muon.

    Args:
        x: float32 (N, K).
        dtype: of the products; bfloat16 is enough on accelerators.
        iterations: of the quintic.

    Returns:
        float32 (N, K).
    """
    tall = x.shape[0] > x.shape[1]
    y = x.T if tall else x
    y = (y * jax.lax.rsqrt(jnp.sum(jnp.square(y)) + 1e-30)).astype(dtype)
    a, b, c = _QUINTIC
    for _ in range(iterations):
        gram = _product(y, y.T)
        y = a * y + _product(b * gram + c * _product(gram, gram), y)
    y = y.astype(jnp.float32) * max(x.shape) ** 0.5
    return y.T if tall else y


def orthonormal_columns(x: jax.Array) -> jax.Array:
    """Nearly orthonormal columns that span those of a tall float32 `(N, r)`.

    Columns are first brought to one length, so that directions of little weight are not lost; five quintic iterations
    bring singular values near one, three cubic ones within a thousandth of it. Directions that are nearly dependent
    come out shorter. Both counts are needed: with two cubics a momentum held by this basis loses an eighth of its
    signal, and with three or four quintics columns that once became parallel hardly part again.
    """
    unit = x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=0) + 1e-30)
    y = newton_schulz(unit, jnp.float32) / max(x.shape) ** 0.5
    for _ in range(3):
        y = 1.5 * y - 0.5 * _product(y, _product(y.T, y))
    return y


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    precision = "highest" if left.dtype == jnp.float32 else None
    return jnp.matmul(left, right, precision=precision, preferred_element_type=jnp.float32).astype(left.dtype)

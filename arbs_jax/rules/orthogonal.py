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

    # A loop, not unrolled: each of a model's matrices has its own, and unrolled they are most of the compile time.
    def quintic(_: int, y: jax.Array) -> jax.Array:
        gram = _product(y, y.T)
        return a * y + _product(b * gram + c * _product(gram, gram), y)

    y = jax.lax.fori_loop(0, iterations, quintic, y)
    y = y.astype(jnp.float32) * max(x.shape) ** 0.5
    return y.T if tall else y


def orthonormal_columns(x: jax.Array) -> jax.Array:
    """Polar factor of a tall float32 `(N, r)`: orthonormal columns that span those of `x`.

    The quintic brings singular values near one, five cubic iterations make them one.
    """
    y = newton_schulz(x, jnp.float32) / max(x.shape) ** 0.5
    return jax.lax.fori_loop(0, 5, lambda _, y: 1.5 * y - 0.5 * _product(y, _product(y.T, y)), y)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    precision = "highest" if left.dtype == jnp.float32 else None
    return jnp.matmul(left, right, precision=precision, preferred_element_type=jnp.float32).astype(left.dtype)

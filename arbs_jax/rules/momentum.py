"""Momentum in integers: low-rank int8 factors, or one int8 a weight.

Both hold `m <- beta * m + (1 - beta) * u` and give the direction of a step, `(1 - mix) * m + mix * u`. The direction
uses the fresh momentum before it is rounded for storage, so that what rounding or truncation loses is missing from the
memory of later steps only, never from the step itself.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from arbs_jax.rules.noise import white
from arbs_jax.rules.orthogonal import orthonormal_columns

_INT8_UNIT = 4.0 / 127
"""Value of one int8 step: the sample `u` is clipped to [-4, 4]."""
_EXPONENT_STEPS = 16
"""Steps per power of two of the factors' column scales."""

Leaves = dict[str, jax.Array]


class Momentum(Protocol):
    """A momentum's integer leaves and how they move."""

    def init(self, key: jax.Array, shape: tuple[int, int]) -> Leaves:
        """Fresh leaves for a matrix of `shape` (N, K)."""
        ...

    def advance(
        self, leaves: Leaves, u: jax.Array, beta: float, mix: float, salt: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Leaves]:
        """(direction (N, K) in the dtype of `u`, leaves to keep) after the sample `u` (N, K)."""
        ...


class NoMomentum:
    """The sample itself."""

    def init(self, key: jax.Array, shape: tuple[int, int]) -> Leaves:
        """No leaves."""
        return {}

    def advance(
        self, leaves: Leaves, u: jax.Array, beta: float, mix: float, salt: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Leaves]:
        """`u`."""
        return u, {}


class Int8Momentum:
    """`momentum` int8 (N, K) in units of 4/127, stochastically rounded."""

    def init(self, key: jax.Array, shape: tuple[int, int]) -> Leaves:
        """Zeros."""
        return {"momentum": jnp.zeros(shape, jnp.int8)}

    def advance(
        self, leaves: Leaves, u: jax.Array, beta: float, mix: float, salt: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Leaves]:
        """See `Momentum`."""
        fresh = beta * _INT8_UNIT * leaves["momentum"].astype(jnp.float32) + (1 - beta) * u
        rounded = jnp.floor(fresh / _INT8_UNIT + white(salt, 1, step, u.shape))
        direction = ((1 - mix) * fresh + mix * u).astype(u.dtype)
        return direction, {"momentum": jnp.clip(rounded, -127, 127).astype(jnp.int8)}


class LowRankMomentum:
    """`m ~ P Q^T` with int8 factors `left` (N, r) and `right` (K, r), each column with a log2 scale int16 in 1/16.

    One step of subspace iteration a step: `P` is an orthonormal basis of `m Q`, then `Q = m^T P`, so that `P Q^T`
    follows the leading directions of the fresh momentum (as PowerSGD does for gradients). At rank min(N, K)/16 it
    costs at most one bit a weight.
    """

    def __init__(self, divisor: int, implementation: str | None = None):
        self.divisor, self.implementation = divisor, implementation

    def rank(self, shape: tuple[int, int]) -> int:
        """`r = max(1, min(N, K) // divisor)`."""
        return max(1, min(shape) // self.divisor)

    def init(self, key: jax.Array, shape: tuple[int, int]) -> Leaves:
        """Zero `left`; random `right`, which gives the first step its directions."""
        rank = self.rank(shape)
        scales = jnp.full((rank,), -20 * _EXPONENT_STEPS, jnp.int16)
        return {
            "left": jnp.zeros((shape[0], rank), jnp.int8),
            "left_scale": scales,
            "right": jax.random.randint(key, (shape[1], rank), -127, 128, jnp.int8),
            "right_scale": scales,
        }

    def advance(
        self, leaves: Leaves, u: jax.Array, beta: float, mix: float, salt: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Leaves]:
        """See `Momentum`."""
        left = _decode(leaves["left"], leaves["left_scale"])
        right = _decode(leaves["right"], leaves["right_scale"])
        # The fresh momentum, beta left right^T + (1 - beta) u, is never formed: only its products are.
        # Only the directions of `right` matter here; unit columns keep the product well scaled.
        directions = right * jax.lax.rsqrt(jnp.sum(jnp.square(right), axis=0) + 1e-30)
        seen = beta * (left @ (right.T @ directions)) + (1 - beta) * _product(u, directions)
        basis = orthonormal_columns(seen, self.implementation)
        image = beta * (right @ (left.T @ basis)) + (1 - beta) * _product(u.T, basis)
        low_rank = jnp.matmul(left.astype(u.dtype), right.T.astype(u.dtype))
        direction = ((1 - mix) * (1 - beta) + mix) * u + ((1 - mix) * beta) * low_rank
        left_code, left_scale = _encode(basis, white(salt, 2, step, basis.shape))
        right_code, right_scale = _encode(image, white(salt, 3, step, image.shape))
        return direction, {
            "left": left_code,
            "left_scale": left_scale,
            "right": right_code,
            "right_scale": right_scale,
        }


def _product(a: jax.Array, b: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """`a b` in `dtype`, multiplied in the shorter dtype of the two."""
    short = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.matmul(a.astype(short), b.astype(short), preferred_element_type=dtype)


def _encode(x: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 codes and int16 log2 scales (in 1/16) of the columns of `x`, stochastically rounded."""
    largest = jnp.max(jnp.abs(x), axis=0)
    scale = jnp.ceil(_EXPONENT_STEPS * jnp.log2(jnp.maximum(largest, 1e-30))).astype(jnp.int16)
    codes = jnp.floor(x * 127 * _power(-scale) + noise)
    return jnp.clip(codes, -127, 127).astype(jnp.int8), scale


def _decode(codes: jax.Array, scale: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32) * (_power(scale) / 127)


def _power(scale: jax.Array) -> jax.Array:
    return jnp.exp2(scale.astype(jnp.float32) / _EXPONENT_STEPS)

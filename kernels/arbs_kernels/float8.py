"""Products whose operands are rounded to float8, which tensor cores of Ada, Hopper and later multiply twice as fast.

An operand is float8 numbers times one power of two. Trits lose nothing: a weight is its group's scale, rounded to four
significant bits, or its negative, or zero. Activations keep as many (e4m3), cotangents three and a wider range (e5m2);
sums stay wider. That split, and one factor for a whole array, follow Micikevicius et al. 2022 (arXiv 2209.05433).

The factor of activations and cotangents is taken from some of their rows. Reading all of them would cost a good part
of what such a product saves, and the formats bear what a sample misses: 56 times its largest magnitude (e4m3) or 7168
times (e5m2); what is larger still is clipped.

XLA hands a product of float8 arrays to the vendor's library where the device has one. Anywhere else it multiplies the
same numbers in a wider dtype: right, and no faster.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from arbs_kernels.byte_transpose import byte_transpose
from arbs_kernels.packed_decode import packed_decode

OPERAND = jnp.dtype(jnp.float8_e4m3fn)
"""Of activations and weights."""
COTANGENT = jnp.dtype(jnp.float8_e5m2)
"""Of gradients of outputs."""

LEAST_ROWS = 256
"""Rows of activations from which on products are of float8; fewer are bound by their weights, not by arithmetic."""
_SAMPLE = 256
"""Rows that are looked at, about."""
_SAMPLE_EXPONENT = 3
"""The sample's largest magnitude is brought below 2 to this."""
_SCALE_EXPONENT = 8
"""The largest scale is brought below 2 to this."""


class Float8(NamedTuple):
    """What `values * unit` says."""

    values: jax.Array
    """Float8, any shape."""
    unit: jax.Array
    """Power of two, float32 ()."""


def _power_below(largest: jax.Array, exponent: int) -> jax.Array:
    """The power of two, float32 (), that brings `largest` into `[2^(exponent-1), 2^exponent)`; 1 for 0, inf and NaN."""
    known = jnp.isfinite(largest) & (largest > 0)
    _, own = jnp.frexp(jnp.where(known, largest, 1).astype(jnp.float32))
    return jnp.where(known, jnp.ldexp(jnp.float32(1), jnp.clip(exponent - own, -100, 100)), 1)


def rounded(rows: jax.Array, dtype: jnp.dtype) -> Float8:
    """`rows (M, C)` in a float8 `dtype`; what is not finite becomes NaN."""
    sample = rows[:: max(1, rows.shape[0] // _SAMPLE)]
    factor = _power_below(jnp.max(jnp.abs(sample)), _SAMPLE_EXPONENT)
    most = float(jnp.finfo(dtype).max)
    scaled = rows * factor.astype(rows.dtype)
    values = jnp.where(jnp.isfinite(scaled), jnp.clip(scaled, -most, most), jnp.nan).astype(dtype)
    return Float8(values, 1 / factor)


def weight(
    trits: jax.Array, scale: jax.Array, *, in_features: int, group_size: int, implementation: str | None = None
) -> Float8:
    """The effective weight `(N, K)`; arguments as in `packed_decode`.

    Scales under 2^-15 of the largest become zero, and below 2^-13 of it they have fewer bits.
    """
    factor = _power_below(jnp.max(scale), _SCALE_EXPONENT)
    values = packed_decode(
        trits,
        scale * factor,
        in_features=in_features,
        group_size=group_size,
        dtype=OPERAND,
        implementation=implementation,
    )
    return Float8(values, 1 / factor)


def product(
    a: Float8, b: Float8, contracted: tuple[int, int], dtype: jnp.dtype, implementation: str | None = None
) -> jax.Array:
    """`a` times `b` over one axis of each, in `dtype`; `implementation` as in `byte_transpose`.

    Sums are float32, or what the device's float8 product has: on Hopper some 14 bits (DeepSeek-AI, 2024).
    """

    def summed_last(values: jax.Array, axis: int) -> jax.Array:
        # The only layout that Hopper multiplies. XLA would see to it as well, and take nearly twice as long.
        return values if axis == 1 else byte_transpose(values, implementation=implementation)

    left, right = (summed_last(of.values, axis) for of, axis in zip((a, b), contracted, strict=True))
    sums = jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.dtype(dtype))
    return sums * (a.unit * b.unit).astype(dtype)

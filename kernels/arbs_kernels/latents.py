"""Integer latents as planes of trits.

A latent `v` of `p` planes is a balanced-ternary number in `[-h, h]`, `h = (3^p - 1)/2`. Its leading digit is the trit
the forward pass reads (the leaf `trits`, shared with every other rule); the lower digits are the leaf `residual`,
`uint8 (..., p-1, N, P)`, most significant first. Every plane costs 1.6 bits a weight.
"""

import jax
import jax.numpy as jnp

from arbs_kernels.codec import join_planes, pack_planes, split_planes, unpack_planes


def half_range(planes: int) -> int:
    """Largest latent, `h = (3^p - 1)/2`."""
    return (3**planes - 1) // 2


def zero_half_range(planes: int) -> int:
    """Largest latent whose trit is 0, `(3^(p-1) - 1)/2`: the middle third of the range."""
    return half_range(planes - 1)


def leading(v: jax.Array, planes: int) -> jax.Array:
    """Trits int8 of latents: the leading balanced-ternary digit."""
    edge = zero_half_range(planes)
    return (v > edge).astype(jnp.int8) - (v < -edge).astype(jnp.int8)


def encode(v: jax.Array, planes: int) -> dict[str, jax.Array]:
    """Leaves `trits` and `residual` of latents `int (N, K)` in range."""
    rest = split_planes(v.astype(jnp.int16))
    packed = []
    for remaining in range(planes, 0, -1):
        digit = leading(rest, remaining)
        packed.append(pack_planes(digit))
        rest = rest - digit.astype(jnp.int16) * jnp.int16(3 ** (remaining - 1))
    leaves = {"trits": packed[0]}
    if planes > 1:
        leaves["residual"] = jnp.stack(packed[1:])
    return leaves


def decode(trits: jax.Array, residual: jax.Array | None, in_features: int) -> jax.Array:
    """Latents `int16 (N, K)` of the two leaves; `residual` is None for one plane."""
    v = unpack_planes(trits).astype(jnp.int16)
    for plane in () if residual is None else residual:
        v = v * jnp.int16(3) + unpack_planes(plane).astype(jnp.int16)
    return join_planes(v, in_features)

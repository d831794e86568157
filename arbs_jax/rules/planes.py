"""Integer latents as planes of trits.

A latent `v` of `p` planes is a balanced-ternary number in `[-h, h]`, `h = (3^p - 1)/2`. Its leading digit is the trit
the forward pass reads (the leaf `trits`, shared with every other rule); the lower digits are the leaf `residual`,
`uint8 (..., p-1, N, P)`, most significant first. Every plane costs 1.6 bits a weight.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.state import MatrixSpec, rows_in_blocks
from arbs_kernels.codec import join_planes, pack_planes, split_planes, unpack_planes


def half_range(planes: int) -> int:
    """Largest latent, `h = (3^p - 1)/2`."""
    return (3**planes - 1) // 2


def zero_half_range(planes: int) -> int:
    """Largest latent whose trit is 0, `(3^(p-1) - 1)/2`: the middle third of the range."""
    return half_range(planes - 1)


def spread(planes: int) -> float:
    """Standard deviation of fresh latents: the zero trit ends at half of it, as in `InitConfig`'s threshold."""
    return 2.0 * (zero_half_range(planes) + 0.5)


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


def init(key: jax.Array, spec: MatrixSpec, planes: int) -> dict[str, jax.Array]:
    """Fresh `trits` and `residual`: a rounded, clipped normal of the standard `spread`, drawn from 16 bits a weight.

    Drawn in blocks of rows without floats, as `init_trits` does.
    """
    half, sigma = half_range(planes), spread(planes)
    edges = (np.arange(-half, half) + 0.5) / (sigma * math.sqrt(2))
    below = np.array([0.5 * (1 + math.erf(edge)) for edge in edges])
    thresholds = np.round(below * 2**16).astype(np.uint32)

    def block(index: jax.Array, rows: int) -> dict[str, jax.Array]:
        bits = jax.random.bits(jax.random.fold_in(key, index), (rows, spec.in_features), jnp.uint16)
        v = jnp.searchsorted(jnp.asarray(thresholds), bits.astype(jnp.uint32), side="right", method="scan")
        return encode(v.astype(jnp.int16) - jnp.int16(half), planes)

    axes = {"trits": 0, "residual": 1} if planes > 1 else {"trits": 0}
    return rows_in_blocks(block, spec.out_features, axes)

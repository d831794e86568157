"""Fresh latents (`arbs_kernels.latents`) and their spread."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.state import MatrixSpec, rows_in_blocks
from arbs_kernels.latents import encode, half_range, zero_half_range


def spread(planes: int) -> float:
    """Standard deviation of fresh latents: the zero trit ends at half of it, as in `InitConfig`'s threshold."""
    return 2.0 * (zero_half_range(planes) + 0.5)


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
    return rows_in_blocks(block, spec, axes)

"""`v <- clip(v + floor(-rate * step + noise))` on latents that stay packed."""

import jax
import jax.numpy as jnp

from arbs_kernels.backends import triton_missing
from arbs_kernels.codec import packed_width
from arbs_kernels.latent_step import reference
from arbs_kernels.selection import Implementation, select
from arbs_kernels.triton_launch import lazily

STEP = {
    "xla": Implementation(reference.step),
    "triton": Implementation(lazily("arbs_kernels.latent_step.triton", "step"), triton_missing),
}


def latent_step(
    direction: jax.Array,
    trits: jax.Array,
    residual: jax.Array,
    norm: jax.Array,
    rate: jax.Array,
    seed: jax.Array,
    offset: jax.Array,
    *,
    power: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Latents after one step, and what there is to say of them; under `vmap` all matrices go in one launch.

    The step's entries are `sign(d) norm |d / norm|^power`, clipped to 4. Rounding noise is a hash of (seed, row,
    column), plus `offset` in units of 2^-32 modulo 1.

    Args:
        direction: `(N, K)`, float32 or bfloat16.
        trits: `uint8 (N, P)`, the leading plane of the latents (`arbs_kernels.latents`).
        residual: `uint8 (planes - 1, N, P)`.
        norm: float32 (), what the power leaves as it is: the direction's root-mean-square.
        rate: float32 (), units of the latent for an entry of one; at 0 the latents stay, whatever the direction holds.
        seed: uint32 ().
        offset: uint32 ().
        power: see above.
        implementation: "xla", "triton", or None for the best that works here.

    Returns:
        (`trits`, `residual`) of the new latents, clipped to their range; `int32 (N, 3)`, of every row how many trits
        changed, how many are 0 now, and how many latents are at either end of their range.

    Raises:
        ValueError: shapes or dtypes do not fit. UnsupportedError: no such implementation.
    """
    run = select("latent_step", STEP, implementation, ("triton",))
    if direction.ndim != 2 or direction.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"latent_step: direction must be float32 or bfloat16 (N, K), got {direction.dtype} {direction.shape}"
        )
    expected = (direction.shape[0], packed_width(direction.shape[1]))
    for name, leaf, shape in (("trits", trits, expected), ("residual", residual, (residual.shape[0], *expected))):
        if leaf.dtype != jnp.uint8 or leaf.shape != shape:
            raise ValueError(f"latent_step: {name} must be uint8 {shape}, got {leaf.dtype} {leaf.shape}")
    return run(direction, trits, residual, norm, rate, seed, offset, power=power)

"""`floor(31 clip(g * row * column) + noise)` in int8, and the sums of `g * trit` over groups."""

import jax
import jax.numpy as jnp

from arbs_kernels.backends import triton_missing
from arbs_kernels.codec import packed_width
from arbs_kernels.gradient_sample import reference
from arbs_kernels.selection import Implementation, select
from arbs_kernels.triton_launch import lazily

LARGEST, STEPS = reference.LARGEST, reference.STEPS
SAMPLE = {
    "xla": Implementation(reference.sample),
    "triton": Implementation(lazily("arbs_kernels.gradient_sample.triton", "sample"), triton_missing),
}


def gradient_sample(
    gradient: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    trits: jax.Array,
    seed: jax.Array,
    *,
    group_size: int,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What a rule keeps of a gradient; under `vmap` all matrices go in one launch.

    Rounding noise is a hash of (seed, row, column). Entries that are not finite give samples that mean nothing.

    Args:
        gradient: `(N, K)`, float32 or bfloat16.
        rows: float32 `(N,)`, a factor of each row.
        columns: float32 `(K,)`, a factor of each column.
        trits: `uint8 (N, P)`, rows as in `arbs_kernels.codec`.
        seed: uint32 ().
        group_size: `G`, columns that share one sum.
        implementation: "xla", "triton", or None for the best that works here.

    Returns:
        (`int8 (N, K)`, the gradient times its factors, clipped to 4, in steps of 1/31, stochastically rounded;
        `float32 (N, R)`, over each group the sum of gradients times trits).

    Raises:
        ValueError: shapes or dtypes do not fit. UnsupportedError: no such implementation.
    """
    run = select("gradient_sample", SAMPLE, implementation, ("triton",))
    if gradient.ndim != 2 or gradient.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"gradient_sample: gradient must be float32 or bfloat16 (N, K), got {gradient.dtype} {gradient.shape}"
        )
    N, K = gradient.shape
    expected = (("rows", rows, jnp.float32, (N,)), ("columns", columns, jnp.float32, (K,)))
    for name, given, dtype, shape in (*expected, ("trits", trits, jnp.uint8, (N, packed_width(K)))):
        if given.dtype != dtype or given.shape != shape:
            raise ValueError(
                f"gradient_sample: {name} must be {jnp.dtype(dtype)} {shape}, got {given.dtype} {given.shape}"
            )
    return run(gradient, rows, columns, trits, seed, group_size=group_size)

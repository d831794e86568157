"""What an orthonormal basis of the momentum's columns costs, its iterations by XLA and in one kernel.

    python time_basis.py

Microseconds a call of `orthonormal_columns` on stacks of tall matrices, and of its first iterations alone; how far the
basis is from orthonormal.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.rules.orthogonal import _EXACT_START, _RIDGE, orthonormal_columns
from arbs_kernels.gram_newton_schulz import MOST_TRITON, gram_newton_schulz
from arbs_kernels.timing import seconds_per_call

STACKS = [(24, 1728, 40), (24, 640, 40), (24, 640, 8), (1, 288, 18), (24, 640, 64), (11, 2048, 128)]
"""(layers and matrices that move together, rows, rank): `byte-50m`'s, a wider model's, `byte-1b`'s."""


def main() -> None:
    """Prints a line a stack."""
    print(jax.devices()[0].device_kind, jax.__version__)
    gpu = jax.default_backend() != "cpu"
    for stack in STACKS:
        rng = np.random.default_rng(0)
        sets = [(jnp.asarray(rng.standard_normal(stack), jnp.float32),) for _ in range(8)]
        grams = [(jnp.einsum("bnr,bns->brs", x, x, precision="highest"),) for (x,) in sets]
        parts = []
        for name in ("xla", "triton") if gpu and stack[-1] <= MOST_TRITON else ("xla",):
            arm = partial(orthonormal_columns, implementation=name)
            took = seconds_per_call(jax.vmap(arm), sets)
            q = np.asarray(jax.jit(arm)(sets[0][0][0]), np.float64)
            off = np.abs(np.linalg.svd(q, compute_uv=False) - 1).max()
            iterate = partial(gram_newton_schulz, coefficients=_EXACT_START, ridge=_RIDGE, implementation=name)
            alone = seconds_per_call(jax.vmap(iterate), grams)
            parts.append(f"{name} {1e6 * took:7.1f} us ({off:.0e} off), iterations {1e6 * alone:6.1f} us")
        print(f"{stack!s:<16} {'; '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()

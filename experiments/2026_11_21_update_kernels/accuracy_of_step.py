"""How far is an orthogonalised step from the same polynomials in double precision, on this device?

    python accuracy_of_step.py

Matrices have singular values spread geometrically from 1 down to 10^-spread; errors are relative, in the Frobenius
norm.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.rules.orthogonal import newton_schulz

CASES = (
    (24, 80, 1.6),
    (80, 24, 1.6),
    (128, 640, 2.5),
    (640, 128, 2.5),
    (640, 1728, 2.5),
    (1728, 640, 1.0),
    (640, 640, 2.5),
    (2048, 2048, 2.5),
)
"""Rows, columns, spread."""
JORDAN = (3.4445, -4.7750, 2.0315)


def exact(x: np.ndarray) -> np.ndarray:
    """Three iterations on the singular values alone."""
    left, values, right = np.linalg.svd(x, full_matrices=False)
    values /= np.sum(values**4) ** 0.25
    a, b, c = JORDAN
    for _ in range(3):
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right * max(x.shape) ** 0.5


def main() -> None:
    """Draws, iterates, prints."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rng = np.random.default_rng(0)
    print(jax.devices()[0].device_kind)
    for rows, columns, spread in CASES:
        left, values, right = np.linalg.svd(rng.normal(size=(rows, columns)), full_matrices=False)
        x = jnp.asarray((left * np.logspace(0, -spread, len(values))) @ right, jnp.bfloat16)
        expected = exact(np.asarray(x.astype(jnp.float32), np.float64))
        for dtype in (jnp.bfloat16, jnp.float32):
            # Three of them, as layers that move together are: XLA takes other products for a batch.
            found = jax.jit(jax.vmap(newton_schulz))(jnp.stack([x.astype(dtype)] * 3))[1]
            off = np.asarray(found.astype(jnp.float32), np.float64) - expected
            error = np.linalg.norm(off) / np.linalg.norm(expected)
            print(f"{rows} x {columns}, spread {spread}, {jnp.dtype(dtype)}: {error:.5f}", flush=True)


if __name__ == "__main__":
    main()

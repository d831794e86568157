"""How many Newton-Schulz iterations does the step need? Validation loss of `latent10` by polynomial and normalisation.

    python experiments/2026_11_21_update_kernels/orthogonalisation.py

`byte-0.4m`, 1000 steps of 16 x 64 bytes of pydoc, float32, seeds 0 and 1; on two CPU cores, two minutes a variant.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "2026_11_20_rules"))
from corpora import load
from harness import Data, Run, Setting, train_rule

from arbs_jax.rules import latent

Polynomials = list[tuple[float, float, float]]
JORDAN = (3.4445, -4.7750, 2.0315)
MINIMAX: dict[int, Polynomials] = {
    2: [(5.6037, -13.8837, 9.7334), (2.1306, -1.5116, 0.4020)],
    3: [(7.711, -22.1138, 16.2487), (3.2153, -2.4112, 0.5013), (2.2183, -1.594, 0.4107)],
    4: [
        (8.0934, -23.6204, 17.4462),
        (3.6366, -2.7219, 0.5365),
        (2.6613, -1.9772, 0.4526),
        (1.9562, -1.3375, 0.3839),
    ],
}
VARIANTS: dict[str, tuple[Polynomials, bool]] = {
    "5 of Jordan's, divided by the Frobenius norm": ([JORDAN] * 5, False),
    "3 of Jordan's, divided by the Gram matrix's": ([JORDAN] * 3, True),
    "2 of Jordan's, the same": ([JORDAN] * 2, True),
    "4 minimax, the same": (MINIMAX[4], True),
    "3 minimax, the same": (MINIMAX[3], True),
    "2 minimax, the same": (MINIMAX[2], True),
    "1 cubic, the same": ([(1.5, -0.5, 0.0)], True),
}


def iteration(polynomials: Polynomials, by_gram: bool) -> Callable[[jax.Array, jnp.dtype], jax.Array]:
    """A stand-in for `arbs_jax.rules.orthogonal.newton_schulz`."""

    def orthogonalise(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        tall = x.shape[0] > x.shape[1]
        y = x.T if tall else x
        y = y * jax.lax.rsqrt(jnp.sum(jnp.square(y)) + 1e-30)
        if by_gram:
            y = y * jax.lax.rsqrt(jnp.sqrt(jnp.sum(jnp.square(y @ y.T))) + 1e-30)
        for a, b, c in polynomials:
            gram = y @ y.T
            y = a * y + (b * gram + c * (gram @ gram)) @ y
        y = y * max(x.shape) ** 0.5
        return y.T if tall else y

    return orthogonalise


def main() -> None:
    """Trains every variant, prints a line each."""
    setting = Setting("byte-0.4m", 1000, 16, 64, dtype="float32", windows=256)
    data, runs = Data(setting, {"pydoc": load("pydoc")}), [Run("pydoc", seed) for seed in (0, 1)]
    for name, (polynomials, by_gram) in VARIANTS.items():
        latent.newton_schulz = iteration(polynomials, by_gram)
        losses = [outcome.val_loss for outcome in train_rule(setting, "latent10", data, runs)[0]]
        print(f"{np.mean(losses):.4f}  {', '.join(f'{loss:.4f}' for loss in losses)}  {name}", flush=True)


if __name__ == "__main__":
    main()

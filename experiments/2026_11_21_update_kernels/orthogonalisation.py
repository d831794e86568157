"""How many Newton-Schulz iterations does the step need, on how much of the matrix? Validation loss of `latent10`.

    python experiments/2026_11_21_update_kernels/orthogonalisation.py

A variant is `POLYNOMIALS[:BLOCKS[:frobenius]]`. `byte-0.4m`, 1000 steps of 16 x 64 bytes of pydoc, float32, seeds 0 and
1; on two CPU cores, two minutes a variant.
"""

import argparse
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
VARIANTS: dict[str, Polynomials] = {
    "jordan5": [JORDAN] * 5,
    "jordan3": [JORDAN] * 3,
    "jordan2": [JORDAN] * 2,
    "minimax4": MINIMAX[4],
    "minimax3": MINIMAX[3],
    "minimax2": MINIMAX[2],
    "cubic": [(1.5, -0.5, 0.0)],
}


def iteration(polynomials: Polynomials, norm: str, blocks: int) -> Callable[[jax.Array], jax.Array]:
    """A stand-in for `arbs_jax.rules.orthogonal.newton_schulz`, on so many blocks of the shorter side by themselves."""

    def one(y: jax.Array) -> jax.Array:
        dtype, scale = y.dtype, max(y.shape) ** 0.5
        y = y.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.sum(jnp.square(y)) + 1e-30)
        if norm == "gram":
            y = y * jax.lax.rsqrt(jnp.sqrt(jnp.sum(jnp.square(y @ y.T))) + 1e-30)
        y = y.astype(dtype)
        for a, b, c in polynomials:
            gram = y @ y.T
            y = (a * jnp.eye(y.shape[0]) + b * gram + c * (gram @ gram)).astype(dtype) @ y
        return y * jnp.asarray(scale, dtype)

    def orthogonalise(x: jax.Array) -> jax.Array:
        tall = x.shape[0] > x.shape[1]
        y = x.T if tall else x
        y = jax.vmap(one)(y.reshape(blocks, -1, y.shape[1])).reshape(y.shape)
        return y.T if tall else y

    return orthogonalise


def flags(description: str | None, variants: list[str]) -> argparse.ArgumentParser:
    """What is trained, and on what."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--variants", nargs="+", default=variants)
    parser.add_argument("--preset", default="byte-0.4m")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--corpus", default="pydoc")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    return parser


def train(args: argparse.Namespace, install: Callable[[str], None]) -> None:
    """Trains `latent10` with each variant, which `install` puts into the library, and prints a line each."""
    windows = 256 if args.preset == "byte-0.4m" else 512
    setting = Setting(args.preset, args.steps, args.batch, args.context, dtype=args.dtype, windows=windows)
    data = Data(setting, {args.corpus: load(args.corpus)})
    runs = [Run(args.corpus, seed) for seed in args.seeds]
    for name in args.variants:
        install(name)
        losses = [outcome.val_loss for outcome in train_rule(setting, "latent10", data, runs)[0]]
        print(f"{np.mean(losses):.4f}  {', '.join(f'{loss:.4f}' for loss in losses)}  {name}", flush=True)


def main() -> None:
    """Trains the variants, prints a line each."""

    def install(name: str) -> None:
        given = name.split(":")
        polynomials, blocks, norm = given + ["1", "gram"][len(given) - 1 :]
        latent.newton_schulz = iteration(VARIANTS[polynomials], norm, int(blocks))

    train(flags(__doc__, list(VARIANTS)).parse_args(), install)


if __name__ == "__main__":
    main()

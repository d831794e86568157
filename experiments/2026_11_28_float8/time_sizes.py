"""From which size of matrix on do float8 products pay? Forward, both gradients and all rounding, against bfloat16's.

    python time_sizes.py --rows 16384

Activations and cotangents come as bfloat16 and everything else is made within the time taken, as in one layer of a
training step; there, though, some of the rounding is done by whatever makes the activations.
"""

import argparse
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from arbs_kernels import float8
from arbs_kernels.autodiff import MatmulSpec, make_probe, ternary_matmul
from arbs_kernels.codec import packed_width
from arbs_kernels.shapes import group_count
from arbs_kernels.timing import default_effort as effort_here
from arbs_kernels.timing import nbytes, rotation, seconds_per_call

SIZES = ((640, 640), (640, 1792), (1024, 1024), (1024, 2816), (512, 2048), (2048, 2048), (5632, 2048), (2048, 5632))
"""N and K: layers of `byte-50m`, of a width of 1024, and of `byte-1b`."""
GROUP = 256


@dataclass(frozen=True)
class Law:
    """`S = 2^E`."""

    def scale(self, leaves: dict, group_size: int) -> jax.Array:
        """Group scales."""
        return jnp.exp2(leaves["exponent"].astype(jnp.float32))


def inputs(rows: int, n: int, k: int, seed: int) -> tuple:
    """x, dy and the leaves."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (rows, k), jnp.bfloat16)
    dy = jax.random.normal(keys[1], (rows, n), jnp.bfloat16) * jnp.bfloat16(1e-4)
    trits = jax.random.randint(keys[2], (n, packed_width(k)), 0, 256, jnp.int32).astype(jnp.uint8)
    exponent = jax.random.randint(keys[3], (n, group_count(k, GROUP)), -8, -4, jnp.int32).astype(jnp.int8)
    return x, dy, trits, exponent


def step_of(spec: MatmulSpec, n: int, both: bool) -> object:
    """(y, dx, dW), or y alone, as a function of `inputs`."""

    def step(x: jax.Array, dy: jax.Array, trits: jax.Array, exponent: jax.Array) -> object:
        leaves = {"trits": trits, "exponent": exponent}
        if not both:
            return ternary_matmul(x, leaves, spec)
        probe = make_probe("gradient", n, spec.in_features, GROUP, jnp.bfloat16)
        y, pull = jax.vjp(lambda x, probe: ternary_matmul(x, leaves, spec, probe), x, probe)
        return (y, *pull(dy))

    return step


def main() -> None:
    """Parses flags, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[16384])
    parser.add_argument("--sizes", nargs="+", default=["x".join(map(str, size)) for size in SIZES], help="NxK")
    parser.add_argument("--cotangents", default=str(float8.COTANGENT), help="their dtype, with float8 products")
    args = parser.parse_args()
    float8.COTANGENT = jnp.dtype(args.cotangents)
    print(f"{jax.devices()[0].device_kind}: M x N x K, microseconds in bfloat16 / float8 (ratio)")
    for rows in args.rows:
        for n, k in (map(int, size.split("x")) for size in args.sizes):
            shapes = jax.eval_shape(lambda rows=rows, n=n, k=k: inputs(rows, n, k, 0))
            count = min(4, rotation(nbytes(shapes), nbytes(shapes), effort_here()))
            sets = [inputs(rows, n, k, seed) for seed in range(count)]
            for name, both in (("forward", False), ("forward and backward", True)):
                plain, rounded = (
                    seconds_per_call(step_of(MatmulSpec(k, GROUP, Law(), float8=short), n, both), sets)
                    for short in (False, True)
                )
                print(
                    f"{rows}x{n}x{k} {name}: {plain * 1e6:.0f} / {rounded * 1e6:.0f} ({plain / rounded:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""Is one half of a symmetric product by a Triton kernel sooner done than the whole by the vendor's library?

    python time_products.py

Gram matrices of batches of random matrices; shapes are those of the orthogonalisation in `byte-1b` with 11 layers at
once, and in `byte-50m` with 12.
"""

import argparse

import jax
import jax.numpy as jnp
from half_product import halves

from arbs_kernels.timing import default_effort, nbytes, rotation, seconds_per_call

SHAPES = ((22, 2048, 2048), (11, 2048, 5632), (11, 512, 2048), (4, 2048, 2048), (24, 640, 640), (24, 640, 1728))
"""Count, m, n."""
TILES = (
    {"side": 128, "depth": 64, "num_warps": 4, "num_stages": 3},
    {"side": 128, "depth": 64, "num_warps": 4, "num_stages": 4},
    {"side": 128, "depth": 64, "num_warps": 8, "num_stages": 3},
    {"side": 128, "depth": 64, "num_warps": 8, "num_stages": 4},
    {"side": 128, "depth": 128, "num_warps": 8, "num_stages": 3},
    {"side": 256, "depth": 64, "num_warps": 8, "num_stages": 3},
)


def main() -> None:
    """Parses flags, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, shape)) for shape in SHAPES])
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}: microseconds; TFLOP/s of the whole product")
    for shape in args.shapes:
        count, m, n = map(int, shape.split("x"))
        flops = 2 * count * m * m * n
        inputs = jax.ShapeDtypeStruct((count, m, n), jnp.bfloat16)
        output = jax.ShapeDtypeStruct((count, m, m), jnp.bfloat16)
        copies = rotation(nbytes(inputs), nbytes(output), default_effort())
        keys = jax.random.split(jax.random.key(0), copies)
        sets = [(jax.random.normal(key, inputs.shape, inputs.dtype),) for key in keys]
        whole = seconds_per_call(lambda y: y @ y.swapaxes(1, 2), sets)
        print(f"{shape} vendor's: {whole * 1e6:.0f} ({flops / whole / 1e12:.0f})", flush=True)
        for tiles in TILES:
            try:
                seconds = seconds_per_call(lambda y, tiles=tiles: halves(y, y, **tiles), sets)
            except jax.errors.JaxRuntimeError as error:
                print(f"  {tiles}: {str(error).splitlines()[0][:90]}")
                continue
            named = " ".join(f"{name} {value}" for name, value in tiles.items())
            print(f"  {named}: {seconds * 1e6:.0f} ({flops / seconds / 1e12:.0f}), {whole / seconds:.2f}x", flush=True)


if __name__ == "__main__":
    main()

"""Single products in bfloat16 and in float8, before anything was built: what XLA calls, microseconds and teraflop/s.

    python probe.py

Operands are float8 before the time is taken, but for the lines that say what else is in it.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from arbs_kernels.timing import seconds_per_call

SIZES = ((2048, 2048), (5632, 2048), (2048, 5632), (640, 640), (1792, 640))
"""N and K; the one run that there was ended in the second."""
ROWS = 16384
OPERAND, COTANGENT, PLAIN = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16


def product(a: jax.Array, b: jax.Array, left: int, right: int) -> jax.Array:
    """bfloat16, over one axis of each."""
    return jax.lax.dot_general(a, b, (((left,), (right,)), ((), ())), preferred_element_type=PLAIN)


def by_largest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In e4m3, and what one of it is: the largest magnitude of all is brought between 128 and 256."""
    power = jnp.exp2(7 - jnp.floor(jnp.log2(jnp.max(jnp.abs(x)).astype(jnp.float32)))).astype(x.dtype)
    return (x * power).astype(OPERAND), 1 / power


def forward_by_largest(x: jax.Array, dy: jax.Array, w: jax.Array) -> jax.Array:
    """Rounding of x within, by its largest magnitude."""
    short, unit = by_largest(x)
    return product(short, w.astype(OPERAND), 1, 1) * unit


VARIANTS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "forward": (lambda x, dy, w: product(x, w, 1, 1), (PLAIN, OPERAND)),
    "input gradient": (lambda x, dy, w: product(dy, w, 1, 0), (PLAIN, OPERAND, COTANGENT)),
    "weight gradient": (lambda x, dy, w: product(dy, x, 0, 0), (PLAIN, OPERAND, COTANGENT)),
    "forward, rounding within": (lambda x, dy, w: product(x.astype(OPERAND), w.astype(OPERAND), 1, 1), (PLAIN,)),
    "the same, by the largest": (forward_by_largest, (PLAIN,)),
}
"""What is timed, with which dtypes of dy; x and w are e4m3 where that is float8."""


def inputs(n: int, k: int, seed: int, dtype: Any) -> tuple[jax.Array, ...]:
    """x, dy, w, normal."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((ROWS, k), (ROWS, n), (n, k))
    x, dy, w = (jax.random.normal(key, shape, PLAIN) for key, shape in zip(keys, shapes, strict=True))
    other = PLAIN if dtype == PLAIN else OPERAND
    return x.astype(other), dy.astype(dtype), w.astype(other)


def main() -> None:
    """Times and prints."""
    for n, k in SIZES:
        for name, (function, dtypes) in VARIANTS.items():
            for dtype in dtypes:
                sets = [inputs(n, k, seed, dtype) for seed in range(4)]
                seconds = seconds_per_call(function, sets)
                text = jax.jit(function).lower(*sets[0]).compile().as_text()
                calls = sorted(set(re.findall(r'custom_call_target="([^"]+)"', text)))
                print(f"{ROWS}x{n}x{k} {name}, dy {jnp.dtype(dtype).name}: {seconds * 1e6:.1f} us, "
                      f"{2 * ROWS * n * k / seconds / 1e12:.0f}T {calls}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

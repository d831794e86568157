"""Rows out of a packed table of ten million and back into it: how long, and what is made beside it.

    python experiments/2026_11_21_kernels/time_tables.py [--rows 10000000] [--ids 4096]

Times are those of one call among many in one program, each on other ids; temporaries those of a program of one call.
The copy of the trits alone shows what a call would take that copied any of the table. On a CPU pass --rows 100000.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

from arbs_kernels.backends import triton_missing
from arbs_kernels.codec import packed_width
from arbs_kernels.row_gather import packed_row_gather
from arbs_kernels.row_update import put_rows, rows_of
from arbs_kernels.timing import nbytes

K, G, PLANES = 64, 32, 5
CALLS = 64
Leaves = dict[str, jax.Array]


@partial(jax.jit, static_argnums=0)
def made(rows: int) -> Leaves:
    """A table of random state; `corr` exceeds 32 bits."""
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 4)
    P, R = packed_width(K), K // G
    corr = jax.random.bits(keys[2], (rows, R), jnp.uint32).astype(jnp.int64) << jnp.int64(20)
    return {
        "trits": jax.random.bits(keys[0], (rows, P), jnp.uint8),
        "exponent": jax.random.bits(keys[1], (rows, R), jnp.uint8).astype(jnp.int8),
        "corr": corr,
        "residual": jax.random.bits(keys[3], (PLANES - 1, rows, P), jnp.uint8),
    }


def gathered(ids: jax.Array, trits: jax.Array, scale: jax.Array, *, implementation: str) -> jax.Array:
    """Effective rows."""
    return packed_row_gather(
        ids, trits, scale, in_features=K, group_size=G, dtype=jnp.bfloat16, implementation=implementation
    )


def changed(ids: jax.Array, leaves: Leaves) -> Leaves:
    """The table with every bit of some rows flipped: reads each leaf's rows and writes them."""
    return put_rows(leaves, ids, jax.tree.map(jnp.invert, rows_of(leaves, ids)))


def temporaries(function: Callable[..., Any], *arguments: Any, donate: bool = False) -> float:
    """Megabytes that one call takes beside its arguments and its result."""
    compiled = jax.jit(function, donate_argnums=1 if donate else ()).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    if donate and memory.alias_size_in_bytes != nbytes(arguments[1]):
        raise RuntimeError(f"of {nbytes(arguments[1])} bytes only {memory.alias_size_in_bytes} stay in place")
    return memory.temp_size_in_bytes / 1e6


def microseconds(run: Callable[[], Any]) -> float:
    """Of one of CALLS calls in a program; the median of some runs."""
    run()
    took = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(run())
        took.append(time.perf_counter() - start)
    return statistics.median(took) / CALLS * 1e6


def time_gather(ids: jax.Array, trits: jax.Array, scale: jax.Array, implementation: str) -> float:
    """Of `gathered`."""
    one = partial(gathered, implementation=implementation)

    @jax.jit
    def program(ids: jax.Array, trits: jax.Array, scale: jax.Array) -> jax.Array:
        return jax.lax.map(lambda some: one(some, trits, scale), ids)

    return microseconds(lambda: program(ids, trits, scale))


def time_change(ids: jax.Array, leaves: Leaves) -> float:
    """Of `changed`, which takes the table and leaves another."""

    @partial(jax.jit, donate_argnums=1)
    def program(ids: jax.Array, leaves: Leaves) -> Leaves:
        return jax.lax.scan(lambda leaves, some: (changed(some, leaves), None), leaves, ids)[0]

    held = [leaves]

    def run() -> Leaves:
        held.append(program(ids, held.pop()))
        return held[0]

    return microseconds(run)


def time_copy(trits: jax.Array) -> float:
    """Of reading and writing the trits."""
    program = jax.jit(lambda trits: jax.lax.fori_loop(0, CALLS, lambda _, t: ~t, trits))
    return microseconds(lambda: program(trits))


def check(ids: jax.Array, leaves: Leaves, scale: jax.Array, implementations: list[str]) -> None:
    """That rows are changed where they lie and gathered alike."""
    found = [np.asarray(gathered(ids, leaves["trits"], scale, implementation=name)) for name in implementations]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    before = jax.tree.map(np.asarray, rows_of(leaves, ids))
    after = rows_of(jax.jit(changed)(ids, leaves), ids)
    for name, leaf in after.items():
        np.testing.assert_array_equal(np.asarray(leaf), ~before[name], err_msg=name, strict=True)


def main() -> None:
    """Parses flags, checks on part of the table, times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--ids", type=int, default=4096)
    args = parser.parse_args()
    implementations = ["xla"] if triton_missing() else ["xla", "triton"]
    rng = np.random.default_rng(0)
    leaves = made(args.rows)
    scale = jnp.exp2(jnp.full((args.rows, K // G), -3.0, jnp.float32))
    ids = jnp.asarray(np.stack([rng.choice(args.rows, args.ids, replace=False) for _ in range(CALLS)]), jnp.int32)
    part = {name: leaf[..., : min(args.rows, 100_000), :] for name, leaf in leaves.items()}
    check(jnp.unique(ids[0] % part["trits"].shape[0]), part, scale[: part["trits"].shape[0]], implementations)

    title = f"{jax.devices()[0].device_kind}: {args.rows:,} x {K}, {nbytes(leaves) / 1e6:,.0f} MB, {args.ids} ids"
    table = Table(title=title, title_justify="left")
    for name in ("", "implementation", "us a call", "temporaries MB"):
        table.add_column(name, justify="left" if name in ("", "implementation") else "right")
    for name in implementations:
        temporary = temporaries(partial(gathered, implementation=name), ids[0], leaves["trits"], scale)
        took = time_gather(ids, leaves["trits"], scale, name)
        table.add_row("packed_row_gather", name, f"{took:,.1f}", f"{temporary:.3f}")
    took = time_copy(leaves["trits"])
    table.add_row(f"a copy of the trits, {nbytes(leaves['trits']) / 1e6:,.0f} MB", "xla", f"{took:,.1f}", "")
    temporary = temporaries(changed, ids[0], leaves, donate=True)
    took = time_change(ids, leaves)
    table.add_row("rows_of, put_rows", "xla", f"{took:,.1f}", f"{temporary:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

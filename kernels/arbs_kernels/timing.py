"""Seconds of device time of one call, for kernels of a few microseconds too.

Calling a compiled function costs the host ten microseconds and more, so one program holds a call on each of several
input sets, executions of it are queued one behind another, and the whole is waited for once. The sets hold different
data and together exceed the caches, so no call finds its inputs there. An optimization barrier makes each call wait for
the result of the one before; all results are returned. So nothing is shared, left out or run side by side.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from arbs_kernels.backends import default_device

_UNKNOWN_MEMORY = 2**32
"""Bytes taken to be there where the device does not tell its size."""
_IN_FLIGHT = 3
"""Executions queued at a time; each holds its results."""


@dataclass(frozen=True)
class Effort:
    """How long to measure and on how much data."""

    cold_bytes: int
    """Inputs of one rotation together, more than any cache holds."""
    copy_bytes: int
    """Of an array whose copy shows the bandwidth; on a CPU small enough that the allocator keeps its pages."""
    least_sets: int
    most_sets: int
    """Calls in one program: enough to hide its start, few enough to compile."""
    repeat_seconds: float
    """Least duration of one repeat."""
    repeats: int = 7
    """The median of these is taken."""


def default_effort() -> Effort:
    """For the default device."""
    if default_device().platform == "cpu":
        return Effort(64 * 2**20, 8 * 2**20, 2, 8, 0.02, 5)
    return Effort(256 * 2**20, 256 * 2**20, 8, 64, 0.02)


def memory_budget() -> int:
    """Bytes that inputs and results may take together: half of the device's memory."""
    stats = default_device().memory_stats() or {}
    return stats.get("bytes_limit", _UNKNOWN_MEMORY) // 2


def rotation(input_bytes: int, output_bytes: int, effort: Effort) -> int:
    """How many input sets to rotate through; 0 where not even one fits.

    Results count for every execution in flight, and once more for temporaries.
    """
    wanted = min(max(-(-effort.cold_bytes // max(input_bytes, 1)), effort.least_sets), effort.most_sets)
    return min(wanted, memory_budget() // max(input_bytes + (_IN_FLIGHT + 1) * output_bytes, 1))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, or of abstract ones."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def in_sequence(function: Callable[..., Any], sets: Sequence[tuple[jax.Array, ...]]) -> list[Any]:
    """`function` of every set, each call after the one before it."""
    results: list[Any] = []
    for arguments in sets:
        if results:
            arguments, results[-1] = jax.lax.optimization_barrier((arguments, results[-1]))
        results.append(function(*arguments))
    return results


def seconds_per_call(
    function: Callable[..., Any], sets: Sequence[tuple[jax.Array, ...]], effort: Effort | None = None
) -> float:
    """Median device seconds of `function(*arguments)` over the sets, which should come from `rotation`."""
    effort = effort or default_effort()
    # Independent kernels of one program could run side by side in a CUDA graph, whatever order they were scheduled in.
    options = {} if default_device().platform == "cpu" else {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
    run = jax.jit(lambda sets: in_sequence(function, sets), compiler_options=options)
    jax.block_until_ready(run(sets))  # compiles, loads modules, fills pools

    def duration(executions: int) -> float:
        queue: deque[list[Any]] = deque()
        began = time.perf_counter()
        for _ in range(executions):
            if len(queue) == _IN_FLIGHT:
                jax.block_until_ready(queue.popleft()[-1])
            queue.append(run(sets))
        jax.block_until_ready(queue[-1])
        return time.perf_counter() - began

    once = duration(2) / 2
    executions = max(2, min(1000, round(effort.repeat_seconds / max(once, 1e-9))))
    return statistics.median(duration(executions) for _ in range(effort.repeats)) / executions / len(sets)


def copy_bandwidth(effort: Effort | None = None) -> float:
    """Bytes a second read and written while large arrays are negated."""
    effort = effort or default_effort()
    size = min(effort.copy_bytes, memory_budget() // 32)
    make = jax.jit(lambda seed: jax.lax.broadcasted_iota(jnp.uint32, (size // 4,), 0) * seed)
    sets = [(make(jnp.uint32(2 * index + 1)),) for index in range(rotation(size, size, effort))]
    return 2 * size / seconds_per_call(jnp.bitwise_not, sets, effort)


def matrix_rate(dtype: Any, side: int, effort: Effort | None = None) -> float:
    """Floating-point operations a second of a product of square random matrices."""
    make = jax.jit(lambda key: jax.random.normal(key, (side, side), dtype))
    keys = jax.random.split(jax.random.key(0), 4)
    precision = "highest" if jnp.dtype(dtype) == jnp.float32 else None
    sets = [(make(keys[2 * index]), make(keys[2 * index + 1])) for index in range(2)]
    return 2 * side**3 / seconds_per_call(lambda a, b: jnp.dot(a, b, precision=precision), sets, effort)

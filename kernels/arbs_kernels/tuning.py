"""Which implementation is fastest where: a table of measurements, and what to assume where nothing was measured.

`tuned.json` beside this module holds `{device kind: {operator: [entry, ...]}}`, an entry being

    {"dtype": "bfloat16", "M": [lo, hi], "min_weights": 0, "implementation": "triton", "tiles": {"rows": 128}}

It applies to activations of `dtype` with `lo <= M <= hi` (hi null: no end) and matrices of at least `min_weights = N*K`
weights; the first entry that applies wins. `tiles` go to the implementation as they are; empty, it chooses its own.
Where no entry applies the newest backend that the device's compute capability allows comes first, and XLA last.

To add a GPU, run `arbs bench --tune` on it: it times every implementation that runs there, with all tile candidates
that an implementation's module lists as `CANDIDATES: tuple[dict, ...]`, and writes the winners under the device's name.
Commit the file if the numbers are for everyone.
"""

import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from arbs_kernels.backends import compute_capability, device_kind
from arbs_kernels.selection import Implementation, UnsupportedError, select

TABLE = Path(__file__).with_name("tuned.json")
_BY_CAPABILITY = ((9.0, ("mosaic_gpu", "triton", "xla")), (8.0, ("triton", "xla")), (0.0, ("xla",)))


@dataclass(frozen=True)
class Choice:
    """What to run."""

    order: tuple[str, ...]
    """Implementations, the best first."""
    tiles: Mapping[str, Any] = field(default_factory=dict)
    """Tile sizes for the first of them; empty leaves them to it."""


@dataclass(frozen=True)
class Timing:
    """One measured candidate."""

    rows: int
    """`M`."""
    weights: int
    """`N*K`."""
    implementation: str
    tiles: Mapping[str, Any]
    shape: str
    """The whole shape, by which candidates are compared."""
    seconds: float


@functools.cache
def _load(path: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    return json.loads(path.read_text())


def choice(operator: str, m: int, n: int, k: int, group_size: int, dtype: Any = jnp.bfloat16) -> Choice:
    """The best implementations of an operator on the default device, for `M`, `N`, `K`, `G` and a dtype of activations.

    `group_size` decides nothing yet: no measurement has asked for it.
    """
    del group_size
    default = next(order for capability, order in _BY_CAPABILITY if compute_capability() >= capability)
    for entry in _load(TABLE).get(device_kind(), {}).get(operator, []):
        low, high = entry["M"]
        fits = low <= m and (high is None or m <= high) and n * k >= entry["min_weights"]
        if fits and entry["dtype"] == jnp.dtype(dtype).name:
            first = entry["implementation"]
            return Choice((first, *(name for name in default if name != first)), entry["tiles"])
    return Choice(default)


def tuned(
    operator: str,
    implementations: Mapping[str, Implementation],
    implementation: str | None,
    shape: tuple[int, int, int, int],
    dtype: Any,
) -> Callable[..., jax.Array]:
    """The function behind a name, or for None the best that takes the arguments, with its tuned tiles.

    Args:
        operator: its name in the table and in messages.
        implementations: what there is.
        implementation: a name, or None.
        shape: `(M, N, K, G)`.
        dtype: of the activations.

    Raises:
        UnsupportedError: the name is unknown or cannot run on this machine.
    """
    best = choice(operator, *shape, dtype)

    def with_tiles(name: str) -> Callable[..., jax.Array]:
        run = select(operator, implementations, name)
        return functools.partial(run, tiles=dict(best.tiles)) if best.tiles and name == best.order[0] else run

    if implementation is not None:
        return with_tiles(implementation)
    runs = [name for name in best.order if name in implementations and implementations[name].missing() is None]

    def first_that_takes_them(*arguments: Any, **options: Any) -> jax.Array:
        for name in runs:
            try:
                return with_tiles(name)(*arguments, **options)
            except UnsupportedError:  # raised before anything is launched
                if name == "xla":
                    raise
        return select(operator, implementations, None)(*arguments, **options)

    return first_that_takes_them


def entries(timings: Sequence[Timing], dtype: str) -> list[dict[str, Any]]:
    """Table entries of one operator from its measurements: at every measured `M` and `N*K` the fastest candidate.

    Between two measured sizes the border is their geometric mean; the outermost ranges have no end.
    """
    points: dict[int, dict[int, list[Timing]]] = defaultdict(lambda: defaultdict(list))
    for timing in timings:
        points[timing.rows][timing.weights].append(timing)
    ranges: list[tuple[list[int | None], list[dict[str, Any]]]] = []
    sizes = sorted(points)
    for index, rows in enumerate(sizes):
        low = 1 if index == 0 else _border(sizes[index - 1], rows) + 1
        high = None if index + 1 == len(sizes) else _border(rows, sizes[index + 1])
        winners = _by_weights(points[rows])
        if ranges and ranges[-1][1] == winners:
            ranges[-1][0][1] = high
        else:
            ranges.append(([low, high], winners))
    return [{"dtype": dtype, "M": span, **winner} for span, winners in ranges for winner in winners]


def _by_weights(points: Mapping[int, Sequence[Timing]]) -> list[dict[str, Any]]:
    """Winners by `min_weights`, the largest matrices first; neighbours that agree are one."""
    found: list[dict[str, Any]] = []
    sizes = sorted(points)
    for index, weights in enumerate(sizes):
        least = 0 if index == 0 else _border(sizes[index - 1], weights) + 1
        best = _fastest(points[weights])
        winner = {"min_weights": least, "implementation": best.implementation, "tiles": dict(best.tiles)}
        if found and all(found[-1][key] == winner[key] for key in ("implementation", "tiles")):
            continue
        found.append(winner)
    return found[::-1]


def _fastest(timings: Sequence[Timing]) -> Timing:
    """The candidate of least geometric mean time over the shapes; one that failed on some shape is no candidate."""
    shapes = {timing.shape for timing in timings}
    by_candidate: dict[tuple[str, str], list[Timing]] = defaultdict(list)
    for timing in timings:
        by_candidate[timing.implementation, json.dumps(dict(timing.tiles), sort_keys=True)].append(timing)
    whole = [of for of in by_candidate.values() if {timing.shape for timing in of} == shapes]
    return min(whole or by_candidate.values(), key=lambda of: math.prod(t.seconds for t in of) ** (1 / len(of)))[0]


def _border(low: int, high: int) -> int:
    return math.isqrt(low * high)


def record(by_operator: Mapping[str, Sequence[dict[str, Any]]], dtype: str) -> None:
    """Writes entries of the default device in place of those it had for the same operators and dtype.

    Raises:
        OSError: the file cannot be written.
    """
    content = json.loads(TABLE.read_text())
    device = content.setdefault(device_kind(), {})
    for operator, new in by_operator.items():
        device[operator] = [entry for entry in device.get(operator, []) if entry["dtype"] != dtype] + list(new)
    TABLE.write_text(_one_entry_a_line(content))
    _load.cache_clear()


def _one_entry_a_line(content: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]]) -> str:
    devices = []
    for device, operators in sorted(content.items()):
        lists = []
        for operator, found in sorted(operators.items()):
            lines = ",\n".join(f"      {json.dumps(entry)}" for entry in found)
            lists.append(f"    {json.dumps(operator)}: " + (f"[\n{lines}\n    ]" if found else "[]"))
        devices.append(f"  {json.dumps(device)}: {{\n" + ",\n".join(lists) + "\n  }")
    return "{\n" + ",\n".join(devices) + "\n}\n"

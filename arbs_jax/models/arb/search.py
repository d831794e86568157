"""Nearest rows of a codebook: exact over every row, or among candidates that the signs of the input name.

A book of N rows lies in `2^b` runs of neighbouring rows. The run a row lies in is spelled by the signs of its first `b`
columns: so it is born (`plant`), and so it tends to stay, for a row learns from inputs that found it alone. An
input looks into the run of its own signs and into those that differ in its least certain ones: the perturbation
sequence of multi-probe hashing (Lv et al., "Multi-Probe LSH", VLDB 2007), fixed in terms of ranks of |input|. The
candidates alone are decoded and compared.

Nearest is by angle: the largest product of the input with a row of length one. A ternary row's length says how many of
its trits are zero and what power of two its scale is, neither of which is a direction; and rows of a larger norm would
win or lose inputs all over the book.

Equally near rows are told apart by the lower id. Arrays are suffixed by their axes: M inputs, K columns, C candidates,
P probed runs, b signs that name a run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.errors import ConfigError
from arbs_jax.state import Matrix
from arbs_kernels.codec import pack_rows, unpack_rows

Peek = Callable[[jax.Array], jax.Array]
"""Rows `(*ids.shape, K)` of int32 ids, decoded; nothing is differentiated through it."""

TINY = 1e-12
_PLANT_ROWS = 65_536
_MOST_FLIPS = 14
"""Least certain signs that probes flip; 2^14 sets of them are ranked when a program is traced."""


@dataclass(frozen=True)
class Runs:
    """How the rows of a book lie in runs of neighbours: run `k` starts at `k * span + min(k, extra)`."""

    rows: int
    """Rows of the book."""
    at_least: int
    """Fewest rows of a run."""

    def __post_init__(self) -> None:
        if not 1 <= self.at_least <= self.rows:
            raise ConfigError(f"a run must have between 1 row and the book's {self.rows}, got {self.at_least}")

    @property
    def bits(self) -> int:
        """`b`: signs that name a run."""
        return (self.rows // self.at_least).bit_length() - 1

    @property
    def span(self) -> int:
        """Rows of a run, not counting the one more that the first `extra` runs have."""
        return self.rows >> self.bits

    @property
    def extra(self) -> int:
        """Runs of one row more."""
        return self.rows - (self.span << self.bits)

    @property
    def height(self) -> int:
        """Rows that are looked at in a run; where it has one fewer, the next run's first is among them."""
        return self.span + (self.extra > 0)

    def rows_in(self, run: jax.Array) -> jax.Array:
        """Ids int32 `(..., height)` of runs int32 `(...)`."""
        start = jnp.minimum(run * self.span + jnp.minimum(run, self.extra), self.rows - self.height)
        return start[..., None] + jnp.arange(self.height, dtype=jnp.int32)

    def run_of(self, ids: jax.Array) -> jax.Array:
        """Runs int32 that rows int32 lie in."""
        longer = self.extra * (self.span + 1)
        return jnp.where(ids < longer, ids // (self.span + 1), (ids - self.extra) // self.span)


def unit_rows(x: jax.Array) -> jax.Array:
    """Float32 `(..., K)` of root mean square 1 along the last axis; zeros stay zeros."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + TINY)


def probe_patterns(bits: int, probes: int) -> np.ndarray:
    """Which of the least certain signs each probe flips, int32 `(min(probes, 2^t), t)`, `t = min(bits, 14)`.

    Column `j` stands for the `j`-th smallest |input|. Sets come in the order of what their members' |input| is expected
    to add up to for a normal input; the first flips nothing.
    """
    flips = min(bits, _MOST_FLIPS)
    normal = NormalDist()
    expected = [normal.inv_cdf(0.5 + 0.5 * (rank + 1) / (bits + 1)) for rank in range(flips)]
    cost = np.zeros(1)
    for value in expected:
        cost = np.concatenate([cost, cost + value])
    chosen = np.argsort(cost, kind="stable")[:probes]
    return (chosen[:, None] >> np.arange(flips) & 1).astype(np.int32)


def runs_to_probe(x_MxK: jax.Array, runs: Runs, probes: int) -> jax.Array:
    """Runs int32 `(M, P)`, different from one another, to look into for each input, the likeliest first.

    `P = min(probes, 2^min(b, 14))`. A zero of the input counts as negative.
    """
    patterns_PxF = probe_patterns(runs.bits, probes)
    if not runs.bits:
        return jnp.zeros((x_MxK.shape[0], 1), jnp.int32)
    named_Mxb = x_MxK[:, : runs.bits]
    place_b = jnp.asarray(1 << np.arange(runs.bits)[::-1], jnp.int32)
    own_M = jnp.sum(jnp.where(named_Mxb > 0, place_b, 0), axis=-1, dtype=jnp.int32)
    least_certain_MxF = jnp.argsort(jnp.abs(named_Mxb), axis=-1)[:, : patterns_PxF.shape[1]]
    flipped_MxP = jnp.einsum("mf,pf->mp", place_b[least_certain_MxF], jnp.asarray(patterns_PxF))
    return own_M[:, None] ^ flipped_MxP.astype(jnp.int32)


def candidate_rows(x_MxK: jax.Array, runs: Runs, probes: int) -> jax.Array:
    """Ids int32 `(M, C)` of the rows to compare each input with; a few may come twice."""
    return runs.rows_in(runs_to_probe(x_MxK, runs, probes)).reshape(x_MxK.shape[0], -1)


def nearest_candidate(x_MxK: jax.Array, runs: Runs, probes: int, peek: Peek, budget: int) -> jax.Array:
    """The nearest of the candidate rows, int32 `(M,)`.

    Inputs are taken a few at a time, so that their decoded candidates are at most `budget` numbers.
    """
    inputs, columns = x_MxK.shape
    looked_at = probe_patterns(runs.bits, probes).shape[0] * runs.height
    chunk = min(inputs, max(1, budget // (looked_at * columns)))
    chunks = -(-inputs // chunk)
    padded = jnp.pad(x_MxK.astype(jnp.float32), ((0, chunks * chunk - inputs), (0, 0)))

    def nearest(x_mxK: jax.Array) -> jax.Array:
        ids_mxC = candidate_rows(x_mxK, runs, probes)
        score_mxC = jnp.einsum("mk,mck->mc", x_mxK, unit_rows(peek(ids_mxC)), precision="highest")
        best = score_mxC == jnp.max(score_mxC, axis=-1, keepdims=True)
        # An input that is not a number equals no maximum; it gets the last row.
        return jnp.min(jnp.where(best, ids_mxC, runs.rows - 1), axis=-1)

    if chunks == 1:
        return nearest(padded)
    return jax.lax.map(nearest, padded.reshape(chunks, chunk, columns)).reshape(-1)[:inputs]


def nearest_row(x_MxK: jax.Array, rows: int, peek: Peek, budget: int) -> jax.Array:
    """The nearest of all rows, int32 `(M,)`: a running maximum over parts of the book.

    A part is decoded once and multiplied with all inputs; its rows and scores are at most `budget` numbers (or those of
    one row).
    """
    inputs, columns = x_MxK.shape
    x32_MxK = x_MxK.astype(jnp.float32)
    part = min(rows, max(1, budget // (inputs + columns)))

    def of_part(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids_C = start + jnp.arange(part, dtype=jnp.int32)
        score_MxC = jnp.einsum("mk,ck->mc", x32_MxK, unit_rows(peek(ids_C)), precision="highest")
        return jnp.max(score_MxC, axis=-1), start + jnp.argmax(score_MxC, axis=-1).astype(jnp.int32)

    def step(index: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The last part reaches back where it is short: a row seen twice cannot beat itself.
        score_M, id_M = of_part(jnp.minimum(index * part, rows - part))
        return jnp.maximum(best[0], score_M), jnp.where(score_M > best[0], id_M, best[1])

    first = of_part(jnp.int32(0))
    parts = -(-rows // part)
    return first[1] if parts == 1 else jax.lax.fori_loop(jnp.int32(1), jnp.int32(parts), step, first)[1]


def plant(leaves: Matrix, runs: Runs, columns: int) -> Matrix:
    """The leaves of a fresh book, in which the signs of every row's first `b` columns name the run it lies in.

    Those trits become 1 or -1; other trits and leaves stay. Works through the packed rows a block at a time, in place
    where they are donated.
    """
    trits = leaves["trits"]
    size = min(runs.rows, _PLANT_ROWS)
    shifts_b = jnp.asarray(np.arange(runs.bits)[::-1], jnp.int32)

    def step(index: jax.Array, trits: jax.Array) -> jax.Array:
        start = jnp.minimum(index * size, runs.rows - size)
        run = runs.run_of(start + jnp.arange(size, dtype=jnp.int32))
        signs = (run[:, None] >> shifts_b & 1) * 2 - 1
        block = unpack_rows(jax.lax.dynamic_slice_in_dim(trits, start, size), columns)
        block = block.at[:, : runs.bits].set(signs.astype(jnp.int8))
        return jax.lax.dynamic_update_slice_in_dim(trits, pack_rows(block), start, 0)

    blocks = jnp.int32(-(-runs.rows // size))
    return leaves | {"trits": jax.lax.fori_loop(jnp.int32(0), blocks, step, trits)}

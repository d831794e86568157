"""What a learning rule is: an (init, update) pair over the integer leaves of one matrix, and its scale law."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from arbs_jax.state import Matrix, MatrixSpec
from arbs_kernels.codec import digits

Votes = dict[str, jax.Array]
Report = dict[str, jax.Array]
"""float32 () sums by name; they add up over matrices."""


class Rule(Protocol):
    """A learning rule; a frozen dataclass, so that it can be a static argument. Integers in, integers out.

    Leaves may carry a leading layer axis; every method works on both forms.
    """

    @property
    def probe(self) -> str:
        """What backward collects for this rule: "score" or "gradient" (`arbs_kernels.autodiff`)."""
        ...

    @property
    def row_leaves(self) -> tuple[str, ...]:
        """Leaves with an entry for every row, on the last axis but one or the only one (some may be absent): what a
        step on a few rows of a table takes out and puts back. The others are of the whole table."""
        ...

    @property
    def row_votes(self) -> tuple[str, ...]:
        """Entries of a vote whose first axis is that of the rows; the others are of the whole matrix."""
        ...

    def init(self, key: jax.Array, matrix: Matrix, spec: MatrixSpec) -> Matrix:
        """The four base leaves, with the rule's own integer leaves added."""
        ...

    def scale(self, leaves: Mapping[str, jax.Array], group_size: int) -> jax.Array:
        """Group scales `S = 2^(E + shift)`, float32 (..., N, R)."""
        ...

    def vote(self, collected: Votes, matrix: Matrix, spec: MatrixSpec, key: jax.Array) -> Votes:
        """Turns what one backward contribution collected (float32) into integers that add exactly.

        `key` is of this contribution alone: of the run, matrix, step, micro-batch and shard. Of a sparse table it sees
        the rows that were looked up, and where some of them are padding also `touched` bool (N,): which are not.
        """
        ...

    def largest_vote(self, name: str) -> int | None:
        """The largest magnitude in one vote's entry `name`; None where nothing but its dtype bounds it."""
        ...

    def update(
        self, matrix: Matrix, votes: Votes, spec: MatrixSpec, step: jax.Array, key: jax.Array
    ) -> tuple[Matrix, Report]:
        """(the state after these summed votes, what a person watches of its update; see `base_report`).

        With a `count` of 0, whatever else the votes hold, the state is what it was. `step` is int32 (), the number of
        updates before this one; `key` is of the run and matrix, the same every step. Of a sparse table it sees the rows
        that a step touches, and `touched` int32 (N,) among the votes: how many of `count` votes touched each of them;
        what becomes of a row with 0 is not kept, nor reported.
        """
        ...


def exp2_scale(exponent: jax.Array, shift: jax.Array) -> jax.Array:
    """`2^(E + shift)` in float32 for int8 `E` and float32 `shift`."""
    return jnp.exp2(exponent.astype(jnp.float32) + shift)


def score_vote(collected: Votes) -> Votes:
    """Integer form of a collected score: `score` int32 (..., N, R) and `count` int32 (...)."""
    return {
        "score": jnp.round(collected["score"]).astype(jnp.int32),
        "count": jnp.round(collected["count"]).astype(jnp.int32),
    }


def counted_score(votes: Votes) -> jax.Array:
    """The summed `score` (..., N, R), zero where no vote is counted."""
    return jnp.where(per_group(votes["count"]) > 0, votes["score"], 0)


def per_group(scalar: jax.Array) -> jax.Array:
    """A per-matrix value (...) shaped to broadcast over (..., N, R)."""
    return scalar[..., None, None]


def empty_report() -> Report:
    """The report of no matrix at all."""
    names = ("weights", "groups", "flips", "zeros", "drift", "saturated")
    return {name: jnp.zeros((), jnp.float32) for name in names}


def add_reports(*reports: Report) -> Report:
    """The report of several matrices together."""
    return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *reports)


def base_report(
    rule: Rule, before: Matrix, after: Matrix, votes: Votes, spec: MatrixSpec, counts: jax.Array | None = None
) -> Report:
    """Sums over one unstacked matrix, of a sparse table over the rows that `votes` touched.

    `weights` and `groups` there are; `flips`, trits that changed; `zeros`, trits that are 0 now; `saturated`, latents
    at either end of their range (0 for rules without latents); `drift`, |log2 of the scale over the base scale|. A
    rule that has counted the first three of every row gives them as `counts`, int32 (N, 3), in this order.
    """
    if counts is None:
        old, new = digits(before["trits"]), digits(after["trits"])
        padding = len(new) * spec.packed - spec.in_features
        flips = _of_rows(a != b for a, b in zip(old, new, strict=True))
        zeros = _of_rows(digit == 1 for digit in new) - padding
        counts = jnp.stack([flips, zeros, jnp.zeros_like(flips)], axis=1)
    shift = jnp.log2(rule.scale(after, spec.group_size)) - after["exponent"].astype(jnp.float32)
    drift = jnp.sum(jnp.abs(shift), axis=1)
    rows = jnp.float32(spec.out_features)
    if "touched" in votes:
        touched = votes["touched"] > 0
        rows = jnp.sum(touched, dtype=jnp.float32)
        counts, drift = jnp.where(touched[:, None], counts, 0), jnp.where(touched, drift, 0)
    flips, zeros, saturated = jnp.sum(counts, axis=0, dtype=jnp.float32)
    return {
        "weights": rows * spec.in_features,
        "groups": rows * spec.groups,
        "flips": flips,
        "zeros": zeros,
        "drift": jnp.sum(drift),
        "saturated": saturated,
    }


def _of_rows(conditions: Iterable[jax.Array]) -> jax.Array:
    """How often they hold in every row, int32 (N,): added byte by byte first, so that one pass over the bytes does."""
    return jnp.sum(sum(condition.astype(jnp.uint8) for condition in conditions), axis=1, dtype=jnp.int32)


def shares(sums: Report) -> dict[str, jax.Array]:
    """Metrics of a whole model from added reports.

    `flip_rate`, `zero_share` and `saturation` are shares of all weights; `scale_drift` is a mean over groups, in powers
    of two.
    """
    return {
        "flip_rate": sums["flips"] / sums["weights"],
        "zero_share": sums["zeros"] / sums["weights"],
        "saturation": sums["saturated"] / sums["weights"],
        "scale_drift": sums["drift"] / sums["groups"],
    }

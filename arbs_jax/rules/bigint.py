"""`bigint`: the source system's rule, exactly. A running mean of score votes shifts the scale; trits never move."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_jax.rules.base import Report, Votes, base_report, counted_score, exp2_scale, per_group, score_vote
from arbs_jax.state import Matrix, MatrixSpec


@dataclass(frozen=True)
class BigInt:
    """`shift = strength * c / (n * G)` (0 while n = 0); `c -= score`; `n += votes`; E and T fixed."""

    strength: float = 4.0
    """Shift, in powers of two, when every vote so far agreed on every column."""

    probe = "score"
    row_leaves = ("trits", "exponent", "corr")
    row_votes = ("score",)

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise ConfigError(f"rule.strength must be positive, got {self.strength}")

    def init(self, key: jax.Array, matrix: Matrix, spec: MatrixSpec) -> Matrix:
        """No leaves beyond the base four."""
        return matrix

    def scale(self, leaves: Mapping[str, jax.Array], group_size: int) -> jax.Array:
        """Group scales, float32 (..., N, R)."""
        # An accumulator can exceed float32's 24 bits, which costs a relative 2^-24 of the shift and nothing else.
        taken = per_group(leaves["votes"].astype(jnp.float32)) * group_size
        shift = self.strength * leaves["corr"].astype(jnp.float32) / jnp.maximum(taken, 1.0)
        return exp2_scale(leaves["exponent"], jnp.where(taken > 0, shift, 0.0))

    def largest_vote(self, name: str) -> int | None:
        """None: scores are bounded by their groups alone."""
        return None

    def vote(self, collected: Votes, matrix: Matrix, spec: MatrixSpec, key: jax.Array) -> Votes:
        """Score and count as int32."""
        return score_vote(collected)

    def update(
        self, matrix: Matrix, votes: Votes, spec: MatrixSpec, step: jax.Array, key: jax.Array
    ) -> tuple[Matrix, Report]:
        """Subtracts the score, counts the votes."""
        moved = matrix | {
            "corr": matrix["corr"] - counted_score(votes).astype(jnp.int64),
            "votes": matrix["votes"] + votes["count"].astype(jnp.int64),
        }
        return moved, base_report(self, matrix, moved, votes, spec)

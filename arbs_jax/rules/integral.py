"""`integral`: an integrator of score votes in place of a running mean. The log-scale goes where the votes push it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_jax.rules.base import Report, Votes, base_report, counted_score, exp2_scale, score_vote
from arbs_jax.rules.schedule import UNIT_BITS, Schedule
from arbs_jax.state import Matrix, MatrixSpec


@dataclass(frozen=True)
class Integral:
    """`shift = c / 2^fraction_bits`; `c -= lr_q * score` with an integer learning rate `lr_q`; E and T fixed.

    A score is a sum of up to G signs, of size sqrt(G) when they are independent, so the rate is given per sqrt(G):
    `lr_q = round(learning_rate * 2^fraction_bits / (sqrt(G) * votes_per_step))` times the schedule.
    """

    learning_rate: float = 0.015
    """Peak step of the log2-scale for a score of sqrt(G), summed over one step's votes."""
    schedule: Schedule = Schedule()
    """Multiplier of the rate over the run."""
    votes_per_step: int = 1
    """Votes that one step takes on a matrix (micro-batches times data shards): the rate is shared among them."""
    fraction_bits: int = 24
    """`f`: resolution of the log2-scale."""

    probe = "score"
    row_leaves = ("trits", "exponent", "corr")
    row_votes = ("score",)

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate <= 8:
            raise ConfigError(f"rule.learning_rate must be in (0, 8] powers of two a step, got {self.learning_rate}")
        if self.votes_per_step < 1:
            raise ConfigError(f"rule.votes_per_step must be at least 1, got {self.votes_per_step}")
        if not 8 <= self.fraction_bits <= 40:
            raise ConfigError(f"rule.fraction_bits must be in [8, 40], got {self.fraction_bits}")

    def init(self, key: jax.Array, matrix: Matrix, spec: MatrixSpec) -> Matrix:
        """No leaves beyond the base four."""
        return matrix

    def scale(self, leaves: Mapping[str, jax.Array], group_size: int) -> jax.Array:
        """Group scales, float32 (..., N, R)."""
        shift = leaves["corr"].astype(jnp.float32) * 2.0**-self.fraction_bits
        return exp2_scale(leaves["exponent"], shift)

    def integer_rate(self, step: jax.Array, group_size: int) -> jax.Array:
        """`lr_q` at a step, int64 (). Raises ConfigError if the peak rounds to 0."""
        peak = round(self.learning_rate * 2**self.fraction_bits / (math.sqrt(group_size) * self.votes_per_step))
        if peak == 0:
            raise ConfigError(
                f"rule.learning_rate {self.learning_rate} rounds to 0 at fraction_bits {self.fraction_bits} and "
                f"group_size {group_size}; raise one of the first two"
            )
        # Made an array by name: as a Python number a peak past 31 bits would not fit JAX's default integer.
        return (self.schedule.multiplier(step) * jnp.asarray(peak, jnp.int64)) >> UNIT_BITS

    def largest_vote(self, name: str) -> int | None:
        """None: scores are bounded by their groups alone."""
        return None

    def vote(self, collected: Votes, matrix: Matrix, spec: MatrixSpec, key: jax.Array) -> Votes:
        """Score and count as int32."""
        return score_vote(collected)

    def update(
        self, matrix: Matrix, votes: Votes, spec: MatrixSpec, step: jax.Array, key: jax.Array
    ) -> tuple[Matrix, Report]:
        """Integrates the summed score at this step's rate, counts the votes."""
        rate = self.integer_rate(step, spec.group_size)
        moved = matrix | {
            "corr": matrix["corr"] - rate * counted_score(votes).astype(jnp.int64),
            "votes": matrix["votes"] + votes["count"].astype(jnp.int64),
        }
        return moved, base_report(self, matrix, moved, votes, spec)

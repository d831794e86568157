"""What a learning rule is: an (init, update) pair over the integer leaves of one matrix, and its scale law."""

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from arbs_jax.state import Matrix, MatrixSpec

Votes = dict[str, jax.Array]


class Rule(Protocol):
    """A learning rule; a frozen dataclass, so that it can be a static argument. Integers in, integers out.

    Leaves may carry a leading layer axis; every method works on both forms.
    """

    @property
    def probe(self) -> str:
        """What backward collects for this rule: "score" or "gradient" (`arbs_kernels.autodiff`)."""
        ...

    def init(self, key: jax.Array, matrix: Matrix, spec: MatrixSpec) -> Matrix:
        """The four base leaves, with the rule's own integer leaves added."""
        ...

    def scale(self, leaves: Mapping[str, jax.Array], group_size: int) -> jax.Array:
        """Group scales `S = 2^(E + shift)`, float32 (..., N, R)."""
        ...

    def vote(self, collected: Votes, spec: MatrixSpec, key: jax.Array) -> Votes:
        """Turns what one backward contribution collected (float32) into integers that add exactly."""
        ...

    def update(self, matrix: Matrix, votes: Votes, spec: MatrixSpec, step: jax.Array, key: jax.Array) -> Matrix:
        """The state after these summed votes; `step` is int32 (), the number of updates before this one."""
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


def per_group(scalar: jax.Array) -> jax.Array:
    """A per-matrix value (...) shaped to broadcast over (..., N, R)."""
    return scalar[..., None, None]

"""Sparse tables among the matrices of a stage: their votes by path, for they do not add as those of matrices do."""

from typing import Any

import jax

from arbs_jax import tables
from arbs_jax.errors import ConfigError
from arbs_jax.models.stages import Stage, Subtrees
from arbs_jax.rules import Rule, Votes
from arbs_jax.rules.base import Report
from arbs_jax.state import MatrixSpec, flatten_specs, map_matrices
from arbs_jax.votes import matrix_key

RowVotes = dict[str, Votes]
"""Votes on sparse tables (`arbs_jax.tables`) by path."""


def check(stage: Stage, specs: Any) -> None:
    """Refuses sparse tables in a stacked stage, where every layer would be copied whole.

    Raises:
        ConfigError: there are such tables; the message names them.
    """
    found = [path for name in stage.keys for path, spec in flatten_specs(specs[name], name).items() if spec.sparse]
    if stage.stacked and found:
        raise ConfigError(f"a stacked stage cannot have a sparse table, got {found}; give it a stage of its own")


def cast(rule: Rule, specs: Any, subtrees: Subtrees, collected: Subtrees, key: jax.Array) -> RowVotes:
    """The votes of one micro-batch on the sparse tables of these subtrees; `key` is of this contribution."""
    found: RowVotes = {}
    for name, subtree in subtrees.items():
        by_path = flatten_specs(specs[name], name)

        def add(path: str, matrix: Any, own: Any, by_path: dict[str, MatrixSpec] = by_path) -> None:
            if by_path[path].sparse:
                found[path] = tables.cast(rule, own, matrix, by_path[path], matrix_key(key, path))

        map_matrices(add, subtree, collected[name], prefix=name)
    return found


def move(
    rule: Rule,
    specs: dict[str, MatrixSpec],
    name: str,
    subtree: Any,
    votes: RowVotes,
    step: jax.Array,
    key: jax.Array,
    moves: jax.Array,
) -> tuple[Any, list[Report]]:
    """The subtree with its sparse tables after their votes, and their reports."""
    reports: list[Report] = []

    def moved(path: str, matrix: Any) -> Any:
        if not votes.get(path):
            return matrix
        after, report = tables.move(rule, matrix, votes[path], specs[path], step, matrix_key(key, path), moves)
        reports.append(report)
        return after

    return map_matrices(moved, subtree, prefix=name), reports

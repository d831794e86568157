"""Votes and updates of sparse tables, whose rows are touched by lookups only: nothing here has the table's height.

A vote is that of a matrix of the rows that were looked up: integers as of any matrix (`Rule.vote`), and beside them

    ids      int32 (U,)   rows of the table in ascending order, padded with its height
    touched  int32 (U,)   1 for a row that the vote moves

Votes do not add by entry, for each has rows of its own. They are laid side by side (`beside`, `stacked`), where entries
of rows keep their places and those of the whole table are summed, and `move` adds what belongs to one row: integers, so
in any order. An empty dict is no vote at all.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from arbs_jax.rules import Rule, Votes
from arbs_jax.rules.base import Report
from arbs_jax.state import Matrix, MatrixSpec
from arbs_kernels.correlation_score import score_of_gradient
from arbs_kernels.row_update import put_rows, rows_of, sum_rows, unique_rows


def cast(rule: Rule, collected: Votes, matrix: Matrix, spec: MatrixSpec, key: jax.Array) -> Votes:
    """The vote of one pass, of what its probe collected (`arbs_kernels.table_autodiff`).

    Occurrences of one row are summed first: they are one vote. Ids outside the table vote for nothing, nor does a probe
    that was used more than once, whose ids are sums.
    """
    if not collected["ids"].size:
        return {}
    used_once = jnp.round(collected["count"]) == 1
    ids = jnp.where(used_once, jnp.round(collected["ids"]).astype(jnp.int32), jnp.int32(spec.out_features))
    rows, place = unique_rows(ids, table_rows=spec.out_features)
    real = rows < spec.out_features
    place = jnp.where(ids < spec.out_features, place, rows.shape[0])
    gradient = sum_rows(collected["rows"], place, rows.shape[0])
    own, small = _rows_of(rule, matrix, rows), _of_rows(spec, rows)
    found = {"count": used_once.astype(jnp.float32), "touched": real}
    if rule.probe == "score":
        score = score_of_gradient(gradient, own["trits"], group_size=spec.group_size)
        found["score"] = score.astype(jnp.float32)
    else:
        found["gradient"] = gradient.astype(collected["rows"].dtype)
    votes = rule.vote(found, own, small, key)
    for name in rule.row_votes:
        votes[name] = jnp.where(_along(real, votes[name]), votes[name], jnp.zeros((), votes[name].dtype))
    return votes | {"ids": rows, "touched": (real & (votes["count"] > 0)).astype(jnp.int32)}


def beside(rule: Rule, *votes: Votes) -> Votes:
    """Several votes on one table as one; their rows lie side by side, some perhaps twice."""
    some = [vote for vote in votes if vote]
    if len(some) < 2:
        return some[0] if some else {}
    return {
        name: jnp.concatenate([vote[name] for vote in some])
        if _is_of_rows(rule, name)
        else sum((vote[name] for vote in some[1:]), some[0][name])
        for name in some[0]
    }


def stacked(rule: Rule, votes: Votes) -> Votes:
    """`beside` of votes stacked on a leading axis."""
    return {
        name: entry.reshape(-1, *entry.shape[2:])
        if _is_of_rows(rule, name)
        else jnp.sum(entry, axis=0, dtype=entry.dtype)
        for name, entry in votes.items()
    }


def move(
    rule: Rule,
    matrix: Matrix,
    votes: Votes,
    spec: MatrixSpec,
    step: jax.Array,
    key: jax.Array,
    moves: jax.Array | bool = True,
) -> tuple[Matrix, Report]:
    """The table after votes laid side by side, in place where it is donated; as it was where `moves` is false.

    Returns:
        (matrix, the rule's report over the touched rows alone).
    """
    if not votes:
        return matrix, {}
    votes = _merged(rule, votes, spec)
    votes["count"] = jnp.where(moves, votes["count"], 0)
    ids, touched = votes.pop("ids"), votes["touched"] > 0
    # The rows are copied out: were they read from the table again after it has moved, there would have to be a second.
    taken = {name: leaf for name, leaf in _rows_of(rule, matrix, ids).items() if name in rule.row_leaves}
    taken, votes = jax.lax.optimization_barrier((taken, votes))
    before = matrix | taken
    after, report = rule.update(dict(before), votes, _of_rows(spec, ids), step, key)
    # What the rule leaves alone is not written: of a write that waits for no vote the compiler makes a copy.
    changed = {name: leaf for name, leaf in after.items() if leaf is not before[name]}
    return put_back(rule, matrix, jnp.where(touched & moves, ids, spec.out_features), changed), report


def _merged(rule: Rule, votes: Votes, spec: MatrixSpec) -> Votes:
    """Votes of one row added."""
    rows, place = unique_rows(votes["ids"], table_rows=spec.out_features)
    place = jnp.where(votes["ids"] < spec.out_features, place, rows.shape[0])

    def added(entry: jax.Array) -> jax.Array:
        return jnp.zeros((rows.shape[0], *entry.shape[1:]), entry.dtype).at[place].add(entry, mode="drop")

    return {name: added(entry) if _is_of_rows(rule, name) else entry for name, entry in votes.items()} | {"ids": rows}


def _rows_of(rule: Rule, matrix: Matrix, ids: jax.Array) -> Matrix:
    """The matrix of some rows: leaves of rows taken out, those of the whole table as they are."""

    def taken(leaf: jax.Array) -> jax.Array:
        return rows_of(leaf[:, None], ids)[:, 0] if leaf.ndim == 1 else rows_of(leaf, ids)

    return {name: taken(leaf) if name in rule.row_leaves else leaf for name, leaf in matrix.items()}


def put_back(rule: Rule, matrix: Matrix, ids: jax.Array, rows: Matrix) -> Matrix:
    """The table with these rows (of ids outside it none), and leaves of the whole table, replaced."""

    def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
        if leaf.ndim == 1:
            return put_rows(leaf[:, None], ids, new[:, None])[:, 0]
        return put_rows(leaf, ids, new)

    return matrix | {name: put(matrix[name], new) if name in rule.row_leaves else new for name, new in rows.items()}


def _of_rows(spec: MatrixSpec, ids: jax.Array) -> MatrixSpec:
    return replace(spec, out_features=ids.shape[0])


def _is_of_rows(rule: Rule, name: str) -> bool:
    return name in ("ids", "touched") or name in rule.row_votes


def _along(rows: jax.Array, entry: jax.Array) -> jax.Array:
    return rows.reshape(-1, *[1] * (entry.ndim - 1))

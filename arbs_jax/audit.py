"""Counting what persists: logical weights, bytes by leaf kind, bits per weight, and that no float is among them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from arbs_jax.errors import StateError
from arbs_jax.layers import COLLECTION, MEMORY
from arbs_jax.state import Tree, flatten_specs, iter_matrices


@dataclass(frozen=True)
class Audit:
    """The account of one model's persistent state."""

    logical_ternary_weights: int
    """Trits that act as weights, N*K summed over matrices, layers and experts."""
    state_bytes: int
    """Bytes of all persistent leaves."""
    bits_per_weight: float
    """`8 * state_bytes / logical_ternary_weights`."""
    float_params: int
    """Float scalars in trainable collections."""
    float_buffers: int
    """Float scalars in any other persistent collection or in the training state."""
    bytes_by_leaf: dict[str, int]
    """Bytes by leaf name, largest first."""
    weights_by_part: dict[str, int]
    """Logical weights by part of the model, largest first."""

    def to_json(self) -> dict[str, Any]:
        """Plain dict of the fields."""
        return asdict(self)


def audit(variables: Tree, specs: Any, extra: Iterable[Any] = (), parts: Mapping[str, str] | None = None) -> Audit:
    """Audits the collections of a model (arrays or `jax.ShapeDtypeStruct`s; nothing is allocated).

    Args:
        variables: all collections, as `model.init` returns them; bookkeeping of the training state goes under "memory"
            and is counted on a line of its own.
        specs: `matrix_specs(model, ...)`.
        extra: further leaves that persist, such as the step counter.
        parts: what parts are called, by the path of a subtree or matrix such as "vq/codebook"; the longest path that a
            matrix lies under names its part, and without any its top-level subtree does.
    """
    ternary, by_path = variables.get(COLLECTION, {}), flatten_specs(specs)
    weights: dict[str, int] = {}
    for path, matrix in iter_matrices(ternary):
        part = _part(path, parts or {})
        weights[part] = weights.get(part, 0) + math.prod(by_path[path].shape) * math.prod(matrix["votes"].shape)
    leaves: dict[str, int] = {}
    for _, matrix in iter_matrices(ternary):
        for name, leaf in matrix.items():
            leaves[name] = leaves.get(name, 0) + _bytes(leaf)
    bookkeeping = jax.tree.leaves(variables.get(MEMORY, {}))
    if bookkeeping:
        leaves[MEMORY] = sum(_bytes(leaf) for leaf in bookkeeping)
    rest = {name: tree for name, tree in variables.items() if name not in (COLLECTION, MEMORY)}
    others = [*jax.tree.leaves(rest), *extra]
    if others:
        leaves["other"] = sum(_bytes(leaf) for leaf in others)
    total = sum(weights.values())
    persistent = sum(leaves.values())
    return Audit(
        logical_ternary_weights=total,
        state_bytes=persistent,
        bits_per_weight=8 * persistent / max(total, 1),
        float_params=_floats(variables.get("params", {})),
        float_buffers=_floats([{name: tree for name, tree in variables.items() if name != "params"}, *extra]),
        bytes_by_leaf=dict(sorted(leaves.items(), key=lambda item: -item[1])),
        weights_by_part=dict(sorted(weights.items(), key=lambda item: -item[1])),
    )


def require_integers(account: Audit) -> None:
    """Refuses a model that keeps floats.

    Raises:
        StateError: there are float parameters or buffers; the message counts them.
    """
    if account.float_params or account.float_buffers:
        raise StateError(
            f"the persistent state must be integers only, found {account.float_params} float parameters and "
            f"{account.float_buffers} floats in buffers; keep them out of the model's collections"
        )


def _part(path: str, parts: Mapping[str, str]) -> str:
    names = path.split("/")
    above = ("/".join(names[:depth]) for depth in range(len(names), 0, -1))
    return next((parts[prefix] for prefix in above if prefix in parts), names[0])


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _floats(tree: Any) -> int:
    return sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if not np.issubdtype(np.dtype(leaf.dtype), np.integer)
    )

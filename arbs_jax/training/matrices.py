"""A function for every matrix of a subtree: those of one shape together, large ones alone, large experts by turns."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from arbs_jax.rules.base import Report, add_reports, empty_report
from arbs_jax.state import MatrixSpec, map_matrices
from arbs_jax.votes import matrix_key
from arbs_kernels.grouped_autodiff import expert_gradient

MOST_TOGETHER = 2**22
"""Weights of a matrix, or of a set of experts, beyond which it moves alone."""


def keys_of(name: str, subtree: Any, key: jax.Array) -> Any:
    """A key for every matrix, nested like the state."""
    return map_matrices(lambda path, _: matrix_key(key, path), subtree, prefix=name)


def layer_key(key: jax.Array, index: jax.Array) -> jax.Array:
    """The key of a layer of a stack; what is not stacked has the key of the run."""
    return jax.random.fold_in(key, index + 1)


def vote_key(key: jax.Array, step: jax.Array, micro: jax.Array | int) -> jax.Array:
    """The key of one contribution to a layer: of the step and of the micro-batch's number over all shards."""
    return jax.random.fold_in(jax.random.fold_in(key, step), micro)


def by_turns(
    function: Callable[..., tuple[Any, Report]], spec: MatrixSpec, keys: Any, matrix: Any, found: Any
) -> tuple[Any, Report]:
    """As `each_expert`, for experts so large that they move one after another, in place: the temporaries of one."""

    def move(carry: tuple[Any, Report], number: jax.Array) -> tuple[tuple[Any, Report], None]:
        leaves, report = carry

        def its(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), tree)

        single = its(leaves)
        if "sizes" in found:
            own = {"gradient": expert_gradient(found, number), "count": found["count"][number]}
        else:
            own = its(found)
        # Copied out, lest what has moved be read again and a second set of experts be kept.
        single, own = jax.lax.optimization_barrier((single, own))
        its_keys = jax.tree.map(lambda key: jax.random.fold_in(key, number), keys)
        moved, more = function(spec.single, its_keys, single, own)
        leaves = jax.tree.map(
            lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, number, 0), leaves, moved
        )
        return (leaves, add_reports(report, more)), None

    numbers = jnp.arange(spec.experts, dtype=jnp.int32)
    return jax.lax.scan(move, (dict(matrix), empty_report()), numbers)[0]


def together(function: Callable[..., Any], specs: dict[str, MatrixSpec], prefix: str, *trees: Any) -> Any:
    """`function(spec, *nodes)` for every matrix of the trees, nested like the first of them. A leading axis of all
    leaves, of layers, is mapped over.

    Matrices of one shape go through one `vmap`, behind the layers' own axis: fewer, larger operations to compile and to
    launch. Large ones do not, for they would be copied whole and their temporaries would be held side by side: they go
    one after another, the second of the nodes (votes, or what they are made of) being read once the matrix before is
    done.
    """
    entries: dict[str, tuple[Any, ...]] = {}
    map_matrices(lambda path, *nodes: entries.update({path: nodes}), *trees, prefix=prefix)
    layers = jax.tree.leaves(trees)[0].shape[0]
    alike: dict[Any, list[str]] = {}
    for path in entries:
        alone = specs[path].sparse or specs[path].weights > MOST_TOGETHER
        alike.setdefault((specs[path], path if alone else ""), []).append(path)
    results: dict[str, Any] = {}
    before = ""
    for (spec, alone), paths in alike.items():
        if alone and before:
            matrix, found, *others = entries[alone]
            found, results[before] = jax.lax.optimization_barrier((found, results[before]))
            entries[alone] = (matrix, found, *others)
        before = alone or before
        nodes = [entries[path] for path in paths]
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *nodes) if len(nodes) > 1 else nodes[0]
        out = _mapped(partial(function, spec), joined, layers * len(paths))
        for index, path in enumerate(paths):
            own = slice(index * layers, (index + 1) * layers)
            results[path] = jax.tree.map(lambda leaf, own=own: leaf[own], out) if len(paths) > 1 else out
    return map_matrices(lambda path, *_: results[path], trees[0], prefix=prefix)


def _mapped(function: Callable[..., Any], nodes: tuple[Any, ...], count: int) -> Any:
    """Over the leading axis; without `vmap` where that is one."""
    if count > 1:
        return jax.vmap(function)(*nodes)
    alone = function(*jax.tree.map(lambda leaf: leaf[0], nodes))
    return jax.tree.map(lambda leaf: leaf[None], alone)

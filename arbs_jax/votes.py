"""From a loss over a Linen model to integer votes, and from votes to the next state: the five-line training loop."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from arbs_jax import tables
from arbs_jax.layers import COLLECTION, PROBES, SPECS
from arbs_jax.rules import Rule
from arbs_jax.rules.noise import run_key
from arbs_jax.state import MatrixSpec, Tree, flatten_specs, map_matrices
from arbs_kernels.autodiff import make_probe
from arbs_kernels.decode import decode
from arbs_kernels.grouped_autodiff import expert_gradient, make_factor_probe
from arbs_kernels.packed_matmul import prepared_scale
from arbs_kernels.table_autodiff import make_rows_probe


def matrix_specs(model: nn.Module, *inputs: Any, **kwargs: Any) -> dict[str, Any]:
    """Logical shapes of every ternary matrix of a Linen model, nested like its "ternary" collection.

    Traces the model on `inputs` (arrays or `jax.ShapeDtypeStruct`s); nothing is allocated or computed.
    """

    def trace(*arrays: Any) -> Any:
        # A key of the kind that fresh models are drawn with: what is traced for it here need not be traced there.
        variables = model.init(run_key(0), *arrays, **kwargs)
        return model.apply(variables, *arrays, mutable=[SPECS], **kwargs)[1].get(SPECS, {})

    return _unwrap(jax.eval_shape(trace, *inputs))


def _unwrap(node: Any) -> Any:
    if set(node) == {"spec"} and isinstance(node["spec"], MatrixSpec):
        return node["spec"]
    return {name: _unwrap(child) for name, child in node.items()}


def make_probes(
    ternary: Tree,
    specs: Tree,
    rule: Rule,
    dtype: jnp.dtype = jnp.float32,
    lookups: Mapping[str, int] | None = None,
    uses: Mapping[str, tuple[int, int]] | None = None,
) -> Any:
    """Zero probes for the collection "probes", nested like `ternary`; stacked matrices get stacked probes.

    `dtype` is that of the gradients that rules sample. `lookups` says by path how many rows of a sparse table one pass
    looks up; 0 where it is silent. `uses` says by path how often a pass uses a set of experts and with how many rows:
    where these take less than the gradient of one expert, they are what is collected.
    """
    by_path, rows = flatten_specs(specs), lookups or {}

    def probe(path: str, matrix: Any) -> dict[str, jax.Array]:
        spec = by_path[path]
        if spec.sparse:
            return make_rows_probe(rows.get(path, 0), spec.in_features, dtype)
        often, wide = (uses or {}).get(path, (0, 0))
        if rule.probe == "gradient" and 0 < often * wide * sum(spec.shape) <= math.prod(spec.shape):
            return make_factor_probe(often, wide, spec.experts, *spec.shape, dtype)
        single = make_probe(rule.probe, spec.out_features, spec.in_features, spec.group_size, dtype)
        stack = matrix["votes"].shape
        return jax.tree.map(lambda leaf: jnp.zeros(stack + leaf.shape, leaf.dtype), single)

    return map_matrices(probe, ternary)


def value_and_votes(
    loss: Callable[..., jax.Array], rule: Rule, specs: Tree, lookups: Mapping[str, int] | None = None
) -> Callable[..., tuple[jax.Array, dict[str, Any]]]:
    """Like `jax.value_and_grad`, with integer votes for gradients.

    Args:
        loss: `loss(variables, *args) -> scalar`, with `variables` to hand to `model.apply`.
        rule: says what to collect.
        specs: `matrix_specs(model, ...)`.
        lookups: rows that one call looks up in each sparse table, by its path.

    Returns:
        `function(ternary, *args, key=None) -> (loss, votes)`; `votes` is nested like `ternary` and adds up exactly over
        micro-batches and devices (`add_votes`). `key` seeds the rules that sample (another one for every vote); it is
        not needed for rules that vote by score.
    """
    by_path = flatten_specs(specs)

    def run(ternary: Tree, *args: Any, key: jax.Array | None = None) -> tuple[jax.Array, dict[str, Any]]:
        base = jax.random.key(0) if key is None else key

        def with_probes(probes: Any) -> jax.Array:
            return loss({COLLECTION: ternary, PROBES: probes}, *args)

        value, collected = jax.value_and_grad(with_probes)(make_probes(ternary, specs, rule, lookups=lookups))
        votes = map_matrices(
            lambda path, matrix, found: matrix_vote(rule, by_path[path], matrix, found, matrix_key(base, path)),
            ternary,
            collected,
        )
        return value, votes

    return run


def add_votes(rule: Rule, specs: Tree, *votes: Tree) -> Any:
    """The sum of several votes, each nested like `specs`: exact, and the same in any order but for sparse tables, whose
    rows are laid side by side in the order given and added when they move."""
    by_path = flatten_specs(specs)

    def add(path: str, nodes: tuple[Any, ...]) -> Any:
        if path in by_path:
            return tables.beside(rule, *nodes) if by_path[path].sparse else jax.tree.map(lambda *v: sum(v), *nodes)
        return {name: add(f"{path}/{name}" if path else name, tuple(node[name] for node in nodes)) for name in nodes[0]}

    return add("", votes)


def dense_gradients(spec: MatrixSpec, collected: Any) -> Any:
    """What was collected, with the gradients of all experts in place of their factors, if it is these."""
    if "sizes" not in collected:
        return collected
    numbers = jnp.arange(spec.experts, dtype=jnp.int32)
    gradient = jax.lax.map(partial(expert_gradient, collected), numbers)
    return {"gradient": gradient, "count": collected["count"]}


def matrix_vote(rule: Rule, spec: MatrixSpec, matrix: Any, collected: Any, key: jax.Array) -> Any:
    """The vote of one pass on what stands at one path: a matrix, a sparse table, or the matrices of experts."""
    if spec.sparse:
        return tables.cast(rule, collected, matrix, spec, key)
    collected = dense_gradients(spec, collected)
    return each_expert(
        lambda single, own, *nodes: rule.vote(nodes[1], nodes[0], single, own), spec, key, matrix, collected
    )


def each_expert(function: Callable[..., Any], spec: MatrixSpec, keys: Any, matrix: Any, *nodes: Any) -> Any:
    """`function(spec, keys, matrix, *nodes)`; where the matrix is that of experts, mapped over all leading axes, with
    the spec of one and keys (a tree of them) of its own."""
    if not spec.experts:
        return function(spec, keys, matrix, *nodes)

    def mapped(axes: int, keys: Any, *nodes: Any) -> Any:
        if not axes:
            return function(spec.single, keys, *nodes)
        numbers = jnp.arange(jax.tree.leaves(nodes)[0].shape[0], dtype=jnp.int32)
        own = jax.tree.map(lambda key: jax.vmap(partial(jax.random.fold_in, key))(numbers), keys)
        return jax.vmap(partial(mapped, axes - 1))(own, *nodes)

    return mapped(matrix["votes"].ndim, keys, matrix, *nodes)


def update(rule: Rule, specs: Tree, ternary: Tree, votes: Tree, step: jax.Array | int, key: jax.Array | None = None):
    """The state after the summed `votes`; pure, integers in, integers out.

    `step` counts updates from 0; `key` seeds the rules that round at random and is the same on every step of a run.
    """
    by_path = flatten_specs(specs)
    base = jax.random.key(0) if key is None else key
    at = jnp.asarray(step, jnp.int32)

    def moved(path: str, matrix: Any, cast: Any) -> Any:
        spec, own = by_path[path], matrix_key(base, path)
        if spec.sparse:
            return tables.move(rule, matrix, cast, spec, at, own)[0]
        return each_expert(
            lambda single, key, *nodes: rule.update(dict(nodes[0]), nodes[1], single, at, key)[0],
            spec,
            own,
            matrix,
            cast,
        )

    return map_matrices(moved, ternary, votes)


def matrix_key(key: jax.Array, path: str) -> jax.Array:
    """A key for the matrix at `path`: from its name alone, so that it depends neither on order nor on neighbours."""
    number = 2166136261
    for byte in path.encode():
        number = (number ^ byte) * 16777619 % 2**32
    return jax.random.fold_in(key, number)


def decode_tree(ternary: Tree, specs: Tree, rule: Rule, dtype: jnp.dtype) -> Any:
    """Effective weights of every matrix for the collection "dense": each matrix's node becomes `{"weight": (N, K)}`.

    For inference where memory allows: the weights are decoded once in place of once a call. Sparse tables and experts,
    of which a call reads some rows and some matrices, stay packed: their nodes are empty, and the model finds them in
    the collection "ternary", to be given beside this one.
    """

    def weight(matrix: Any, scale: jax.Array, spec: MatrixSpec) -> dict[str, jax.Array]:
        return {"weight": decode(matrix["trits"], scale, spec.in_features, spec.group_size, dtype)}

    return _made_once(weight, ternary, specs, rule)


def scale_tree(ternary: Tree, specs: Tree, rule: Rule, dtype: jnp.dtype) -> Any:
    """Scales of every matrix for the collection "dense", in place of its weights: nodes become `{"scale": ...}`.

    For inference from packed trits: scales are made once in place of once a call, as `packed_matmul` takes them for
    activations of `dtype`. Sparse tables and experts have none, as in `decode_tree`.
    """

    def scales(_matrix: Any, scale: jax.Array, _spec: MatrixSpec) -> dict[str, jax.Array]:
        return {"scale": prepared_scale(scale) if dtype == jnp.bfloat16 else scale}

    return _made_once(scales, ternary, specs, rule)


def _made_once(
    make: Callable[[Any, jax.Array, MatrixSpec], dict[str, jax.Array]], ternary: Tree, specs: Tree, rule: Rule
) -> Any:
    """`make(matrix, its scales, its spec)` in place of each matrix that a call reads whole, nothing for the others."""
    by_path = flatten_specs(specs)

    def made(path: str, matrix: Any) -> dict[str, jax.Array]:
        spec = by_path[path]
        return {} if spec.sparse or spec.experts else make(matrix, rule.scale(matrix, spec.group_size), spec)

    return map_matrices(made, ternary)

"""Flax Linen modules over ternary state: nothing in "params", integer leaves in the collection "ternary".

Each matrix also reads two optional collections: "probes", whose cotangent is the matrix's vote (`arbs_jax.votes`), and
"dense", a weight decoded once for inference, or scales made once (`arbs_jax.votes.decode_tree` and `scale_tree`). The
collection "ternary_spec" is written on request only and tells the logical shape of every matrix.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_jax.rules import Integral, Rule
from arbs_jax.state import BASE_LEAVES, InitConfig, Matrix, MatrixSpec, init_matrix
from arbs_kernels.autodiff import (
    JOINED_ROWS,
    MatmulSpec,
    PreparedScale,
    ternary_gather,
    ternary_matmul,
    ternary_matmuls,
)
from arbs_kernels.grouped_autodiff import ternary_grouped_matmul
from arbs_kernels.table_autodiff import ternary_rows

COLLECTION = "ternary"
PROBES = "probes"
DENSE = "dense"
SPECS = "ternary_spec"
MEMORY = "memory"
"""Bookkeeping that is no weight, integers; not read by the layers here."""


@dataclass(frozen=True)
class TernaryConfig:
    """What every ternary matrix of a model shares."""

    rule: Rule = Integral()
    """Learning rule; the forward pass needs it for the scale law."""
    group_size: int = 32
    """`G`, columns that share one scale."""
    init: InitConfig = InitConfig()
    """Distribution of fresh state."""
    implementation: str | None = None
    """Implementation of the packed operators; None takes the best that works."""
    float8: bool = False
    """Whether products of many rows are of float8 operands (`arbs_kernels.float8`); tables and experts have none."""


@partial(jax.jit, static_argnums=(1, 2, 3))
def _fresh(key: jax.Array, spec: MatrixSpec, rule: Rule, init: InitConfig) -> Matrix:
    """All leaves of a fresh matrix; traced once for all of a kind."""
    base, own = jax.random.split(key)
    return rule.init(own, init_matrix(base, spec, init), spec)


class _TernaryMatrix(nn.Module):
    """Declares the leaves of one matrix in the calling module's scope; the base of the layers below."""

    config: TernaryConfig = TernaryConfig()

    def _matrix(
        self, spec: MatrixSpec, plant: Callable[[Matrix], Matrix] | None = None
    ) -> tuple[Matrix, Matrix | None]:
        """The leaves, and the probe if there is one; `plant` has the last word on fresh leaves."""
        config = self.config
        fresh: dict[str, jax.Array] = {}

        def drawn(key: jax.Array) -> Matrix:
            leaves = _fresh(key, spec.single, config.rule, config.init)
            return leaves if plant is None else plant(leaves)

        def leaf(name: str) -> jax.Array:
            if not fresh:
                key = self.make_rng("params")
                fresh.update(jax.lax.map(drawn, jax.random.split(key, spec.experts)) if spec.experts else drawn(key))
            return fresh[name]

        leaves = {name: self.variable(COLLECTION, name, leaf, name).value for name in BASE_LEAVES}
        if self.is_initializing():
            # The forward pass reads the base leaves only; those of the rule are declared once, here.
            for name in sorted(fresh.keys() - set(BASE_LEAVES)):
                self.variable(COLLECTION, name, leaf, name)
        else:
            self.sow(SPECS, "spec", spec, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        kinds = ("rows", "ids", "count") if spec.sparse else (config.rule.probe, "x", "dy", "sizes", "count")
        kinds = [name for name in kinds if self.has_variable(PROBES, name)]
        probe = {name: self.get_variable(PROBES, name) for name in kinds} or None
        return leaves, probe

    def _matmul_spec(self, spec: MatrixSpec) -> MatmulSpec:
        config = self.config
        return MatmulSpec(
            spec.in_features,
            spec.group_size,
            config.rule,
            config.implementation,
            float8=config.float8 and not (spec.table or spec.experts),
        )

    def _as_prepared(self, leaves: Matrix, static: MatmulSpec) -> tuple[Matrix, MatmulSpec]:
        """Leaves and what else a product of them needs, with the scales that were made once if there are such."""
        if not self.has_variable(DENSE, "scale"):
            return leaves, static
        given = {"trits": leaves["trits"], "scale": self.get_variable(DENSE, "scale")}
        return given, replace(static, law=PreparedScale(), float8=False)


class TernaryDense(_TernaryMatrix):
    """`y = x W^T` with ternary `W (features, K)` and no bias; `(..., K)` to `(..., features)` in the dtype of `x`."""

    features: int = 0
    table: bool = False
    """Whether rows stand for symbols, as in an output head (`MatrixSpec.table`)."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """See the class."""
        return projections(x, self)[0]

    @nn.compact
    def parts(self, in_features: int) -> tuple[jax.Array | None, Matrix, MatmulSpec, Matrix | None]:
        """(the weight if it is decoded, else the leaves, what else a product needs, and the probe if there is one)."""
        spec = MatrixSpec(self.features, in_features, self.config.group_size, table=self.table)
        static = self._matmul_spec(spec)
        if self.has_variable(DENSE, "weight"):
            return self.get_variable(DENSE, "weight"), {}, static, None
        leaves, probe = self._matrix(spec)
        return None, *self._as_prepared(leaves, static), probe


def projections(x: jax.Array, *layers: TernaryDense) -> tuple[jax.Array, ...]:
    """Each layer of one `x (..., K)`, `(..., features)` each: of many rows by one product, and by fewer backward.

    The layers, which are made in the calling module, must be alike but for their names and features.
    """
    weights, leaves, specs, probes = zip(*(layer.parts(x.shape[-1]) for layer in layers), strict=True)
    if weights[0] is None:
        return ternary_matmuls(x, leaves, specs[0], probes)
    if x.size < JOINED_ROWS * x.shape[-1]:
        return tuple(_dense(x, weight.astype(x.dtype)) for weight in weights)
    ends = list(itertools.accumulate(weight.shape[0] for weight in weights[:-1]))
    return tuple(jnp.split(_dense(x, jnp.concatenate(weights).astype(x.dtype)), ends, axis=-1))


class TernaryEmbed(_TernaryMatrix):
    """A table `W (num_embeddings, features)`: rows by id, and through `attend` a tied output head.

    The forward pass of an id past the table clamps it, as JAX gathers do; check ids where they enter.
    """

    num_embeddings: int = 0
    features: int = 0
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        # A looked-up row is not a sum over inputs: its fan-in is 1.
        spec = MatrixSpec(self.num_embeddings, self.features, self.config.group_size, fan_in=1, table=True)
        self._static = self._matmul_spec(spec)
        if not self.has_variable(DENSE, "weight"):
            self._leaves, self._probe = self._matrix(spec)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Rows of integer `ids (...)`: `(..., features)` in `dtype`."""
        if self.has_variable(DENSE, "weight"):
            return self.get_variable(DENSE, "weight")[ids].astype(self.dtype)
        return ternary_gather(ids, self._leaves, self._static, self.dtype, self._probe)

    def attend(self, x: jax.Array) -> jax.Array:
        """Scores of every row, `(..., features)` to `(..., num_embeddings)`: the tied output head."""
        if self.has_variable(DENSE, "weight"):
            return _dense(x, self.get_variable(DENSE, "weight").astype(x.dtype))
        return ternary_matmul(x, *self._as_prepared(self._leaves, self._static), self._probe)


class TernaryTable(_TernaryMatrix):
    """A table of up to millions of rows, `W (num_embeddings, features)`, of which a step touches those it looks up.

    Neither forward nor backward nor update makes an array of the table's height. `__call__` votes for the rows it
    returns, once a pass: look all ids up in one call. Ids outside the table are an error where they are known, and
    inside a traced function read zeros and vote for nothing.
    """

    num_embeddings: int = 0
    features: int = 0
    dtype: jnp.dtype = jnp.float32
    plant: Callable[[Matrix], Matrix] | None = None
    """Applied to the leaves when they are drawn, by a table whose rows have their places; None leaves them."""

    def setup(self) -> None:
        # A looked-up row is not a sum over inputs: its fan-in is 1.
        spec = MatrixSpec(self.num_embeddings, self.features, self.config.group_size, fan_in=1, table=True, sparse=True)
        self._static = self._matmul_spec(spec)
        self._leaves, self._probe = self._matrix(spec, self.plant)
        self._lookups = _Lookups()

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Rows of integer `ids (...)`: `(..., features)` in `dtype`; differentiable in the probe.

        Raises:
            ConfigError: known ids are out of range, or votes are collected and `ids` are not as many as was said
                (`Stage.lookups`), or are looked up in a second call.
        """
        if self._probe is not None:
            self._lookups.take(self._probe["rows"].shape[0], ids.size, "/".join(self.path))
        return self._rows(ids, self._probe)

    def peek(self, ids: jax.Array) -> jax.Array:
        """The same rows with no vote, for rows that are only compared.

        Raises:
            ConfigError: known ids are out of range.
        """
        return self._rows(ids, None)

    def _rows(self, ids: jax.Array, probe: dict[str, jax.Array] | None) -> jax.Array:
        if ids.size and not isinstance(ids, jax.core.Tracer):
            least, most = int(ids.min()), int(ids.max())
            if least < 0 or most >= self.num_embeddings:
                raise ConfigError(f"ids must be in [0, {self.num_embeddings}), got {least} to {most}")
        return ternary_rows(ids, self._leaves, self._static, self.dtype, probe)


class _Lookups:
    """Sees to it that one pass uses a table's probe once, with as many ids as it is for."""

    def __init__(self) -> None:
        self.taken = False

    def take(self, expected: int, found: int, path: str) -> None:
        if self.taken:
            raise ConfigError(f"table {path!r} is looked up twice in one pass; look up all ids in one call")
        if expected != found:
            raise ConfigError(
                f"table {path!r} has a probe for {expected} lookups and makes {found}; say {found} in Stage.lookups"
            )
        self.taken = True


class TernaryExperts(_TernaryMatrix):
    """A ternary matrix `(features, K)` for each expert, no bias: rows `(M, K)` sorted by expert to `(M, features)`."""

    experts: int = 0
    features: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, group_sizes: jax.Array, use: jax.Array | int = 0) -> jax.Array:
        """`y = x W_e^T` with `group_sizes` int32 (X,) rows of each expert in order; those past their sum give zeros.

        `use` is the number of this use in a pass, for a probe of factors (`arbs_kernels.grouped_autodiff`).
        """
        if self.experts < 1:
            raise ConfigError(f"TernaryExperts.experts must be at least 1, got {self.experts}")
        spec = MatrixSpec(self.features, x.shape[-1], self.config.group_size, experts=self.experts)
        leaves, probe = self._matrix(spec)
        return ternary_grouped_matmul(x, group_sizes, leaves, self._matmul_spec(spec), probe, use)


class TernaryRMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis with the identity weight: no state at all.

    The statistics are float32 whatever the dtype of `x`.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)


def silu_gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up` of two halves of one product (`projections`), `(..., features)` each.

    Backward reads that product again, whole, and writes its cotangent at once. Left to itself XLA writes a copy of `up`
    beside the hidden activations, to be read there.
    """
    features = gate.shape[-1]
    halves = [half.reshape(-1, features) for half in (gate, up)]
    return _silu_gated(jnp.concatenate(halves, axis=-1)).reshape(gate.shape)


@jax.custom_vjp
def _silu_gated(joined: jax.Array) -> jax.Array:
    gate, up = jnp.split(joined, 2, axis=-1)
    return nn.silu(gate) * up


def _silu_gated_back(joined: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    # Another array to the compiler than the one that forward reads.
    gate, up = jnp.split(jax.lax.optimization_barrier(joined), 2, axis=-1)
    share = nn.sigmoid(gate)
    silu = gate * share
    return (jnp.concatenate([cotangent * up * (share + silu * (1 - share)), cotangent * silu], axis=-1),)


_silu_gated.defvjp(lambda joined: (_silu_gated(joined), joined), _silu_gated_back)


@jax.custom_vjp
def written_out(values: Any) -> Any:
    """A pytree as it is, which whatever reads it finds in memory; cotangents pass freely.

    XLA for GPUs joins kernels that read the same arrays, but not where those are results of matrix products. Behind
    this they are not.
    """
    return jax.lax.optimization_barrier(values)


written_out.defvjp(lambda values: (written_out(values), None), lambda _, cotangents: (cotangents,))


def _dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x W^T` for a decoded `weight (N, K)`."""
    if x.size == x.shape[-1]:  # One row, as in sampling: XLA on the CPU is several times faster at W x than at x W^T.
        return (weight @ x.reshape(-1)).reshape(*x.shape[:-1], -1)
    return x @ weight.T

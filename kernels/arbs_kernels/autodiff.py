"""The operators joined for differentiation: input gradients as usual, votes as the cotangent of a probe.

A *probe* is a dict of float zeros that only exists to be differentiated: `jax.grad` with respect to it returns the
integer vote of this backward contribution (as float32, exact below 2^24). Its keys choose what is collected:

- `"score"`, shape (N, R): the correlation score;
- `"gradient"`, shape (N, K): dL/dW itself, in the probe's dtype, for rules that sample it; it should not outlive the
  layer;
- `"count"`, shape (): 1 for every use of the matrix, so that repeated use counts its votes.

Only the activations and the integer leaves are saved for backward; the scale and the weight are made again there.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from arbs_kernels import float8
from arbs_kernels.codec import TRITS_PER_BYTE
from arbs_kernels.correlation_score import correlation_score, score_of_gradient, weight_gradient
from arbs_kernels.packed_matmul import packed_matmul, packed_matmul_input_gradient
from arbs_kernels.packed_matmul.prepared import joined
from arbs_kernels.row_gather import packed_row_gather, sums_of_rows
from arbs_kernels.shapes import group_count

Leaves = Mapping[str, jax.Array]
Probe = Mapping[str, jax.Array]


class ScaleLaw(Protocol):
    """How a rule reads its integer leaves; hashable and compared by value, as a frozen dataclass is."""

    def scale(self, leaves: Leaves, group_size: int) -> jax.Array:
        """Group scales `S`, float32 (..., N, R), of the leaves of one matrix."""
        ...


@dataclass(frozen=True)
class PreparedScale:
    """The law of a matrix whose scales were made once, for inference: they are the leaf "scale"."""

    def scale(self, leaves: Leaves, group_size: int) -> jax.Array:
        """See `ScaleLaw`; also as `prepared_scale` makes them."""
        del group_size
        return leaves["scale"]


@dataclass(frozen=True)
class MatmulSpec:
    """What a ternary product needs to know at trace time; hashable."""

    in_features: int
    """`K`, columns of the matrix."""
    group_size: int
    """`G`, columns that share one scale."""
    law: ScaleLaw
    """Makes the group scales from the leaves."""
    implementation: str | None = None
    """Implementation of the operators, None for the best that works."""
    float8: bool = False
    """Whether operands of products, and of the gradient that a rule samples, are rounded to float8 from
    `float8.LEAST_ROWS` rows of activations on (`arbs_kernels.float8`)."""

    def operands(self, *matrices: Leaves) -> tuple[jax.Array, jax.Array]:
        """Trits and group scales, the arguments that stand for a matrix in every operator; several matrices are one
        with the rows of all of them."""
        parts = [(leaves["trits"], self.law.scale(leaves, self.group_size)) for leaves in matrices]
        if len(parts) == 1:
            return parts[0]
        trits, scales = zip(*parts, strict=True)
        return jnp.concatenate(trits), joined(scales)

    @property
    def options(self) -> dict[str, Any]:
        """What every operator on those is told by name."""
        return {"group_size": self.group_size, "implementation": self.implementation}


def make_probe(
    kind: str, out_features: int, in_features: int, group_size: int, dtype: jnp.dtype = jnp.float32
) -> dict[str, jax.Array]:
    """Zeros whose cotangent is the vote: `kind` is "score" or "gradient"; `dtype` is that of the gradient.

    Raises:
        ValueError: another kind.
    """
    shapes = {
        "score": (out_features, group_count(in_features, group_size)),
        "gradient": (out_features, in_features),
    }
    if kind not in shapes:
        raise ValueError(f"a probe is of kind 'score' or 'gradient', got {kind!r}")
    return {
        kind: jnp.zeros(shapes[kind], dtype if kind == "gradient" else jnp.float32),
        "count": jnp.zeros((), jnp.float32),
    }


def ternary_matmul(x: jax.Array, leaves: Leaves, spec: MatmulSpec, probe: Probe | None = None) -> jax.Array:
    """`y = x W^T` for `x (..., K)` in float32 or bfloat16; differentiable in `x` and in `probe`.

    Args:
        x: activations, last axis K.
        leaves: integer state of one matrix, at least `trits` and whatever `spec.law` reads.
        spec: static description.
        probe: see the module; None collects no votes.

    Returns:
        `(..., N)` in the dtype of `x`.
    """
    return ternary_matmuls(x, [leaves], spec, [probe])[0]


def ternary_matmuls(
    x: jax.Array, matrices: Sequence[Leaves], spec: MatmulSpec, probes: Sequence[Probe | None]
) -> tuple[jax.Array, ...]:
    """`ternary_matmul` of one `x` with each of several matrices. For many rows of `x` they are one matrix, with the
    rows of all: one product forward, one for the input's gradient, one for those of the weights.

    Args:
        x: activations, last axis K.
        matrices: integer state of each.
        spec: static description, of all of them.
        probes: of each; see the module.

    Returns:
        `(..., N)` of each in the dtype of `x`.
    """
    given = tuple(None if probe is None else dict(probe) for probe in probes)
    return _matmul(spec, x, tuple(dict(leaves) for leaves in matrices), given)


def ternary_gather(
    ids: jax.Array, leaves: Leaves, spec: MatmulSpec, dtype: jnp.dtype, probe: Probe | None = None
) -> jax.Array:
    """Rows `W[ids]`, shape `(*ids.shape, K)` in `dtype`; differentiable in `probe`.

    Occurrences of one row within the call are summed before the sign is taken: they are one vote. The summed gradient
    has the shape of the table, so this is for vocabularies; tables of millions of rows probe the gathered rows.
    """
    return _gather(spec, jnp.dtype(dtype), ids, dict(leaves), None if probe is None else dict(probe))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Kinds:
    """What backward needs of a probe: keys and dtypes. Its zeros are not saved, they may have the weight's shape."""

    dtypes: tuple[tuple[str, jnp.dtype], ...]
    uses: int = 0
    """Uses of experts that a probe of factors has room for; 0 for other probes."""


def kinds_of(probe: Probe | None) -> Kinds | None:
    """What to save of a probe; None where no votes are collected."""
    if probe is None:
        return None
    uses = probe["sizes"].shape[0] if "sizes" in probe else 0
    return Kinds(tuple((name, leaf.dtype) for name, leaf in probe.items()), uses)


def _votes(
    kinds: Kinds | None,
    dy: jax.Array,
    dw: Callable[[jnp.dtype], jax.Array],
    score: Callable[[], jax.Array],
) -> dict | None:
    if kinds is None:
        return None
    # Always 1, but made from `dy`: what does not depend on mapped values `vmap` would not sum over its uses.
    collected = {"count": jnp.where(jnp.any(jnp.isnan(dy)), jnp.float32(1), jnp.float32(1))}
    dtypes = dict(kinds.dtypes)
    if "score" in dtypes:
        collected["score"] = score().astype(dtypes["score"])
    if "gradient" in dtypes:
        collected["gradient"] = dw(dtypes["gradient"])
    return {name: collected[name] for name in dtypes}


JOINED_ROWS = 64
"""Rows of activations from which on matrices of one input are joined: for fewer the copy costs more than it saves."""

_LARGE = 12 * 2**20
"""Weights from which on a matrix is decoded in its turn; between smaller ones a barrier would keep products apart that
the compiler joins."""


def in_turn(activations: Any, leaves: Any) -> tuple[Any, Any]:
    """Both as they are, the leaves of a matrix, or of several of which one is large, not before the activations.

    What is made of leaves alone, such as the decoded weight, a compiler would make ahead of its turn, for many matrices
    at once, and keep throughout a loop.
    """
    matrices = (leaves,) if isinstance(leaves, dict) else leaves
    if TRITS_PER_BYTE * max(matrix["trits"].size for matrix in matrices) < _LARGE:
        return activations, leaves
    return jax.lax.optimization_barrier((activations, leaves))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(
    spec: MatmulSpec, x: jax.Array, matrices: tuple[dict, ...], probes: tuple[dict | None, ...]
) -> tuple[jax.Array, ...]:
    x, matrices = in_turn(x, matrices)
    rows = x.reshape(-1, spec.in_features)
    if _in_float8(spec, rows):
        short = float8.rounded(rows, float8.OPERAND)
        weights = (_float8_weight(spec, leaves) for leaves in matrices)
        parts = [float8.product(short, weight, (1, 1), x.dtype, spec.implementation) for weight in weights]
    elif rows.shape[0] < JOINED_ROWS:
        parts = [packed_matmul(rows, *spec.operands(leaves), **spec.options) for leaves in matrices]
    else:
        parts = jnp.split(packed_matmul(rows, *spec.operands(*matrices), **spec.options), _ends(matrices), axis=1)
    return tuple(part.reshape(*x.shape[:-1], -1) for part in parts)


def _ends(matrices: tuple[dict, ...]) -> list[int]:
    """Where the rows of each but the last end, among those of all."""
    return list(itertools.accumulate(leaves["trits"].shape[0] for leaves in matrices[:-1]))


def _in_float8(spec: MatmulSpec, rows: jax.Array) -> bool:
    return spec.float8 and rows.shape[0] >= float8.LEAST_ROWS


def _float8_weight(spec: MatmulSpec, leaves: dict) -> float8.Float8:
    return float8.weight(*spec.operands(leaves), in_features=spec.in_features, **spec.options)


def _matmul_forward(
    spec: MatmulSpec, x: jax.Array, matrices: tuple[dict, ...], probes: tuple[dict | None, ...]
) -> tuple[tuple[jax.Array, ...], Any]:
    # `x` is kept as it came, not as rows: what several products share is then kept once.
    return _matmul(spec, x, matrices, probes), (x, matrices, tuple(map(kinds_of, probes)))


def _matmul_backward(spec: MatmulSpec, saved: Any, dys: tuple[jax.Array, ...]):
    given, matrices, kinds = saved
    x = given.reshape(-1, spec.in_features)
    parts, matrices = in_turn([dy.reshape(x.shape[0], -1).astype(x.dtype) for dy in dys], matrices)
    if x.shape[0] < JOINED_ROWS or _in_float8(spec, x):
        # Cotangents are rounded to float8 where they are made; joined, they would be written before.
        each = zip(parts, matrices, kinds, strict=True)
        backward = [_backward_of(spec, x, dy, (leaves,), (kind,)) for dy, leaves, kind in each]
        votes = tuple(votes for _, (votes,) in backward)
        dx = functools.reduce(jnp.add, (dx for dx, _ in backward))
    else:
        # Written once, by whatever makes the parts: read by two products, each would join them again.
        dy = jax.lax.optimization_barrier(jnp.concatenate(parts, axis=1))
        dx, votes = _backward_of(spec, x, dy, matrices, kinds)
    return dx.reshape(given.shape), None, votes


def _backward_of(
    spec: MatmulSpec, x: jax.Array, dy: jax.Array, matrices: tuple[dict, ...], kinds: tuple[Kinds | None, ...]
) -> tuple[jax.Array, tuple[dict | None, ...]]:
    """(cotangent of `x` (M, K), votes of each matrix) for cotangents `dy` (M, N) of matrices that are taken as one."""
    ends = _ends(matrices)
    if _in_float8(spec, x):
        short = float8.rounded(dy, float8.COTANGENT)
        (leaves,) = matrices
        dx = float8.product(short, _float8_weight(spec, leaves), (1, 0), dy.dtype, spec.implementation)

        def dw(dtype: jnp.dtype) -> jax.Array:
            return float8.product(short, float8.rounded(x, float8.OPERAND), (0, 0), dtype, spec.implementation)
    else:
        dx = packed_matmul_input_gradient(dy, *spec.operands(*matrices), in_features=spec.in_features, **spec.options)

        def dw(dtype: jnp.dtype) -> jax.Array:
            return weight_gradient(x, dy, dtype)

    @functools.cache
    def gradients(dtype: jnp.dtype) -> list[jax.Array]:
        return jnp.split(dw(dtype), ends)

    @functools.cache
    def scores() -> list[jax.Array]:
        return jnp.split(correlation_score(x, dy, spec.operands(*matrices)[0], **spec.options), ends)

    votes = tuple(
        _votes(kind, part, lambda dtype, at=at: gradients(dtype)[at], lambda at=at: scores()[at])
        for at, (kind, part) in enumerate(zip(kinds, jnp.split(dy, ends, axis=1), strict=True))
    )
    return dx, votes


_matmul.defvjp(_matmul_forward, _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(spec: MatmulSpec, dtype: jnp.dtype, ids: jax.Array, leaves: dict, probe: dict | None) -> jax.Array:
    return packed_row_gather(ids, *spec.operands(leaves), in_features=spec.in_features, dtype=dtype, **spec.options)


def _gather_forward(spec: MatmulSpec, dtype: jnp.dtype, ids: jax.Array, leaves: dict, probe: dict | None):
    return _gather(spec, dtype, ids, leaves, probe), (ids, leaves, kinds_of(probe))


def _gather_backward(spec: MatmulSpec, dtype: jnp.dtype, saved, dy: jax.Array):
    ids, leaves, kinds = saved

    def dw(dtype: jnp.dtype) -> jax.Array:
        rows = dy.reshape(-1, spec.in_features)
        return sums_of_rows(ids.reshape(-1), rows, leaves["trits"].shape[0]).astype(dtype)

    def score() -> jax.Array:
        return score_of_gradient(dw(jnp.float32), leaves["trits"], group_size=spec.group_size)

    votes = _votes(kinds, dy, dw=dw, score=score)
    return None, None, votes


_gather.defvjp(_gather_forward, _gather_backward)

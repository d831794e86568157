"""What a benchmark runs: every operator with its inputs, the dense product it stands in for, and what it must move.

The dense counterpart of a product is the same product with the weight dense in the dtype of the activations; of the
score, the bare product dW = dy^T x; of a product by expert, one batched product of equal shares of the rows; of a
gather, the same gather from a dense table; of decoding, reading and writing the dense weight once; of a latent step,
subtracting the direction from int8 latents that are not packed, which have as many bytes; of a gradient's sample,
rounding the gradient to int8; of turning bytes round, negating them.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbs_kernels.byte_transpose import api as transpose_api
from arbs_kernels.cases import CASES, EXPERT_CASES, Case
from arbs_kernels.codec import pack_rows
from arbs_kernels.correlation_score import api as score_api
from arbs_kernels.correlation_score import weight_gradient
from arbs_kernels.gradient_sample import api as sample_api
from arbs_kernels.grouped_matmul import api as grouped_api
from arbs_kernels.latent_step import api as latent_api
from arbs_kernels.packed_decode import api as decode_api
from arbs_kernels.packed_matmul import api as matmul_api
from arbs_kernels.packed_matmul.reference import precision_of
from arbs_kernels.row_gather import api as gather_api
from arbs_kernels.selection import Implementation
from arbs_kernels.timing import nbytes


@dataclass(frozen=True)
class Benchmark:
    """One operator."""

    run: Callable[..., Any]
    """Its public function."""
    implementations: Mapping[str, Implementation]
    package: str
    """Folder below `arbs_kernels`; module `<implementation>.py` may list tile candidates."""
    inputs: tuple[str, ...]
    """Names in `_MAKE`, in the order of the arguments."""
    options: Callable[[Case, Any], dict[str, Any]]
    """Keyword arguments for a shape and dtype."""
    dense: Callable[..., Any]
    dense_inputs: tuple[str, ...]
    product: bool = True
    """Whether it multiplies, `2*M*N*K` operations."""
    rows_only: bool = False
    """Whether it reads `M` rows of the tables and not all of them."""
    by_expert: bool = False
    """Whether it takes several matrices, whose inputs are stacked."""
    is_tuned: bool = True
    """Whether the tuned table decides which implementation it takes."""

    def implementations_here(self) -> list[str]:
        """Those that run on this machine."""
        return [name for name, entry in self.implementations.items() if entry.missing() is None]

    def call(
        self, case: Case, dtype: Any, implementation: str, tiles: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        """One arm: through the public function, or with other tiles than its own straight to the implementation."""
        options = self.options(case, dtype)
        if tiles is None:
            return functools.partial(self.run, **options, implementation=implementation)
        return functools.partial(self.implementations[implementation].run, **options, tiles=dict(tiles))

    def candidates(self, implementation: str) -> list[Mapping[str, Any] | None]:
        """Tiles to try: None for the implementation's own, then what its module lists."""
        try:
            module = importlib.import_module(f"arbs_kernels.{self.package}.{implementation}")
        except ModuleNotFoundError:  # "xla" lives in `reference`
            return [None]
        parameters = inspect.signature(self.implementations[implementation].run).parameters
        takes_tiles = "tiles" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return [None, *(getattr(module, "CANDIDATES", ()) if takes_tiles else ())]

    def abstract(self, case: Case, dtype: Any) -> tuple[tuple[jax.ShapeDtypeStruct, ...], Any]:
        """Inputs and result without their values."""
        inputs = jax.eval_shape(lambda: make(self.inputs, case, dtype, 0))
        return inputs, jax.eval_shape(self.call(case, dtype, "xla"), *inputs)

    def bytes_moved(self, case: Case, dtype: Any) -> int:
        """Bytes that any implementation must read or write."""
        inputs, output = self.abstract(case, dtype)
        share = min(1.0, case.rows / case.out_features) if self.rows_only else 1.0
        tables = sum(
            nbytes(array) for name, array in zip(self.inputs, inputs, strict=True) if name in ("trits", "scale")
        )
        return round(share * tables) + nbytes(inputs) - tables + nbytes(output)

    def operations(self, case: Case) -> int:
        """Multiplications and additions of the product."""
        return 2 * case.products if self.product else 0

    def cases(self) -> tuple[Case, ...]:
        """Shapes that matter to it."""
        return EXPERT_CASES if self.by_expert else CASES

    def shape(self, case: Case) -> Case:
        """The case as this operator sees it: decoding meets no activations, most meet one matrix."""
        meets_rows = not {"x", "dy", "ids", "activation_bytes"}.isdisjoint(self.inputs)
        return replace(case, rows=case.rows if meets_rows else 1, experts=case.experts if self.by_expert else 1)


def make(names: tuple[str, ...], case: Case, dtype: Any, seed: int | jax.Array) -> tuple[jax.Array, ...]:
    """Random arrays by name."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(names))
    return tuple(_MAKE[name](key, case, dtype) for name, key in zip(names, keys, strict=True))


def _packed(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    digits = jax.random.bits(key, shape, jnp.uint8) % np.uint8(3)
    return pack_rows(digits.astype(jnp.int8) - np.int8(1))


def _scale(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.exp2(jax.random.uniform(key, shape, jnp.float32, -8.0, -4.0))


def _matrix(case: Case) -> tuple[int, int]:
    return case.out_features, case.in_features


_LATENT_PLANES = 5
_MAKE: dict[str, Callable[[jax.Array, Case, Any], jax.Array]] = {
    "x": lambda key, case, dtype: jax.random.normal(key, (case.rows, case.in_features), dtype),
    "dy": lambda key, case, dtype: jax.random.normal(key, (case.rows, case.out_features), dtype),
    "direction": lambda key, case, dtype: jax.random.normal(key, _matrix(case), dtype),
    "weight": lambda key, case, dtype: jax.random.normal(key, _matrix(case), dtype),
    "ids": lambda key, case, _: jax.random.randint(key, (case.rows,), 0, case.out_features, jnp.int32),
    "trits": lambda key, case, _: _packed(key, _matrix(case)),
    "scale": lambda key, case, _: _scale(key, (case.out_features, case.groups)),
    "group_sizes": lambda _, case, __: jnp.full((case.experts,), case.rows // case.experts, jnp.int32),
    "expert_trits": lambda key, case, _: _packed(key, (case.experts, *_matrix(case))),
    "expert_scale": lambda key, case, _: _scale(key, (case.experts, case.out_features, case.groups)),
    "expert_weight": lambda key, case, dtype: jax.random.normal(key, (case.experts, *_matrix(case)), dtype),
    "residual": lambda key, case, _: _packed(key, (_LATENT_PLANES - 1, *_matrix(case))),
    "row_factors": lambda key, case, _: jax.random.uniform(key, (case.out_features,), jnp.float32, 0.5, 1.5),
    "column_factors": lambda key, case, _: jax.random.uniform(key, (case.in_features,), jnp.float32, 0.5, 1.5),
    "activation_bytes": lambda key, case, _: jax.random.bits(key, (case.rows, case.in_features), jnp.uint8),
    "latents": lambda key, case, _: jax.random.bits(key, _matrix(case), jnp.uint8).astype(jnp.int8),
    "one": lambda *_: jnp.ones((), jnp.float32),
    "word": lambda key, *_: jax.random.bits(key, (), jnp.uint32),
}


def _dot(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    contracted = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(left, right, contracted, precision=precision_of(left.dtype))


def _shares(rows: jax.Array, experts: int) -> jax.Array:
    """`(X, M/X, width)` of rows that have experts."""
    each = rows.shape[0] // experts
    return rows[: experts * each].reshape(experts, each, -1)


def _batched(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    contracted = (((axes[0],), (axes[1],)), ((0,), (0,)))
    return jax.lax.dot_general(left, right, contracted, precision=precision_of(left.dtype))


def _grouped(case: Case, _dtype: Any) -> dict[str, Any]:
    return {"group_size": case.group_size}


def _wide(case: Case, _dtype: Any) -> dict[str, Any]:
    return {"in_features": case.in_features, "group_size": case.group_size}


def _power(_case: Case, _dtype: Any) -> dict[str, Any]:
    return {"power": 2.0}


def _typed(case: Case, dtype: Any) -> dict[str, Any]:
    return {**_wide(case, dtype), "dtype": jnp.dtype(dtype)}


BENCHMARKS: dict[str, Benchmark] = {
    "packed_matmul": Benchmark(
        matmul_api.packed_matmul,
        matmul_api.FORWARD,
        "packed_matmul",
        ("x", "trits", "scale"),
        _grouped,
        lambda x, weight: _dot(x, weight, (1, 1)),
        ("x", "weight"),
    ),
    "packed_matmul_input_gradient": Benchmark(
        matmul_api.packed_matmul_input_gradient,
        matmul_api.INPUT_GRADIENT,
        "packed_matmul",
        ("dy", "trits", "scale"),
        _wide,
        lambda dy, weight: _dot(dy, weight, (1, 0)),
        ("dy", "weight"),
    ),
    "correlation_score": Benchmark(
        score_api.correlation_score,
        score_api.SCORE,
        "correlation_score",
        ("x", "dy", "trits"),
        _grouped,
        lambda x, dy: weight_gradient(x, dy, x.dtype),
        ("x", "dy"),
    ),
    "packed_decode": Benchmark(
        decode_api.packed_decode,
        decode_api.DECODE,
        "packed_decode",
        ("trits", "scale"),
        _typed,
        jnp.negative,
        ("weight",),
        product=False,
    ),
    "packed_row_gather": Benchmark(
        gather_api.packed_row_gather,
        gather_api.GATHER,
        "row_gather",
        ("ids", "trits", "scale"),
        _typed,
        lambda ids, weight: weight[ids],
        ("ids", "weight"),
        product=False,
        rows_only=True,
    ),
    "grouped_matmul": Benchmark(
        grouped_api.grouped_matmul,
        grouped_api.FORWARD,
        "grouped_matmul",
        ("x", "group_sizes", "expert_trits", "expert_scale"),
        _grouped,
        lambda x, weight: _batched(_shares(x, weight.shape[0]), weight, (2, 2)),
        ("x", "expert_weight"),
        by_expert=True,
    ),
    "grouped_matmul_input_gradient": Benchmark(
        grouped_api.grouped_matmul_input_gradient,
        grouped_api.INPUT_GRADIENT,
        "grouped_matmul",
        ("dy", "group_sizes", "expert_trits", "expert_scale"),
        _wide,
        lambda dy, weight: _batched(_shares(dy, weight.shape[0]), weight, (2, 1)),
        ("dy", "expert_weight"),
        by_expert=True,
    ),
    "grouped_score": Benchmark(
        grouped_api.grouped_score,
        grouped_api.SCORE,
        "grouped_matmul",
        ("x", "dy", "group_sizes", "expert_trits"),
        _grouped,
        lambda x, dy, sizes: _batched(_shares(dy, sizes.shape[0]), _shares(x, sizes.shape[0]), (1, 1)),
        ("x", "dy", "group_sizes"),
        by_expert=True,
    ),
    "gradient_sample": Benchmark(
        sample_api.gradient_sample,
        sample_api.SAMPLE,
        "gradient_sample",
        ("direction", "row_factors", "column_factors", "trits", "word"),
        _grouped,
        lambda gradient: jnp.round(sample_api.STEPS * gradient).astype(jnp.int8),
        ("direction",),
        product=False,
        is_tuned=False,
    ),
    "latent_step": Benchmark(
        latent_api.latent_step,
        latent_api.STEP,
        "latent_step",
        ("direction", "trits", "residual", "one", "one", "word", "word"),
        _power,
        lambda direction, latents: latents - direction.astype(jnp.int8),
        ("direction", "latents"),
        product=False,
        is_tuned=False,
    ),
    "byte_transpose": Benchmark(
        transpose_api.byte_transpose,
        transpose_api.TRANSPOSE,
        "byte_transpose",
        ("activation_bytes",),
        lambda _case, _dtype: {},
        jnp.negative,
        ("activation_bytes",),
        product=False,
        is_tuned=False,
    ),
}
"""By the name that messages and the tuned table use."""


def agree(operator: str, got: Any, expected: Any) -> bool:
    """Whether a result is that of another implementation, up to rounding and the signs of gradients near zero."""
    if operator == "byte_transpose":
        return bool(jnp.all(got == expected))
    if operator == "latent_step":  # bytes, of which a difference in rounding moves some, and counts of what they hold
        same = all(bool(jnp.mean(a != b) < 0.001) for a, b in zip(got[:2], expected[:2], strict=True))
        return same and bool(jnp.max(jnp.abs(got[2] - expected[2])) <= 0.001 * got[0].size)
    if operator == "gradient_sample":
        same = bool(jnp.mean(got[0] != expected[0]) < 0.001)
        return same and bool(jnp.max(jnp.abs(got[1] - expected[1])) <= 1e-4 * jnp.max(jnp.abs(expected[1])))
    got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
    difference = jnp.abs(got - expected)
    if operator in ("correlation_score", "grouped_score"):
        return bool(jnp.mean(difference) < 0.01)
    return bool(jnp.max(difference) <= 0.02 * jnp.max(jnp.abs(expected)))

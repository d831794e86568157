"""What a benchmark runs: every operator with its inputs, the dense product it stands in for, and what it must move.

The dense counterpart of a product is the same product with the weight dense in the dtype of the activations; of the
score, the bare product dW = dy^T x; of a gather, the same gather from a dense table; of decoding, reading and writing
the dense weight once.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbs_kernels.cases import Case
from arbs_kernels.codec import pack_rows
from arbs_kernels.correlation_score import api as score_api
from arbs_kernels.correlation_score import weight_gradient
from arbs_kernels.packed_decode import api as decode_api
from arbs_kernels.packed_matmul import api as matmul_api
from arbs_kernels.packed_matmul.reference import precision_of
from arbs_kernels.row_gather import api as gather_api
from arbs_kernels.selection import Implementation
from arbs_kernels.timing import nbytes


@dataclass(frozen=True)
class Benchmark:
    """One operator."""

    run: Callable[..., jax.Array]
    """Its public function."""
    implementations: Mapping[str, Implementation]
    package: str
    """Folder below `arbs_kernels`; module `<implementation>.py` may list tile candidates."""
    inputs: tuple[str, ...]
    """Names in `_MAKE`, in the order of the arguments."""
    options: Callable[[Case, Any], dict[str, Any]]
    """Keyword arguments for a shape and dtype."""
    dense: Callable[..., jax.Array]
    dense_inputs: tuple[str, ...]
    product: bool = True
    """Whether it multiplies, `2*M*N*K` operations."""
    rows_only: bool = False
    """Whether it reads `M` rows of the tables and not all of them."""

    def implementations_here(self) -> list[str]:
        """Those that run on this machine."""
        return [name for name, entry in self.implementations.items() if entry.missing() is None]

    def call(
        self, case: Case, dtype: Any, implementation: str, tiles: Mapping[str, Any] | None = None
    ) -> Callable[..., jax.Array]:
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

    def abstract(self, case: Case, dtype: Any) -> tuple[tuple[jax.ShapeDtypeStruct, ...], jax.ShapeDtypeStruct]:
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

    def shape(self, case: Case) -> Case:
        """The case as this operator sees it: decoding meets no activations."""
        return case if "x" in self.inputs or "dy" in self.inputs or "ids" in self.inputs else _without_rows(case)


def make(names: tuple[str, ...], case: Case, dtype: Any, seed: int | jax.Array) -> tuple[jax.Array, ...]:
    """Random arrays by name."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(names))
    return tuple(_MAKE[name](key, case, dtype) for name, key in zip(names, keys, strict=True))


def _trits(key: jax.Array, case: Case, _dtype: Any) -> jax.Array:
    digits = jax.random.bits(key, (case.out_features, case.in_features), jnp.uint8) % np.uint8(3)
    return pack_rows(digits.astype(jnp.int8) - np.int8(1))


def _scale(key: jax.Array, case: Case, _dtype: Any) -> jax.Array:
    return jnp.exp2(jax.random.uniform(key, (case.out_features, case.groups), jnp.float32, -8.0, -4.0))


_MAKE: dict[str, Callable[[jax.Array, Case, Any], jax.Array]] = {
    "x": lambda key, case, dtype: jax.random.normal(key, (case.rows, case.in_features), dtype),
    "dy": lambda key, case, dtype: jax.random.normal(key, (case.rows, case.out_features), dtype),
    "weight": lambda key, case, dtype: jax.random.normal(key, (case.out_features, case.in_features), dtype),
    "ids": lambda key, case, _: jax.random.randint(key, (case.rows,), 0, case.out_features, jnp.int32),
    "trits": _trits,
    "scale": _scale,
}


def _without_rows(case: Case) -> Case:
    return Case(1, case.out_features, case.in_features, case.group_size, case.why)


def _dot(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    contracted = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(left, right, contracted, precision=precision_of(left.dtype))


def _grouped(case: Case, _dtype: Any) -> dict[str, Any]:
    return {"group_size": case.group_size}


def _wide(case: Case, _dtype: Any) -> dict[str, Any]:
    return {"in_features": case.in_features, "group_size": case.group_size}


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
}
"""By the name that messages and the tuned table use."""


def agree(operator: str, got: jax.Array, expected: jax.Array) -> bool:
    """Whether a result is that of another implementation, up to rounding and the signs of gradients near zero."""
    got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
    difference = jnp.abs(got - expected)
    if operator == "correlation_score":
        return bool(jnp.mean(difference) < 0.01)
    return bool(jnp.max(difference) <= 0.02 * jnp.max(jnp.abs(expected)))

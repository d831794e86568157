"""Triton kernels compile for the GPUs that they are meant for, on a machine that has none."""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from arbs_kernels import triton_launch
from arbs_kernels.benchmarks import BENCHMARKS, make
from arbs_kernels.cases import Case
from arbs_kernels.codec import packed_width
from arbs_kernels.gram_newton_schulz import gram_newton_schulz
from arbs_kernels.grouped_matmul import grouped_weight_gradient
from arbs_kernels.packed_decode import packed_decode
from arbs_kernels.shapes import group_count
from arbs_kernels.triton_launch import Compiled

pytest.importorskip("triton")

SHARED_KIB = {8.0: 163, 8.6: 99, 9.0: 227}
"""Shared memory that a program may have, by compute capability; that of Ada, 8.9, is as that of 8.6."""
WORK = {
    "packed_decode": (Case(1, 64, 1280, 32, "chunks"), Case(1, 33, 70, 32, "elements")),
    "packed_matmul": (
        Case(1, 640, 1280, 32, "one row"),
        Case(2, 640, 1280, 16, "two rows, short groups"),
        Case(16, 640, 1280, 32, "sixteen rows"),
        Case(40, 130, 1003, 32, "rows that begin anywhere"),
    ),
    "packed_matmul_input_gradient": (Case(128, 64, 1280, 32, "through the weight"),),
    "correlation_score": (Case(512, 256, 1280, 32, "large tiles"),),
    "packed_row_gather": (Case(9, 40, 96, 12, "rows"),),
    "grouped_matmul": (
        Case(32, 64, 160, 32, "few rows an expert", experts=16),
        Case(512, 128, 512, 32, "many", experts=4),
    ),
    "grouped_matmul_input_gradient": (Case(512, 128, 512, 32, "many", experts=4),),
    "grouped_score": (Case(512, 128, 512, 32, "many", experts=4),),
    "gradient_sample": (Case(1, 33, 70, 12, "groups that are no power of two"),),
    "latent_step": (Case(1, 33, 300, 32, "five planes"),),
    "byte_transpose": (Case(132, 1, 260, 32, "words"), Case(33, 1, 70, 32, "bytes")),
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """What is launched, as it is compiled."""
    found: list[Compiled] = []
    compiled = triton_launch.compiled

    def kept(*arguments: object) -> Compiled:
        found.append(compiled(*arguments))
        return found[-1]

    monkeypatch.setattr(triton_launch, "compiled", kept)
    return found


@pytest.fixture(params=SHARED_KIB)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """What whoever asks takes the device's compute capability to be."""
    for name, module in list(sys.modules.items()):
        if name.startswith("arbs_kernels") and hasattr(module, "compute_capability"):
            monkeypatch.setattr(module, "compute_capability", lambda: request.param)
    return request.param


def check(made: list[Compiled], capability: float) -> None:
    """Kernels were made, and are for such a GPU."""
    assert made
    for kernel in made:
        assert re.search(rf"\.version 8\.0\n\.target sm_{round(10 * capability)}a?\b", kernel.ptx)
        assert kernel.shared_bytes <= SHARED_KIB[capability] * 1024
        # A small amount is the kernel's own; what is asked for at the launch is more than that.
        assert kernel.shared_bytes == 0 or kernel.shared_bytes > 48 * 1024
        assert (".extern .shared" in kernel.ptx) == (kernel.shared_bytes > 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "case"), [(name, case) for name, cases in WORK.items() for case in cases], ids=str
)
def test_compiles_for(operator: str, case: Case, capability: float, made: list[Compiled]):
    benchmark, dtype = BENCHMARKS[operator], jnp.dtype(jnp.bfloat16)
    inputs = jax.eval_shape(lambda: make(benchmark.inputs, case, dtype, 0))
    expected = jax.eval_shape(benchmark.call(case, dtype, "xla"), *inputs)
    assert jax.eval_shape(benchmark.call(case, dtype, "triton"), *inputs) == expected
    check(made, capability)


@pytest.mark.slow
@pytest.mark.parametrize("in_features", [1280, 70])
def test_decoding_to_float8_compiles_for(in_features: int, capability: float, made: list[Compiled]):
    trits = jax.ShapeDtypeStruct((33, packed_width(in_features)), jnp.uint8)
    scale = jax.ShapeDtypeStruct((33, group_count(in_features, 32)), jnp.float32)
    static = {"in_features": in_features, "group_size": 32, "dtype": jnp.dtype(jnp.float8_e4m3fn)}
    found = jax.eval_shape(partial(packed_decode, implementation="triton", **static), trits, scale)
    assert (found.shape, found.dtype) == ((33, in_features), static["dtype"])
    check(made, capability)


@pytest.mark.slow
def test_gradients_by_expert_compile_for(capability: float, made: list[Compiled]):
    x, dy = jax.ShapeDtypeStruct((512, 160), jnp.bfloat16), jax.ShapeDtypeStruct((512, 64), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    found = jax.eval_shape(partial(grouped_weight_gradient, implementation="triton"), x, dy, sizes)
    assert (found.shape, found.dtype) == ((4, 64, 160), jnp.float32)
    check(made, capability)


@pytest.mark.slow
@pytest.mark.parametrize(("R", "ridge"), [(8, 1e-6), (64, 1e-6), (40, 0.0)])
def test_iterations_on_a_gram_matrix_compile_for(R: int, ridge: float, capability: float, made: list[Compiled]):
    gram = jax.ShapeDtypeStruct((24, R, R), jnp.float32)
    iterate = partial(gram_newton_schulz, coefficients=((1.5, -0.5, 0.0),) * 4, ridge=ridge, implementation="triton")
    found = jax.eval_shape(jax.vmap(iterate), gram)
    assert (found.shape, found.dtype) == ((24, R, R), jnp.float32)
    check(made, capability)

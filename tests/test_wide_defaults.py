"""64-bit defaults (`JAX_ENABLE_X64`) change what Python numbers become inside traced code, and must change nothing."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from support import assert_trees_equal

from arbs_jax.config import RunConfig, TrainConfig
from arbs_jax.models.byte_lm import ModelConfig
from arbs_jax.rules import RuleConfig, default_group_size
from arbs_jax.training.program import Program
from arbs_kernels import backends
from arbs_kernels.benchmarks import BENCHMARKS, make
from arbs_kernels.cases import Case

MODEL = ModelConfig(width=20, layers=2, heads=2, kv_heads=2, head_dim=10, hidden=20, context=16, tied=True)
"""Matrices of two shapes, so that little is compiled."""
OPERATORS = [(name, "xla", dtype) for name in BENCHMARKS for dtype in ("float32", "bfloat16")]
OPERATORS.append(("correlation_score", "mosaic_gpu", "bfloat16"))


@contextlib.contextmanager
def defaults(wide: bool) -> Iterator[None]:
    """For all threads: simulated kernels have threads of their own."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", wide)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize(("operator", "implementation", "dtype"), OPERATORS)
def test_operators_give_the_same(operator: str, implementation: str, dtype: str):
    benchmark = BENCHMARKS[operator]
    case = benchmark.shape(Case(9, 33, 70, 32, "odd everywhere", experts=3))
    inputs = make(benchmark.inputs, case, dtype, 7)
    results = []
    for wide in (False, True):
        simulated = contextlib.nullcontext() if implementation == "xla" else backends.interpreted()
        with defaults(wide), simulated:
            results.append(jax.jit(benchmark.call(case, dtype, implementation))(*inputs))
    assert_trees_equal(*results)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["bigint", "integral", "latent10"])
def test_a_fresh_state_and_a_step_are_the_same(rule: str):
    def run(wide: bool) -> list[Any]:
        config = RunConfig(
            preset="byte-0.4m",
            model=MODEL,
            group_size=default_group_size(rule),
            rule=RuleConfig(rule),
            train=TrainConfig(steps=8, batch=2, context=12, accum=2),
        )
        tokens = np.random.default_rng(3).integers(0, 256, (2, 2, 13), np.uint8)
        with defaults(wide):
            program = Program(config)
            state = program.init_state()
            fresh = jax.tree.map(np.asarray, state.persistent())
            state, metrics = program.step(state, tokens)
            return jax.tree.map(np.asarray, [fresh, state.persistent(), metrics])

    narrow, wide = run(False), run(True)
    assert_trees_equal(narrow, wide)
    fresh, moved, metrics = narrow
    assert int(moved["step"]) == int(fresh["step"]) + 1
    assert np.isfinite(metrics["loss"])
    assert all(np.asarray(leaf).dtype != np.float64 for leaf in jax.tree.leaves(wide))

"""Large matrices move one after another."""

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.state import BASE_LEAVES, MatrixSpec
from arbs_jax.training import matrices


def test_large_matrices_wait_for_one_another_and_small_ones_do_not(monkeypatch):
    monkeypatch.setattr(matrices, "MOST_TOGETHER", 100)
    specs = {f"{size}/{name}": MatrixSpec(4, width) for size, width in (("small", 8), ("large", 32)) for name in "abc"}
    ternary = {size: {name: dict.fromkeys(BASE_LEAVES, jnp.full((4,), at)) for at, name in enumerate("abc")}
               for size in ("small", "large")}  # fmt: skip
    found = jax.tree.map(lambda leaf: leaf + 1, ternary)

    def move(spec, matrix, found):
        return found["corr"] * spec.in_features

    def run(found):
        return matrices.together(move, specs, "", ternary, found)

    moved = run(found)
    for size, width in (("small", 8), ("large", 32)):
        for at, name in enumerate("abc"):
            np.testing.assert_array_equal(moved[size][name], np.full((4,), (at + 1) * width))
    barriers = [line for line in str(jax.make_jaxpr(run)(found)).splitlines() if "optimization_barrier" in line]
    assert len(barriers) == 2

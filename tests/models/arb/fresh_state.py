"""Fresh ternary state without compiling anything: what `init` would make, with uniform trits drawn by NumPy."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from support import int64

from arbs_jax import matrix_specs
from arbs_jax.layers import COLLECTION
from arbs_jax.state import flatten_specs, map_matrices


def fresh(module: nn.Module, *inputs: Any, seed: int = 0) -> tuple[dict[str, Any], Any]:
    """(variables, specs) of a module whose rule has no leaves of its own and whose columns come in fives."""
    specs = matrix_specs(module, *inputs)
    by_path, rng = flatten_specs(specs), np.random.default_rng(seed)

    def matrix(path: str, shapes: Any) -> dict[str, jax.Array]:
        spec = by_path[path]
        assert spec.in_features % 5 == 0, f"{path} would have padding"
        exponent = round(math.log2(1 / math.sqrt(spec.in_features)))
        return {
            "trits": jnp.asarray(rng.integers(0, 3**5, shapes["trits"].shape), jnp.uint8),
            "exponent": jnp.asarray(np.full(shapes["exponent"].shape, exponent), jnp.int8),
            "corr": int64(np.zeros(shapes["corr"].shape)),
            "votes": int64(np.zeros(shapes["votes"].shape)),
        }

    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)[COLLECTION]
    return {COLLECTION: map_matrices(matrix, shapes)}, specs

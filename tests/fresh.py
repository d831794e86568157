"""Fresh ternary state drawn in NumPy: of all programs of a test, a module's `init` would take longest to compile."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax import matrix_specs
from arbs_jax.layers import COLLECTION
from arbs_jax.state import InitConfig, flatten_specs, map_matrices


def fresh(module: nn.Module, *inputs: Any, seed: int = 5, **kwargs: Any) -> tuple[dict[str, Any], Any]:
    """(variables with the leaves that `module.init` makes, specs); trits are uniform, leaves of a rule's own zero."""
    specs = matrix_specs(module, *inputs, **kwargs)
    by_path, rng = flatten_specs(specs), np.random.default_rng(seed)

    def matrix(path: str, shapes: Any) -> dict[str, jax.Array]:
        spec, stacked = by_path[path], shapes["trits"].shape[:-2]
        exponent = InitConfig().exponent(spec.fan_in or spec.in_features)
        drawn = {
            "trits": pack_in_numpy(rng.integers(-1, 2, (*stacked, *spec.shape))),
            "exponent": np.full(shapes["exponent"].shape, exponent, np.int8),
        }
        # From NumPy's int64 a transfer would make int32, unless told.
        return {
            name: jnp.asarray(drawn.get(name, np.zeros(leaf.shape, leaf.dtype)), dtype=leaf.dtype)
            for name, leaf in shapes.items()
        }

    shapes = jax.eval_shape(lambda *arrays: module.init(jax.random.key(0), *arrays, **kwargs), *inputs)
    return {COLLECTION: map_matrices(matrix, shapes[COLLECTION])}, specs


def packed_bytes(columns: int) -> int:
    """Of a packed row: five columns to a byte, and 32 bytes to a unit where there are 2048 columns or more."""
    width = -(-columns // 5)
    return -(-width // 32) * 32 if columns >= 2048 else width


def pack_in_numpy(trits: np.ndarray) -> np.ndarray:
    """`arbs_kernels.codec.pack_rows`."""
    width = packed_bytes(trits.shape[-1])
    padded = np.pad(trits, [(0, 0)] * (trits.ndim - 1) + [(0, 5 * width - trits.shape[-1])])
    value = (padded.reshape(*trits.shape[:-1], 5, width) + 1) * np.array([81, 27, 9, 3, 1])[:, None]
    return (-(-value.sum(axis=-2) * 256 // 243)).astype(np.uint8)

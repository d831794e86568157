"""What the tests of the ARB model's parts share: a module with fresh state, and its votes."""

from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax import Integral, TernaryConfig, matrix_specs, value_and_votes
from arbs_jax.state import InitConfig, flatten_specs, map_matrices

TERNARY = TernaryConfig(rule=Integral(), group_size=8)
# Float sums of equal terms in another order: a few dozen operations deep, values of order one.
RELATIVE = 200 * 2.0**-24


# Compiling is what takes time here.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed: int, *shape: int) -> np.ndarray:
    """float32 normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got, expected):
    """Equal but for rounding."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=RELATIVE * np.abs(expected).max())


def influence_of(function, x: np.ndarray) -> np.ndarray:
    """bool (S, S): whether each output position of `(B, S, D) -> (B, S, D)` depends on each input position, by the
    gradient."""

    def by_position(x):
        return jnp.sum(function(x), axis=(0, 2))

    gradient = np.asarray(quick_jit(jax.jacrev(by_position))(x))
    assert np.isfinite(gradient).all()
    return np.abs(gradient).max(axis=(1, 3)) != 0


def fresh_state(module, specs, *inputs):
    """Random variables with the leaves that `module.init` makes, drawn in NumPy: inits take longest to compile."""
    rng = np.random.default_rng(5)
    by_path = flatten_specs(specs)

    def draw(path: str, shapes: dict) -> dict[str, np.ndarray]:
        spec, layers = by_path[path], shapes["votes"].shape
        exponent = InitConfig().exponent(spec.fan_in or spec.in_features)
        return {
            "trits": pack_in_numpy(rng.integers(-1, 2, (*layers, *spec.shape))),
            "exponent": np.full(shapes["exponent"].shape, exponent, np.int8),
        }

    @quick_jit  # The int64 leaves are made inside: NumPy's would be narrowed on the way in.
    def complete(drawn):
        def whole(path: str, shapes: dict, own: dict) -> dict[str, jax.Array]:
            return {
                name: own[name] if name in own else jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()
            }

        return map_matrices(whole, shapes, drawn)

    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["ternary"]
    return {"ternary": complete(map_matrices(draw, shapes))}


def pack_in_numpy(trits: np.ndarray) -> np.ndarray:
    """`arbs_kernels.codec.pack_rows`."""
    width = -(-trits.shape[-1] // 5)
    padded = np.pad(trits, [(0, 0)] * (trits.ndim - 1) + [(0, 5 * width - trits.shape[-1])])
    value = (padded.reshape(*trits.shape[:-1], 5, width) + 1) * np.array([81, 27, 9, 3, 1])[:, None]
    return (-(-value.sum(axis=-2) * 256 // 243)).astype(np.uint8)


class Built:
    """A module with fresh variables, made by a call with `inputs`; its forward pass compiled when first asked for."""

    def __init__(self, module, *inputs):
        self.module, self.inputs = module, inputs
        self.specs = matrix_specs(module, *inputs)
        self.variables = fresh_state(module, self.specs, *inputs)
        self.apply = quick_jit(module.apply)

    @cached_property
    def output(self):
        return self.apply(self.variables, *self.inputs)

    def votes(self, *inputs):
        """Votes of a loss in which every output counts differently."""

        def loss(variables):
            outputs = jax.tree.leaves(self.module.apply(variables, *inputs))
            floats = [leaf for leaf in outputs if jnp.issubdtype(leaf.dtype, jnp.floating)]
            return sum(jnp.sum(leaf * normal(7, *leaf.shape)) for leaf in floats)

        run = quick_jit(value_and_votes(loss, TERNARY.rule, self.specs))
        return run(self.variables["ternary"])[1]

    def assert_every_matrix_votes_once(self, *inputs):
        """In every layer of a stack, and with something to say; `inputs` other than those of the first call, if any."""
        votes = self.votes(*(inputs or self.inputs))
        for path in flatten_specs(self.specs):
            node = votes
            for name in path.split("/"):
                node = node[name]
            np.testing.assert_array_equal(node["count"], 1, path)
            assert (np.asarray(node["score"]) != 0).any(axis=(-2, -1)).all(), path

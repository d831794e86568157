"""The packed product and its input gradient against NumPy in float64, for every implementation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import activations, product_bound, random_matrix

from arbs_kernels import backends
from arbs_kernels.cases import SMALL_CASES
from arbs_kernels.packed_matmul import packed_matmul, packed_matmul_input_gradient
from arbs_kernels.selection import UnsupportedError
from arbs_kernels.shapes import GROUP_SIZES

DTYPES = ("float32", "bfloat16")


def assert_within(got, expected, bound):
    np.testing.assert_array_less(np.abs(np.asarray(got).astype(np.float64) - expected), bound + 1e-30)


def test_the_shapes_cover_every_group_size():
    assert {case.group_size for case in SMALL_CASES} == set(GROUP_SIZES)


class PackedMatmul:
    """What holds for every implementation; a backend adds a subclass that names it."""

    implementation: str

    def run(self, x, dy, matrix, group_size):
        """(y, dx), compiled together; None in place of an argument leaves its result out."""

        def both(x, dy, trits, scale):
            static = {"group_size": group_size, "implementation": self.implementation}
            y = None if x is None else packed_matmul(x, trits, scale, **static)
            if dy is None:
                return y, None
            return y, packed_matmul_input_gradient(dy, trits, scale, in_features=matrix.in_features, **static)

        return jax.jit(both)(x, dy, matrix.trits, matrix.scale)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", SMALL_CASES, ids=str)
    def test_products(self, case, dtype):
        rng = np.random.default_rng([1, case.products])
        matrix = random_matrix(rng, case.out_features, case.in_features, case.group_size)
        x, exact_x = activations(rng, (case.rows, case.in_features), dtype)
        dy, exact_dy = activations(rng, (case.rows, case.out_features), dtype)
        y, dx = self.run(x, dy, matrix, case.group_size)
        assert y.dtype == dx.dtype == dtype
        assert_within(y, exact_x @ matrix.weight.T, product_bound(exact_x, matrix.weight.T, dtype))
        assert_within(dx, exact_dy @ matrix.weight, product_bound(exact_dy, matrix.weight, dtype))

    def test_the_identity_yields_the_weight_exactly(self):
        """No precision is lost in decoding, float32 operands are not shortened on the way."""
        matrix = random_matrix(np.random.default_rng(3), 24, 40, 12)
        y, dx = self.run(np.eye(40, dtype=np.float32), np.eye(24, dtype=np.float32), matrix, 12)
        np.testing.assert_array_equal(y, matrix.weight.T.astype(np.float32), strict=True)
        np.testing.assert_array_equal(dx, matrix.weight.astype(np.float32), strict=True)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_powers_of_two_and_small_integers_are_exact(self, dtype):
        rng = np.random.default_rng(4)
        matrix = random_matrix(rng, 19, 21, 8)
        exponent = rng.integers(-2, 2, matrix.scale.shape)
        matrix = replace(matrix, scale=jnp.asarray(2.0**exponent, jnp.float32))
        weight = matrix.dense_trits * 2.0 ** exponent[:, np.arange(21) // 8]
        # Sums in quarters, up to 4 columns of 2 * 2: they fit bfloat16's 8 bits.
        x = np.zeros((5, 21))
        x[:, ::6] = rng.integers(-2, 3, (5, 4))
        y, _ = self.run(jnp.asarray(x, dtype), None, matrix, 8)
        np.testing.assert_array_equal(np.asarray(y).astype(np.float64), x @ weight.T)

    def test_what_packing_pads_adds_nothing(self):
        """A row of 6 columns has 4 unused digits, and its last group 2 unused columns: neither meets the next row."""
        matrix = random_matrix(np.random.default_rng(5), 4, 6, 4)
        x = jnp.ones((1, 6), jnp.float32)
        whole, _ = self.run(x, None, matrix, 4)
        for row in range(4):
            only = replace(matrix, trits=matrix.trits[row : row + 1], scale=matrix.scale[row : row + 1])
            np.testing.assert_array_equal(self.run(x, None, only, 4)[0], whole[:, row : row + 1])


class TestXla(PackedMatmul):
    implementation = "xla"


@pytest.mark.skipif(backends.triton_missing() is not None, reason=f"needs {backends.triton_missing()}")
class TestTriton(PackedMatmul):
    implementation = "triton"


def arguments(**changes):
    plain = {
        "x": jnp.ones((2, 10), jnp.float32),
        "trits": jnp.zeros((3, 2), jnp.uint8),
        "scale": jnp.ones((3, 2), jnp.float32),
        "group_size": 8,
    }
    return plain | changes


WRONG = {
    "float16 activations": ({"x": jnp.ones((2, 10), jnp.float16)}, "x must be float32 or bfloat16, got float16"),
    "integer activations": ({"x": jnp.ones((2, 10), jnp.int32)}, "x must be float32 or bfloat16, got int32"),
    "activations of rank 1": ({"x": jnp.ones((10,), jnp.float32)}, r"x must have shape \(M, 10\), got \(10,\)"),
    "another width": (
        {"x": jnp.ones((2, 11), jnp.float32)},
        r"trits must be uint8 \(N, 3\) for in_features=11, got uint8 \(3, 2\)",
    ),
    "signed trits": ({"trits": jnp.zeros((3, 2), jnp.int8)}, r"trits must be uint8 .* got int8 \(3, 2\)"),
    "stacked trits": ({"trits": jnp.zeros((1, 3, 2), jnp.uint8)}, r"trits must be .* got uint8 \(1, 3, 2\)"),
    "another number of groups": (
        {"scale": jnp.ones((3, 3), jnp.float32)},
        r"scale must be float32 \(3, 2\), got float32 \(3, 3\)",
    ),
    "another number of rows": ({"scale": jnp.ones((4, 2), jnp.float32)}, r"scale must be .* got float32 \(4, 2\)"),
    "a short scale": ({"scale": jnp.ones((3, 2), jnp.bfloat16)}, r"scale must be float32 .* got bfloat16"),
    "an odd group size": ({"group_size": 5}, r"group_size must be one of \(4, .*\), got 5"),
    "no group size": ({"group_size": 0}, "group_size must be one of .*, got 0"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_forward_refuses(changes, message):
    with pytest.raises(ValueError, match="packed_matmul: " + message):
        packed_matmul(**arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dy": jnp.ones((2, 4), jnp.float32)}, r"dy must have shape \(M, 3\), got \(2, 4\)"),
        ({"dy": jnp.ones((2, 3), jnp.int8)}, "dy must be float32 or bfloat16, got int8"),
        ({"in_features": 11}, r"trits must be uint8 \(N, 3\) for in_features=11"),
        ({"in_features": 0}, "in_features must be at least 1, got 0"),
        ({"group_size": 33}, "group_size must be one of .*, got 33"),
    ],
)
def test_input_gradient_refuses(changes, message):
    given = {"dy": jnp.ones((2, 3), jnp.float32), "in_features": 10} | arguments() | changes
    del given["x"]
    with pytest.raises(ValueError, match="packed_matmul_input_gradient: " + message):
        packed_matmul_input_gradient(**given)


def test_an_unknown_implementation_is_an_error_that_lists_the_known():
    with pytest.raises(UnsupportedError, match=r"packed_matmul has no implementation 'abacus'; pass one of .*xla"):
        packed_matmul(**arguments(implementation="abacus"))
    given = arguments(implementation="abacus", in_features=10)
    given["dy"] = given.pop("x")
    with pytest.raises(UnsupportedError, match=r"packed_matmul_input_gradient has no implementation 'abacus'"):
        packed_matmul_input_gradient(**given)

"""The packed product and its input gradient against NumPy in float64, for every implementation."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import activations, product_bound, random_matrix

from arbs_kernels import backends
from arbs_kernels.cases import SMALL_CASES, Case
from arbs_kernels.packed_matmul import mosaic_gpu, packed_matmul, packed_matmul_input_gradient
from arbs_kernels.packed_matmul.prepared import prepared_scale
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

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [1, 20, 70])
    def test_scales_that_were_prepared(self, rows, dtype):
        """They are rounded to bfloat16, and then multiply as others do."""
        rng = np.random.default_rng(10)
        matrix = random_matrix(rng, 48, 640, 32)
        rounded = matrix.scale.astype(jnp.bfloat16)
        weight = matrix.dense_trits * np.repeat(np.asarray(rounded, np.float64), 32, axis=1)
        x, exact_x = activations(rng, (rows, 640), dtype)
        prepared = replace(matrix, scale=prepared_scale(matrix.scale))
        y, _ = self.run(x, None, prepared, 32)
        assert_within(y, exact_x @ weight.T, product_bound(exact_x, weight.T, dtype))

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


WINDOWS = (
    Case(1, 16, 160, 32, "one window, one tile"),
    Case(1, 34, 2056, 96, "columns past the last, programs that share rows, groups that cross planes"),
    Case(1, 80, 3200, 256, "more windows than warps"),
    Case(1, 2146, 640, 64, "two tiles of sixteen rows a program"),
    Case(1, 4240, 160, 32, "eight warps"),
    Case(1, 8466, 320, 32, "eight warps, two tiles"),
    Case(2, 34, 2056, 96, "two rows, columns past the last"),
    Case(8, 2146, 640, 32, "eight rows, two tiles a program"),
    Case(9, 80, 3200, 256, "one row more than the tensor core takes"),
    Case(16, 4240, 160, 64, "most rows, four tiles a program"),
    Case(3, 12690, 160, 32, "four warps"),
    Case(1, 33, 640, 32, "an odd number of rows"),
    Case(3, 8, 640, 32, "less than a tile of rows"),
    Case(1, 32, 636, 32, "columns that are no multiple of eight"),
    Case(17, 48, 640, 32, "too many rows"),
)
"""What the kernel for whole windows takes, and close to it."""


@pytest.mark.skipif(backends.triton_missing() is not None, reason=f"needs {backends.triton_missing()}")
class TestTriton(PackedMatmul):
    implementation = "triton"

    @pytest.mark.parametrize("case", WINDOWS, ids=str)
    def test_whole_windows(self, case):
        rng = np.random.default_rng([1, case.products])
        matrix = random_matrix(rng, case.out_features, case.in_features, case.group_size)
        x, exact_x = activations(rng, (case.rows, case.in_features), "bfloat16")
        y, _ = self.run(x, None, matrix, case.group_size)
        assert_within(y, exact_x @ matrix.weight.T, product_bound(exact_x, matrix.weight.T, "bfloat16"))

    @pytest.mark.parametrize("rows", [1, 3])
    def test_zeros_and_infinities(self, rows):
        """Whatever is beside a row adds nothing to it; what is no number is not lost, and stays with its row of x."""
        matrix = random_matrix(np.random.default_rng(8), 48, 2056, 32)
        zeros = jnp.zeros((rows, 2056), jnp.bfloat16)
        y, _ = self.run(zeros, None, matrix, 32)
        np.testing.assert_array_equal(np.asarray(y).astype(np.float32), 0)
        y, _ = self.run(zeros.at[0, 2055].set(jnp.inf), None, matrix, 32)
        y = np.asarray(y).astype(np.float32)
        assert not np.isfinite(y[0]).any()
        np.testing.assert_array_equal(y[1:], 0)


FEW_ROWS = (
    Case(1, 64, 320, 32, "two runs of one warpgroup"),
    Case(5, 24, 2053, 32, "an odd number of runs, columns past the last"),
    Case(9, 192, 640, 64, "groups of two runs"),
    Case(16, 136, 1280, 256, "groups of many runs, rows past the last"),
    Case(64, 136, 480, 96, "groups that cross from one plane into the next, most rows of x"),
)


@pytest.mark.usefixtures("simulated")
class TestMosaicGpu:
    """Few rows of bfloat16 alone; on Hopper as it is, simulated on a CPU."""

    def run(self, x, matrix, group_size):
        product = partial(packed_matmul, group_size=group_size, implementation="mosaic_gpu")
        return jax.jit(product)(jnp.asarray(x, jnp.bfloat16), matrix.trits, matrix.scale)

    @pytest.mark.parametrize("case", FEW_ROWS, ids=str)
    def test_products(self, case):
        rng = np.random.default_rng([1, case.products])
        matrix = random_matrix(rng, case.out_features, case.in_features, case.group_size)
        x, exact_x = activations(rng, (case.rows, case.in_features), "bfloat16")
        y = self.run(x, matrix, case.group_size)
        assert y.dtype == jnp.bfloat16
        assert_within(y, exact_x @ matrix.weight.T, product_bound(exact_x, matrix.weight.T, "bfloat16"))

    @pytest.mark.parametrize("warpgroups", [2, 3])
    def test_warpgroups_share_a_block(self, warpgroups):
        rng = np.random.default_rng(9)
        matrix = random_matrix(rng, 200, 640, 32)
        x, exact_x = activations(rng, (8, 640), "bfloat16")
        cut = mosaic_gpu.cut_with(warpgroups, 200, matrix.trits.shape[1], 8)
        product = partial(mosaic_gpu.few_rows, group_size=32, cut=cut)
        y = jax.jit(product)(x, matrix.trits, prepared_scale(matrix.scale))
        assert_within(y, exact_x @ matrix.weight.T, product_bound(exact_x, matrix.weight.T, "bfloat16"))

    def test_the_identity_yields_the_weight(self):
        """Every weight is where it belongs, rounded to bfloat16."""
        matrix = random_matrix(np.random.default_rng(3), 8, 160, 32)
        rows = [self.run(x, matrix, 32) for x in np.split(np.eye(160), 4)]
        np.testing.assert_array_equal(np.concatenate(rows), matrix.weight.T.astype(jnp.bfloat16), strict=True)

    def test_mapped(self):
        rng = np.random.default_rng(6)
        matrices = [random_matrix(rng, 8, 160, 32) for _ in range(2)]
        x, exact_x = activations(rng, (2, 3, 160), "bfloat16")
        stacked = [jnp.stack([getattr(matrix, name) for matrix in matrices]) for name in ("trits", "scale")]
        y = jax.vmap(partial(packed_matmul, group_size=32, implementation="mosaic_gpu"))(x, *stacked)
        for one, exact, matrix in zip(y, exact_x, matrices, strict=True):
            assert_within(one, exact @ matrix.weight.T, product_bound(exact, matrix.weight.T, "bfloat16"))

    @pytest.mark.parametrize(
        ("rows", "shape", "group_size", "dtype", "message"),
        [
            (1, (8, 160), 32, "float32", "takes bfloat16, got float32"),
            (65, (8, 160), 32, "bfloat16", "takes at most 64 rows of x, got 65"),
            (1, (12, 160), 32, "bfloat16", "takes a multiple of 8 rows of trits, got 12"),
            (1, (8, 165), 32, "bfloat16", "takes rows of a multiple of 32 bytes, got 33"),
            (1, (8, 160), 16, "bfloat16", "takes group sizes that are multiples of 32, got 16"),
        ],
    )
    def test_refuses(self, rows, shape, group_size, dtype, message):
        matrix = random_matrix(np.random.default_rng(7), *shape, group_size)
        x = jnp.ones((rows, shape[1]), dtype)
        with pytest.raises(UnsupportedError, match=f"'mosaic_gpu' {message}; pass 'triton' or 'xla'"):
            packed_matmul(x, matrix.trits, matrix.scale, group_size=group_size, implementation="mosaic_gpu")
        by_itself = packed_matmul(x, matrix.trits, matrix.scale, group_size=group_size)
        assert by_itself.shape == (rows, shape[0])


@pytest.mark.parametrize(
    ("N", "P", "M"), [(10240, 2048, 64), (8192, 1664, 64), (4096, 832, 8), (64, 64, 8), (40000, 96, 16)]
)
def test_cuts_cover_the_matrix_and_fit_a_multiprocessor(monkeypatch, N, P, M):
    monkeypatch.setattr(mosaic_gpu, "multiprocessors", lambda: 132)
    cut = mosaic_gpu.cut_of(N, P, M)
    assert (cut.splits - 1) * cut.steps * cut.width < P <= cut.splits * cut.steps * cut.width
    assert cut.splits == 1 or cut.splits * -(-N // cut.rows) <= 132
    launched = min(65536 // (128 * (cut.warpgroups + 1)) // 8 * 8, 240)
    assert mosaic_gpu.COPYING_REGISTERS <= launched <= cut.computing_registers
    asked = cut.warpgroups * cut.computing_registers + mosaic_gpu.COPYING_REGISTERS
    assert asked <= (cut.warpgroups + 1) * launched, "a block that asks for more than it has waits forever"


def test_scales_are_made_by_rows_before_they_are_turned():
    """A compiler free to choose would rather turn what they are made of, the accumulators of a whole model."""
    scale = jax.ShapeDtypeStruct((33, 5), jnp.float32)
    lowered = jax.jit(lambda scale: prepared_scale(jnp.exp2(scale))).lower(scale).as_text()
    held = next(line for line in lowered.splitlines() if "LayoutConstraint" in line)
    assert "dense<[1, 0]>" in held
    assert "tensor<33x5xbf16>" in held
    assert prepared_scale(jnp.ones(scale.shape)).shape == (5, 33)


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
    "a short scale": ({"scale": jnp.ones((3, 2), jnp.float16)}, r"scale must be float32 .* got float16"),
    "a prepared scale by rows": (
        {"scale": jnp.ones((3, 2), jnp.bfloat16)},
        r"a prepared scale must be bfloat16 \(2, 3\), got \(3, 2\)",
    ),
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

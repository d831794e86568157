"""The decoded weight is exact, for every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx import run
from support import random_matrix

from arbs_kernels import backends
from arbs_kernels.cases import SMALL_CASES, Case
from arbs_kernels.packed_decode import packed_decode
from arbs_kernels.selection import UnsupportedError

WIDE = (
    Case(1, 6, 120, 64, "eight columns at a time, three bytes in each plane's run"),
    Case(1, 11, 136, 16, "planes that share chunks of eight columns"),
    Case(1, 3, 1624, 128, "planes of an odd length"),
    Case(1, 4, 2560, 32, "planes of whole chunks"),
)


class PackedDecode:
    """What holds for every implementation; a backend adds a subclass that names it."""

    implementation: str

    def decode(self, matrix, group_size, dtype, trits=None):
        run = jax.jit(packed_decode, static_argnames=("in_features", "group_size", "dtype", "implementation"))
        return run(
            matrix.trits if trits is None else trits,
            matrix.scale,
            in_features=matrix.in_features,
            group_size=group_size,
            dtype=jnp.dtype(dtype),
            implementation=self.implementation,
        )

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
    @pytest.mark.parametrize("case", [*SMALL_CASES, *WIDE], ids=str)
    def test_the_weight(self, case, dtype):
        rng = np.random.default_rng([17, case.out_features * case.in_features])
        matrix = random_matrix(rng, case.out_features, case.in_features, case.group_size)
        # A trit times a scale rounded to the result's dtype is the weight rounded to it: nothing is left to tolerate.
        expected = matrix.weight.astype(np.float32).astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(self.decode(matrix, case.group_size, dtype), expected, strict=True)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
    def test_a_zero_is_a_positive_zero(self, dtype):
        matrix = random_matrix(np.random.default_rng(18), 4, 80, 8)
        weight = np.asarray(self.decode(matrix, 8, dtype, jnp.full_like(matrix.trits, 128))).astype(np.float32)
        np.testing.assert_array_equal(weight, 0)
        assert not np.signbit(weight).any()

    def test_mapped_matrices(self):
        rng = np.random.default_rng(19)
        matrices = [random_matrix(rng, 5, 40, 8) for _ in range(3)]
        trits, scale = (jnp.stack([getattr(matrix, name) for matrix in matrices]) for name in ("trits", "scale"))
        static = {"in_features": 40, "group_size": 8, "dtype": jnp.float32, "implementation": self.implementation}
        weight = jax.vmap(lambda t, s: packed_decode(t, s, **static))(trits, scale)
        np.testing.assert_array_equal(weight, np.stack([m.weight for m in matrices]).astype(np.float32))


class TestXla(PackedDecode):
    implementation = "xla"


@pytest.mark.skipif(backends.triton_missing() is not None, reason=f"needs {backends.triton_missing()}")
class TestTriton(PackedDecode):
    implementation = "triton"


@pytest.mark.parametrize("plane", range(5))
@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_the_instructions_that_make_float8_of_codes(plane, shift):
    """On random words, wherever eight codes begin in them, and for all scales."""
    triton = pytest.importorskip("arbs_kernels.packed_decode.triton", exc_type=ImportError)
    rng = np.random.default_rng([20, plane, shift])
    words = rng.integers(0, 2**32, (3, 4096), dtype=np.uint32)
    scale = rng.integers(1, 0x7F, 4096, dtype=np.uint32)  # every positive number that float8 has
    inputs = {f"${2 + at}": word for at, word in enumerate(words)}
    inputs |= {"$5": np.uint32(shift), "$6": np.uint32(3**plane), "$7": scale}
    found = np.stack(run(triton._EIGHT_FLOAT8.value, inputs, 2), axis=1).view(jnp.float8_e4m3fn)
    codes = np.ascontiguousarray(words.T).view(np.uint8)[:, shift // 8 : shift // 8 + 8].astype(np.int64)
    trits = (codes * 3**plane % 256 * 3 >> 8) - 1
    of_scale = scale.astype(np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(found.astype(np.float32), trits * of_scale[:, None])


def refused(**changes):
    plain = {
        "trits": jnp.zeros((3, 2), jnp.uint8),
        "scale": jnp.ones((3, 2), jnp.float32),
        "in_features": 10,
        "group_size": 8,
        "dtype": jnp.float32,
    }
    return packed_decode(**plain | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": jnp.float16}, "dtype must be float32, bfloat16 or float8_e4m3fn, got float16"),
        ({"in_features": 11}, r"trits must be uint8 \(N, 3\) for in_features=11, got uint8 \(3, 2\)"),
        ({"scale": jnp.ones((3, 1), jnp.float32)}, r"scale must be float32 \(3, 2\), got float32 \(3, 1\)"),
        ({"group_size": 3}, "group_size must be one of .*, got 3"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match="packed_decode: " + message):
        refused(**changes)


def test_an_unknown_implementation_is_an_error_that_lists_the_known():
    with pytest.raises(UnsupportedError, match=r"no implementation 'abacus'; pass one of .*xla"):
        refused(implementation="abacus")

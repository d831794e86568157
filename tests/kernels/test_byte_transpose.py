"""Bytes turned round against NumPy, for every implementation: exact."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx import run

from arbs_kernels import backends
from arbs_kernels.byte_transpose import byte_transpose
from arbs_kernels.selection import UnsupportedError

SHAPES = [(1, 1), (1, 7), (4, 4), (5, 12), (12, 8), (128, 128), (131, 257), (132, 260), (256, 4), (4, 1024), (640, 96)]
DTYPES = ["uint8", "int8", "float8_e4m3fn", "float8_e5m2"]


def drawn(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Codes at random, those that are no numbers among them."""
    return np.random.default_rng([31, *shape]).integers(0, 256, shape, np.uint8).view(jnp.dtype(dtype))


class ByteTranspose:
    """What holds for every implementation; a backend adds a subclass that names it."""

    implementation: str

    def run(self):
        return partial(byte_transpose, implementation=self.implementation)

    @pytest.mark.parametrize(
        ("shape", "dtype"), [*((shape, "uint8") for shape in SHAPES), *(((12, 36), dtype) for dtype in DTYPES)], ids=str
    )
    def test_turns_round(self, shape, dtype):
        values = drawn(shape, dtype)
        found = jax.jit(self.run())(jnp.asarray(values))
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), values.view(np.uint8).T)

    @pytest.mark.parametrize("shape", [(2, 3, 20, 12), (2, 3, 5, 7)], ids=str)
    def test_mapped_matrices_are_turned_as_they_would_be_alone(self, shape):
        stack = drawn(shape, "float8_e4m3fn")
        found = jax.jit(jax.vmap(jax.vmap(self.run())))(jnp.asarray(stack))
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), stack.view(np.uint8).swapaxes(2, 3))


class TestXla(ByteTranspose):
    implementation = "xla"


@pytest.mark.skipif(backends.triton_missing() is not None, reason=f"needs {backends.triton_missing()}")
class TestTriton(ByteTranspose):
    implementation = "triton"


def test_four_words_are_turned_in_registers():
    """The PTX of the Triton kernel, run here instruction by instruction."""
    pytest.importorskip("triton")
    from arbs_kernels.byte_transpose import triton

    words = np.random.default_rng(32).integers(0, 2**32, (4, 1000), np.uint32)
    found = run(triton._FOUR_BY_FOUR.value, {f"${4 + at}": words[at] for at in range(4)}, 4)
    as_bytes = words.T.copy().view(np.uint8).reshape(1000, 4, 4)
    turned = np.stack(found, axis=1).view(np.uint8).reshape(1000, 4, 4)
    np.testing.assert_array_equal(turned, as_bytes.swapaxes(1, 2))


@pytest.mark.parametrize("values", [jnp.zeros((3, 4), jnp.bfloat16), jnp.zeros((3,), jnp.int8)], ids=str)
def test_refuses(values):
    with pytest.raises(ValueError, match=r"byte_transpose: values must be \(M, C\) of a dtype of one byte, got "):
        byte_transpose(values)


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(UnsupportedError, match="byte_transpose has no implementation 'abacus'"):
        byte_transpose(jnp.zeros((2, 2), jnp.int8), implementation="abacus")

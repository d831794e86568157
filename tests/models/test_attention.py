"""Causal attention against the library's, and what it says where cuDNN cannot run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_jax.errors import ConfigError
from arbs_jax.models.attention import causal_attention, cudnn_missing


def draw(dtype=jnp.float32, *, heads=6, shared=2, length=7, channels=8, values=8):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, length, heads, channels), (2, length, shared, channels), (2, length, shared, values))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("shared", [1, 2, 6])
def test_equals_the_librarys_with_its_gradients(shared):
    arrays = draw(shared=shared)
    outer = jax.random.normal(jax.random.key(1), arrays[0].shape)

    def both(attention):
        y, pull = jax.vjp(attention, *arrays)
        return y, *pull(outer)

    ours = both(lambda q, k, v: causal_attention(q, k, v, "xla"))
    theirs = both(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla"))
    for own, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(own, other, atol=2e-5)  # sums of at most 8 * 7 products near one


def test_values_may_be_of_another_width_and_keep_the_dtype():
    y = causal_attention(*draw(jnp.bfloat16, values=5), "xla")
    assert (y.shape, y.dtype) == ((2, 7, 6, 5), jnp.bfloat16)


def test_no_position_sees_a_later_one():
    q, k, v = draw()
    _, pull = jax.vjp(lambda k, v: causal_attention(q, k, v, "xla")[:, :4], k, v)
    for gradient in pull(jnp.ones((2, 4, 6, 8))):
        assert not gradient[:, 4:].any()
        assert gradient[:, :4].any()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU may have cuDNN")
def test_without_cudnn_the_name_is_refused_and_auto_works():
    arrays = draw()
    assert "8.0" in str(cudnn_missing(*arrays))
    with pytest.raises(ConfigError, match="compute capability"):
        causal_attention(*arrays, "cudnn")
    np.testing.assert_array_equal(causal_attention(*arrays), causal_attention(*arrays, "xla"))


@pytest.mark.skipif(jax.default_backend() == "cpu", reason="needs an NVIDIA GPU with cuDNN")
def test_cudnn_agrees():
    arrays = draw(jnp.bfloat16, length=64, channels=64, values=64)
    assert cudnn_missing(*arrays) is None
    ours, theirs = (causal_attention(*arrays, name).astype(jnp.float32) for name in ("xla", "cudnn"))
    np.testing.assert_allclose(ours, theirs, atol=0.05)  # values of some 4, probabilities rounded to 8 bits in either

"""Context blocks: causal, the same with a cache of latents, one layer at a time or stacked."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arb_modules import TERNARY, Built, close, influence_of, normal

from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.attention import AttentionConfig, ContextBlock, context_blocks, empty_cache

CONFIG = AttentionConfig(
    width=16, layers=2, heads=2, head_dim=8, rope_dim=4, latent=6, query_latent=10, hidden=20, context=12
)
LENGTH = 6
X = normal(0, 2, LENGTH, 16)


@pytest.fixture(scope="module")
def stack():
    return Built(context_blocks(CONFIG, TERNARY), X, None, 0)


@pytest.fixture(scope="module")
def block():
    return Built(ContextBlock(CONFIG, TERNARY), X)


def test_gradients_of_later_positions_are_exactly_zero(block):
    influence = influence_of(lambda x: block.module.apply(block.variables, x)[0], X)
    np.testing.assert_array_equal(influence, np.tril(np.ones((LENGTH, LENGTH), bool)))


def test_every_matrix_votes(block):
    block.assert_every_matrix_votes_once()


def test_decoding_with_a_cache_is_the_full_forward_pass(stack):
    whole = np.asarray(stack.output[0])
    cached = context_blocks(CONFIG, TERNARY, cached=True)
    apply = jax.jit(lambda x, cache, start: cached.apply(stack.variables, x, cache, start))
    cache = empty_cache(CONFIG, 2, 12)
    assert {name: leaf.shape for name, leaf in cache.items()} == {"latent": (2, 2, 12, 6), "rope": (2, 2, 12, 4)}
    for start in range(0, LENGTH, 2):
        x, cache = apply(X[:, start : start + 2], cache, start)
        close(x, whole[:, start : start + 2])
    for leaf in cache.values():
        np.testing.assert_array_equal((leaf != 0).any(axis=(0, 1, 3)), np.arange(12) < LENGTH)


@pytest.mark.slow
def test_the_stack_is_its_layers_one_after_another(stack, block):
    x = X
    for layer in range(CONFIG.layers):
        x, cache = block.apply(jax.tree.map(lambda leaf, at=layer: leaf[at], stack.variables), x)
        assert cache is None
    close(x, stack.output[0])


@pytest.mark.slow
def test_every_matrix_of_every_layer_votes(stack):
    stack.assert_every_matrix_votes_once()


def test_blocks_look_at_distances_and_at_contents(stack):
    near = np.asarray(stack.output[0])
    # Angles up to 64 radians carry 64 roundoffs of their own.
    np.testing.assert_allclose(stack.apply(stack.variables, X, None, 64)[0], near, rtol=0, atol=1e-4)
    # Other distances, other outputs: the last position sees the same set in another order.
    turned = np.asarray(stack.apply(stack.variables, X[:, [1, 0, 2, 3, 4, 5]], None, 0)[0])
    assert np.abs(turned[:, -1] - near[:, -1]).max() > 1e-3


@pytest.mark.slow
def test_short_activations_and_straight_queries_have_finite_gradients():
    block = ContextBlock(replace(CONFIG, query_latent=0, dtype="bfloat16"), TERNARY)
    x = jnp.asarray(X, jnp.bfloat16)
    variables = Built(block, x).variables
    assert set(variables["ternary"]["attention"]) == {"q_proj", "kv_down", "k_up", "v_up", "o_proj"}
    total = jax.jit(jax.grad(lambda x: jnp.sum(block.apply(variables, x)[0].astype(jnp.float32) ** 2)))
    gradient = total(x)
    assert gradient.dtype == jnp.bfloat16
    assert jnp.isfinite(gradient.astype(jnp.float32)).all()
    assert (gradient != 0).any()


def test_a_cache_beyond_the_context_is_refused():
    with pytest.raises(ConfigError, match="13 positions exceeds the attention's context of 12"):
        empty_cache(CONFIG, 1, 13)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": 0}, r"attention\.latent must be at least 1, got 0"),
        ({"query_latent": -1}, r"attention\.query_latent must be at least 0, got -1"),
        ({"head_dim": 7}, r"attention\.head_dim must be even .* got 7"),
        ({"rope_dim": 3}, r"attention\.rope_dim must be even .* got 3"),
        ({"rope_dim": 8}, r"rope_dim must be below attention\.head_dim, got 8 and 8"),
        ({"rope_theta": 1.0}, r"attention\.rope_theta must be above 1, got 1\.0"),
        ({"dtype": "float16"}, r"attention\.dtype must be .* got 'float16'"),
    ],
)
def test_configuration_out_of_range(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)

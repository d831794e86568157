"""The text sequencer: trigrams see their own three bytes only, with history or without; the loss is aligned to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arb_modules import TERNARY, Built, close, normal

from arbs_jax.errors import ConfigError
from arbs_jax.models import VOCABULARY, cross_entropy
from arbs_jax.models.arb.sequencer import SequencerConfig, TextSequencer, targets, trigram_cross_entropy
from arbs_jax.state import MatrixSpec

CONFIG = SequencerConfig(embedding=8, hidden=12, width=16)
LENGTH = 7
# All different, so that a row of the table stands for one place in the text.
TOKENS = np.random.default_rng(0).permutation(VOCABULARY)[: 2 * LENGTH].reshape(2, LENGTH).astype(np.int32)


@pytest.fixture(scope="module")
def built():
    return Built(TextSequencer(CONFIG, TERNARY), TOKENS)


def test_positions_are_trigrams(built):
    assert built.output.shape == (2, LENGTH - 2, 16)
    assert set(built.variables) == {"ternary"}
    # Order within a trigram counts.
    swapped = TOKENS[:, [1, 0, 2, 3, 4, 5, 6]]
    changed = (np.asarray(built.apply(built.variables, swapped)) != built.output).any(axis=-1)
    np.testing.assert_array_equal(changed, [[True, True, False, False, False]] * 2)


def test_a_position_depends_on_its_three_bytes_only(built):
    dense = jax.tree.map(
        lambda spec: {"weight": normal(2, *spec.shape)}, built.specs, is_leaf=lambda node: isinstance(node, MatrixSpec)
    )

    def by_position(table):
        weights = dense | {"embed": {"weight": table}}
        return jnp.sum(built.module.apply({"dense": weights}, TOKENS), axis=-1)

    gradient = np.asarray(jax.jit(jax.jacrev(by_position))(dense["embed"]["weight"]))
    influence = np.abs(gradient).max(axis=-1) != 0
    expected = np.zeros_like(influence)
    for row, position in np.ndindex(2, LENGTH - 2):
        expected[row, position, TOKENS[row, position : position + 3]] = True
    np.testing.assert_array_equal(influence, expected)


def test_bytes_after_a_history_are_the_whole_text(built):
    whole = np.asarray(built.output)
    for start in range(2, LENGTH):
        part = built.apply(built.variables, TOKENS[:, start : start + 1], TOKENS[:, start - 2 : start])
        assert part.shape == (2, 1, 16)
        close(part[:, 0], whole[:, start - 2])


def test_every_matrix_votes(built):
    built.assert_every_matrix_votes_once()


def test_the_loss_is_that_of_the_byte_after_each_trigram():
    logits = normal(1, 2, LENGTH - 2, VOCABULARY)
    expected = jax.jit(cross_entropy)(logits[:, :-1], TOKENS[:, 3:])
    got = jax.jit(trigram_cross_entropy)(jnp.asarray(logits, jnp.bfloat16), TOKENS.astype(np.uint16))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=2**-8 * np.abs(logits).max() * 2)
    np.testing.assert_array_equal(targets(TOKENS), TOKENS[:, 3:])


def test_mistakes():
    sequencer = TextSequencer(CONFIG, TERNARY)

    def trace(length, history=None):
        arrays = [jnp.zeros((2, length), jnp.int32)] + ([] if history is None else [jnp.zeros(history, jnp.int32)])
        return jax.eval_shape(lambda *given: sequencer.init_with_output(jax.random.key(0), *given)[0], *arrays)

    with pytest.raises(ConfigError, match="at least 3 bytes to make a position, got a sequence of 2"):
        trace(2)
    with pytest.raises(ConfigError, match=r"two bytes before each row, \(2, 2\), got \(2, 3\)"):
        trace(1, (2, 3))
    with pytest.raises(ConfigError, match="take 4 bytes, got a sequence of 3"):
        targets(jnp.zeros((1, 3), jnp.int32))
    with pytest.raises(ConfigError, match="7 bytes make 5 trigram positions, got logits of 7"):
        trigram_cross_entropy(jnp.zeros((2, 7, VOCABULARY)), jnp.asarray(TOKENS))
    with pytest.raises(ConfigError, match=r"sequencer\.embedding must be at least 1, got 0"):
        SequencerConfig(embedding=0)
    with pytest.raises(ConfigError, match=r"sequencer\.dtype must be 'float32' or 'bfloat16', got 'float64'"):
        SequencerConfig(dtype="float64")

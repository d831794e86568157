"""The ledger's reader: only strides that have ended are seen, carried or in the window; windows may be cut anywhere."""

from functools import partial
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
from arb_modules import TERNARY, Built, close, influence_of, normal

from arbs_jax.models.arb.attention import AttentionConfig
from arbs_jax.models.arb.ledger import LedgerConfig, empty_ledger
from arbs_jax.models.arb.reader import LedgerReader

ATTENTION = AttentionConfig(width=16, heads=2, head_dim=8, rope_dim=4, latent=6)
LEDGER = LedgerConfig(latent=6, stride=4, capacity=3)
LENGTH = 11
X = normal(0, 2, LENGTH, 16)


@pytest.fixture(scope="module")
def built():
    return Built(LedgerReader(ATTENTION, LEDGER, TERNARY), X)


@pytest.fixture(scope="module")
def reading(built):
    """`(x, ledger, start) -> (context, ledger)` with a position that is not static."""
    return partial(built.apply, built.variables)


def test_a_window_reads_the_strides_that_have_ended(built):
    influence = influence_of(lambda x: built.module.apply(built.variables, x)[0], X)
    here, there = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    np.testing.assert_array_equal(influence, (here == there) | (there // 4 < (here + 1) // 4))


@pytest.mark.slow
def test_windows_that_carry_a_ledger_are_the_whole(built, reading):
    whole, none = built.output
    assert none is None
    ledger = empty_ledger(LEDGER, 2)
    for start, end in pairwise([0, 3, 4, 7, 8, 11]):
        context, ledger = reading(X[:, start:end], ledger, jnp.int32(start))
        close(context, whole[:, start:end])
    np.testing.assert_array_equal(ledger["positions"], [[3, 7, -1]] * 2)


def test_a_full_ledger_shows_its_last_strides_however_the_text_is_cut(reading):
    x = normal(1, 2, 22, 16)

    def read_in(cuts):
        ledger, contexts = empty_ledger(LEDGER, 2), []
        for start, end in pairwise([0, *cuts, 22]):
            context, ledger = reading(x[:, start:end], ledger, jnp.int32(start))
            contexts.append(context)
        return np.concatenate(contexts, axis=1)

    # Pieces of one position and of three, in two orders.
    cuts = [3, 4, 7, 8, 11, 12, 15, 18, 19]
    one, other = read_in(cuts), read_in([1, 4, 5, 8, 11, 12, 15, 16, 19])
    close(one, other)
    # What the first stride said is forgotten four strides later, not before.
    x[:, 0] += 1
    changed = (read_in(cuts) != one).any(axis=(0, 2))
    np.testing.assert_array_equal(changed, [at == 0 or 3 <= at < 15 for at in range(22)])


def test_slots_of_later_positions_and_empty_slots_are_not_seen(reading):
    ledger = empty_ledger(LEDGER, 2)
    context = reading(X[:, 1:4], ledger, jnp.int32(1))[0]
    loud = ledger | {"latents": jnp.full_like(ledger["latents"], 100)}
    np.testing.assert_array_equal(reading(X[:, 1:4], loud, jnp.int32(1))[0], context)
    later = loud | {"positions": jnp.full_like(ledger["positions"], 7)}
    np.testing.assert_array_equal(reading(X[:, 1:4], later, jnp.int32(1))[0], context)
    assert (np.asarray(reading(X[:, 1:4], later, jnp.int32(5))[0]) != np.asarray(context))[:, -1].any()


def test_every_matrix_votes(built, reading):
    # The second stride ends in a window that begins within it.
    ledger = reading(X[:, 1:4], empty_ledger(LEDGER, 2), jnp.int32(1))[1]
    built.assert_every_matrix_votes_once(X[:, 5:8], ledger, 5)

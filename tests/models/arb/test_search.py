"""The search of codebooks: runs tile a book, probes are the likeliest runs, nearest means nearest."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.search import (
    Runs,
    candidate_rows,
    nearest_candidate,
    nearest_row,
    plant,
    probe_patterns,
    runs_to_probe,
    unit_rows,
)
from arbs_jax.rules.noise import run_key
from arbs_jax.state import MatrixSpec, init_matrix
from arbs_kernels.codec import unpack_rows

RNG = np.random.default_rng(0)
BOOK = jnp.asarray(RNG.integers(-1, 2, (200, 12)), jnp.float32).at[7].set(0).at[150].set(0).at[160].set(0)
BOOK = BOOK.at[160].set(2 * BOOK[31])  # same angle: a tie, whatever the norm
INPUTS = jnp.asarray(
    np.concatenate([RNG.standard_normal((20, 12)), 3 * BOOK[31][None], np.zeros((1, 12))]), jnp.float32
)


def peek(ids):
    return BOOK[ids]


def by_hand(inputs, rows):
    """The nearest row by angle in float64, of rows that are allowed (M, N)."""
    book = np.asarray(BOOK, np.float64)
    norm = np.sqrt((book**2).sum(axis=1))
    cosine = np.asarray(inputs, np.float64) @ (book / np.maximum(norm, 1e-9)[:, None]).T
    # Ties are exact in rational arithmetic, not in floating point.
    return np.where(rows, np.round(cosine, 5), -np.inf).argmax(axis=1)


@pytest.mark.parametrize(("rows", "at_least"), [(7, 7), (64, 4), (1000, 3)])
def test_runs_tile_the_book(rows, at_least):
    runs = Runs(rows, at_least)
    count = 2**runs.bits
    assert runs.span >= at_least
    run = np.asarray(runs.run_of(jnp.arange(rows, dtype=jnp.int32)))
    assert (np.diff(run) >= 0).all()
    assert set(run) == set(range(count))
    assert set(np.bincount(run)) <= {runs.span, runs.height}
    looked_at = np.asarray(runs.rows_in(jnp.arange(count, dtype=jnp.int32)))
    assert looked_at.shape == (count, runs.height)
    assert looked_at.min() >= 0
    assert looked_at.max() < rows
    for own, ids in enumerate(looked_at):
        assert set(np.flatnonzero(run == own)) <= set(ids)


def test_the_largest_book_stays_within_32_bits():
    runs = Runs(10_000_000, 16)
    last = runs.rows_in(jnp.int32(2**runs.bits - 1))
    assert int(last[-1]) == 9_999_999
    assert int(runs.run_of(last[-1])) == 2**runs.bits - 1


def test_a_run_longer_than_the_book_is_refused():
    with pytest.raises(ConfigError, match="between 1 row and the book's 8, got 9"):
        Runs(8, 9)


def test_probes_come_by_likelihood():
    patterns = probe_patterns(10, 64)
    assert patterns.shape == (64, 10)
    assert not patterns[0].any()
    np.testing.assert_array_equal(patterns[1], np.eye(10)[0])
    assert len({tuple(pattern) for pattern in patterns}) == 64
    # Whoever flips a more certain sign in place of a less certain one comes later.
    order = {tuple(pattern): place for place, pattern in enumerate(patterns)}
    for pattern, place in order.items():
        for low, high in itertools.pairwise(range(10)):
            if pattern[high] and not pattern[low]:
                easier = list(pattern)
                easier[low], easier[high] = 1, 0
                assert order[tuple(easier)] < place
    assert probe_patterns(3, 64).shape == (8, 3)
    assert probe_patterns(0, 64).shape == (1, 0)


def test_candidates_are_the_runs_of_the_own_signs_first():
    runs = Runs(200, 16)
    assert runs.bits == 3
    x = jnp.asarray([[0.5, -0.1, 2.0] + [9.0] * 9, [-1.0, -2.0, 0.0] + [0.0] * 9], jnp.float32)
    # 101 with its second sign the least certain, then its first; 000 with its third.
    likeliest, everything = jax.jit(lambda x: (runs_to_probe(x, runs, 3), candidate_rows(x, runs, 8)))(x)
    np.testing.assert_array_equal(likeliest, [[0b101, 0b111, 0b001], [0b000, 0b001, 0b100]])
    assert all(set(ids) == set(range(200)) for ids in np.asarray(everything))


@pytest.mark.parametrize("budget", [22 * 40, 10**6])
def test_the_exact_search_is_exact(budget):
    got = jax.jit(lambda x: nearest_row(x, 200, peek, budget))(INPUTS)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, by_hand(INPUTS, np.ones((22, 200), bool)))
    assert got[20] == 31


@pytest.mark.parametrize("budget", [1, 10**6])
def test_the_candidates_are_compared_exactly(budget):
    runs = Runs(200, 16)
    allowed = np.zeros((22, 200), bool)
    candidates = jax.jit(lambda x: candidate_rows(x, runs, 3))(INPUTS)
    np.put_along_axis(allowed, np.asarray(candidates), True, axis=1)
    search = lambda x: nearest_candidate(x, runs, 3, peek, budget)  # noqa: E731
    got = jax.jit(search)(INPUTS)
    np.testing.assert_array_equal(got, by_hand(INPUTS, allowed))
    if budget > 1:
        # Without jit as with it; and an input's row depends on no other input.
        np.testing.assert_array_equal(got[5:9], search(INPUTS[5:9]))


def test_what_is_no_number_still_finds_a_row():
    @jax.jit
    def both(x):
        return nearest_row(x, 200, peek, 10**6), nearest_candidate(x, Runs(200, 16), 3, peek, 10**6)

    for found in both(jnp.full((1, 12), jnp.nan, jnp.float32)):
        assert 0 <= int(found[0]) < 200


def test_planted_rows_are_among_their_own_candidates():
    spec, runs = MatrixSpec(100_001, 13, 8), Runs(100_001, 16)

    @jax.jit
    def born(key):
        fresh = init_matrix(key, spec)
        planted = plant(fresh, runs, 13)
        return fresh, planted, unpack_rows(fresh["trits"], 13), unpack_rows(planted["trits"], 13)

    fresh, planted, *trits = born(run_key(0))
    before, after = (np.asarray(leaf) for leaf in trits)
    assert (after[:, : runs.bits] != 0).all()
    np.testing.assert_array_equal(before[:, runs.bits :], after[:, runs.bits :])
    for name in ("exponent", "corr", "votes"):
        np.testing.assert_array_equal(fresh[name], planted[name])
    own = [0, 1, 99, 4_000, 65_535, 65_536, 100_000]
    candidates = jax.jit(lambda x: candidate_rows(x, runs, 1))(jnp.asarray(after[own], jnp.float32))
    assert all(row in ids for row, ids in zip(own, np.asarray(candidates), strict=True))


def test_unit_rows_have_length_one():
    unit = np.asarray(unit_rows(BOOK))
    np.testing.assert_allclose((unit[:7] ** 2).mean(axis=1), 1, rtol=1e-6)
    assert not unit[7].any()

"""Shared VQ: straight-through, votes for touched rows alone, no array of the book's height."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_jax import Integral, TernaryConfig, matrix_specs
from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.kg import CompositeCodebook
from arbs_jax.models.arb.search import unit_rows
from arbs_jax.models.arb.vq import SharedVQ, VQConfig, check_ids, spread_loss, vq_events
from arbs_jax.rules.noise import run_key
from arbs_jax.votes import make_probes

TERNARY = TernaryConfig(rule=Integral(), group_size=8)
CONFIG = VQConfig(rows=96, width=10, dim=8, exact_rows=10, blocks=3, block_rows=8, budget=2000)
VQ = SharedVQ(CONFIG, TERNARY)
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 10)), jnp.float32)


@pytest.fixture(scope="module")
def state():
    return jax.jit(VQ.init)(run_key(1), X)["ternary"]


@pytest.fixture(scope="module")
def swept(state):
    """(output, gradient of the input by each output, votes of each loss) of one jitted pass."""
    specs = matrix_specs(VQ, X)
    probes = make_probes(state, specs, TERNARY.rule, lookups={"codebook": 10})

    def losses(x, probes):
        out = VQ.apply({"ternary": state, "probes": probes}, x)
        weights = jnp.arange(10, dtype=jnp.float32) + 1
        return jnp.stack([jnp.sum(out.output_BxSxD * weights), out.commitment_BxS.sum(), out.codebook_BxS.sum()]), out

    def run(x):
        value, pull, out = jax.vjp(losses, x, probes, has_aux=True)
        return out, jax.vmap(pull)(jnp.eye(3, dtype=value.dtype))

    return jax.jit(run)(X)


def test_only_integers(state):
    assert set(state) == {"down", "codebook", "up"}
    assert all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(state))


def test_the_output_is_the_row_projected_back(state, swept):
    out, _ = swept
    assert out.ids_BxS.dtype == jnp.int32
    assert out.ids_BxS.shape == (2, 5)
    back = jax.jit(lambda ids: VQ.apply({"ternary": state}, ids, method="vectors"))(out.ids_BxS)
    np.testing.assert_allclose(out.output_BxSxD, back, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out.commitment_BxS, CONFIG.commitment * out.codebook_BxS)


def test_gradients_go_straight_through(swept):
    """The output's gradient passes the book by; each loss moves one side only."""
    _, (dx, votes) = swept
    moved = lambda node: bool(np.asarray(node).any())  # noqa: E731
    by_output, by_commitment, by_codebook = (jax.tree.map(lambda leaf, at=at: leaf[at], votes) for at in range(3))
    assert [moved(dx[at]) for at in range(3)] == [True, True, False]
    assert [moved(vote["codebook"]["rows"]) for vote in (by_output, by_commitment, by_codebook)] == [False, False, True]
    assert [moved(vote["down"]["score"]) for vote in (by_output, by_commitment, by_codebook)] == [True, True, False]
    assert [moved(vote["up"]["score"]) for vote in (by_output, by_commitment, by_codebook)] == [True, False, False]


def test_only_touched_rows_vote(swept):
    out, (_, votes) = swept
    assert votes["codebook"]["rows"].shape == (3, 10, 8)
    np.testing.assert_array_equal(votes["codebook"]["ids"][2], out.ids_BxS.reshape(-1))
    np.testing.assert_array_equal(votes["codebook"]["count"], [1, 1, 1])


def test_a_position_s_id_depends_on_no_other(state, swept):
    out, _ = swept
    part = jax.jit(VQ.apply)({"ternary": state}, X[:1, :2])
    np.testing.assert_array_equal(part.ids_BxS, out.ids_BxS[:1, :2])


def test_known_ids_are_not_searched_for(state):
    found = VQ.apply({"ternary": state}, X)
    again = VQ.apply({"ternary": state}, X, found.ids_BxS)
    np.testing.assert_array_equal(again.output_BxSxD, found.output_BxSxD)
    program = jax.make_jaxpr(lambda ids: VQ.apply({"ternary": state}, X, ids).output_BxSxD)(found.ids_BxS)
    assert "argmax" not in str(program)
    other = VQ.apply({"ternary": state}, X, (found.ids_BxS + 1) % 96)
    assert not np.array_equal(other.output_BxSxD, found.output_BxSxD)


@pytest.mark.parametrize(("inputs", "spread"), [(jnp.eye(4) * 2, 0.0), (jnp.ones((3, 4)), 3.0)])
def test_inputs_that_fill_their_space_cost_nothing(inputs, spread):
    assert spread_loss(inputs[None]) == spread


def test_a_small_book_is_searched_whole(state, swept):
    out, _ = swept
    whole = SharedVQ(replace(CONFIG, exact_rows=96), TERNARY)

    def look(module, latent):
        book = unit_rows(module.codebook.peek(jnp.arange(96, dtype=jnp.int32)))
        return book, module.nearest(latent), module.nearest(latent, exact=False)

    book, ids, forced = jax.jit(lambda latent: whole.apply({"ternary": state}, latent, method=look))(out.latent_BxSxK)
    score = np.asarray(out.latent_BxSxK, np.float64) @ np.asarray(book, np.float64).T
    np.testing.assert_array_equal(ids, np.round(score, 5).argmax(axis=-1))
    np.testing.assert_array_equal(forced, out.ids_BxS)


def test_bfloat16(state):
    model = SharedVQ(replace(CONFIG, dtype="bfloat16"), TERNARY)
    out = jax.eval_shape(model.apply, {"ternary": state}, X.astype(jnp.bfloat16))
    assert out.output_BxSxD.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in (out.latent_BxSxK, out.commitment_BxS, out.codebook_BxS)} == {"float32"}


def test_events_are_the_worst_inputs(swept):
    out, _ = swept
    events = vq_events(out, worst=3)
    np.testing.assert_array_equal(events["ids"], out.ids_BxS.reshape(-1))
    worst = np.argsort(-np.asarray(out.codebook_BxS).reshape(-1), kind="stable")[:3]
    expected = np.asarray(out.latent_BxSxK).reshape(10, 8)[worst]
    assert events["inputs"].dtype == jnp.int8
    np.testing.assert_allclose(np.asarray(events["inputs"]) / 31, expected, atol=0.5 / 31 + 1e-6)


def test_ids_out_of_range_are_refused(state):
    with pytest.raises(ConfigError, match=r"in \[0, 96\), got ids from 3 to 96"):
        VQ.apply({"ternary": state}, jnp.asarray([3, 96], jnp.int32), method="vectors")
    with pytest.raises(ConfigError, match="got ids from -1 to 5"):
        check_ids(np.asarray([5, -1]), CONFIG)
    with pytest.raises(ConfigError, match="must be integers, got float32"):
        check_ids(np.zeros((2,), np.float32), CONFIG)
    check_ids(np.zeros((0,), np.int32), CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 2**24}, r"vq.rows must be in \[1, 2\^24\), got 16777216"),
        ({"blocks": 0}, "vq.blocks must be at least 1, got 0"),
        ({"commitment": -1.0}, "vq.commitment must not be negative"),
        ({"rows": 100_000, "dim": 4}, "vq.dim must be at least 13, .* got 4; raise it or vq.block_rows"),
        ({"dtype": "float16"}, "'float32' or 'bfloat16', got 'float16'"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **change)


def test_nothing_of_a_large_book_s_height_is_made():
    """Forward and backward at a million rows and 512 positions, compiled: temporaries far below the packed book."""
    config = VQConfig(rows=2**20, width=16, blocks=16, block_rows=16, budget=2**18)
    model = SharedVQ(config, TernaryConfig())
    x = jax.ShapeDtypeStruct((1, 512, 16), jnp.float32)
    ternary = jax.eval_shape(model.init, run_key(0), x)["ternary"]
    specs = matrix_specs(model, x)

    def votes(ternary, x):
        probes = make_probes(ternary, specs, TERNARY.rule, lookups={"codebook": 512})
        loss = lambda probes: model.apply({"ternary": ternary, "probes": probes}, x).codebook_BxS.sum()  # noqa: E731
        return jax.grad(loss)(probes)

    memory = jax.jit(votes).lower(ternary, x).compile().memory_analysis()
    # A byte a row would be 2^20.
    assert memory.argument_size_in_bytes > 30 * 2**20
    assert memory.temp_size_in_bytes < 12 * 2**20


@pytest.mark.slow
def test_a_large_book_is_born_in_little_room():
    config = VQConfig(rows=2**20, width=16)
    model = SharedVQ(config, TernaryConfig())
    compiled = jax.jit(model.init).lower(run_key(0), jnp.zeros((1, 2, 16), jnp.float32)).compile()
    memory = compiled.memory_analysis()
    # What stays is 31 bytes a row; one float32 array of the book's shape would be 256.
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes


def test_composites_are_of_a_motif_and_the_one_before():
    model = CompositeCodebook(replace(CONFIG, rows=10), TERNARY, hidden=12)
    state = jax.jit(model.init)(run_key(0), X)

    @jax.jit
    def run(x):
        whole, pull = jax.vjp(lambda x: model.apply(state, x).output_BxSxD, x)
        rest = model.apply(state, x[:, 2:], x[:, 1]).output_BxSxD
        third = jnp.zeros_like(whole).at[:, 2].set(1)
        return whole, rest, pull(third)[0]

    whole, rest, gradient = run(X)
    assert whole.shape == (2, 5, 10)
    np.testing.assert_allclose(rest, whole[:, 2:], rtol=1e-5, atol=1e-6)
    assert [bool(gradient[:, at].any()) for at in range(5)] == [False, True, True, False, False]

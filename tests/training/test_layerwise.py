"""The sweep equals the textbook step on the whole model, in integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_chain
from support import assert_trees_equal
from toy_chain import RULE

from arbs_jax import Integral, TernaryConfig, matrix_specs, update, value_and_votes
from arbs_jax.errors import ConfigError
from arbs_jax.models import ByteLM, ModelConfig, cross_entropy
from arbs_jax.models.byte_stages import byte_stages
from arbs_jax.rules import Schedule
from arbs_jax.training.layerwise import Sweep

STEP = jnp.int32(3)
KEY = jax.random.key(0)


def whole_loss(tied):
    """Mean loss of one micro-batch: the stages run in a row, the stacked one layer by layer in Python."""

    def loss(variables, batch):
        carry = None
        for stage in toy_chain.stages(tied=tied):
            if not stage.stacked:
                carry = stage.apply(variables, carry, batch)
                continue
            for layer in range(toy_chain.LAYERS):
                carry = stage.apply(jax.tree.map(lambda leaf, at=layer: leaf[at], only_blocks(variables)), carry, batch)
        return carry

    return loss


def only_blocks(variables):
    return {collection: {"blocks": tree["blocks"]} for collection, tree in variables.items()}


def jitted(*arguments, donate=(), **changes):
    """The sweep of these arguments, compiled."""
    sweep = Sweep(*arguments, **changes)
    return jax.jit(lambda *inputs: sweep(*inputs), donate_argnums=donate)


class Chain:
    """One toy chain, its sweeps and its votes, each compiled once."""

    def __init__(self, tied):
        self.specs = toy_chain.specs(tied)
        self.ternary = toy_chain.state(tied)
        self.votes = jax.jit(value_and_votes(whole_loss(tied), RULE, self.specs))
        self.sweeps = {
            remat: jitted(toy_chain.stages(tied=tied), RULE, self.specs, remat=remat) for remat in (True, False)
        }

    def sweep(self, batch, remat=True, blocked=False, ternary=None):
        ternary = self.ternary if ternary is None else ternary
        return self.sweeps[remat](ternary, batch, STEP, KEY, jnp.asarray(blocked))


@pytest.fixture(scope="module")
def untied():
    return Chain(tied=False)


@pytest.fixture(scope="module")
def tied():
    return Chain(tied=True)


@pytest.fixture(params=["untied", "tied"])
def chain(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def three():
    return toy_chain.batches(3)


def micro(batch, index):
    return jax.tree.map(lambda leaf: leaf[index], batch)


def test_equals_votes_and_update_of_the_whole_model(chain, three):
    """With three micro-batches: their votes are summed before anything moves."""
    found = [chain.votes(chain.ternary, micro(three, index)) for index in range(3)]
    total = jax.tree.map(lambda *leaves: sum(leaves), *(votes for _, votes in found))
    expected = update(RULE, chain.specs, chain.ternary, total, STEP)
    got, loss, moved, *_ = chain.sweep(three)
    assert bool(moved)
    assert loss.dtype == jnp.float32
    # Sums of 24 and 96 terms, a few layers deep.
    assert abs(float(loss) - np.mean([float(value) for value, _ in found])) < 1e-5 * float(loss)
    assert_trees_equal(got, expected)
    uses = {"first": 2 if "last" not in chain.specs else 1, "blocks": 1, "last": 1}
    assert all((got_leaf != before).any() for got_leaf, before in corrs(got, chain.ternary))
    assert [int(got["first"]["votes"])] == [3 * uses["first"]]
    assert np.asarray(got["blocks"]["dense"]["votes"]).tolist() == [3] * toy_chain.LAYERS


def corrs(*trees):
    pick = lambda tree: [m["corr"] for m in (tree["first"], tree["blocks"]["dense"])]  # noqa: E731
    return zip(*(map(np.asarray, pick(tree)) for tree in trees), strict=True)


def test_keeping_activations_changes_nothing(chain, three):
    assert_trees_equal(chain.sweep(three, remat=False)[0], chain.sweep(three, remat=True)[0])


@pytest.mark.parametrize("remat", [True, False])
def test_layers_that_move_together_move_alike(untied, three, remat):
    together = jitted(toy_chain.stages(), RULE, untied.specs, remat=remat, layers_at_once=toy_chain.LAYERS)
    got, loss, *_ = together(untied.ternary, three, STEP, KEY, jnp.asarray(False))
    expected, expected_loss, *_ = untied.sweep(three, remat)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    assert_trees_equal(got, expected)


def test_layers_that_move_together_divide_the_stack(untied, three):
    together = Sweep(toy_chain.stages(), RULE, untied.specs, layers_at_once=2)
    with pytest.raises(ConfigError, match="layers_at_once must divide the 3 layers of 'blocks', got 2"):
        together(untied.ternary, three, STEP, KEY, jnp.asarray(False))


@pytest.mark.slow
def test_layers_that_move_together_keep_their_own_random_bits():
    """Products of several layers at once round differently in the last bit; a rounding to integers seldom shows it."""
    rule, batch = toy_chain.latent(), toy_chain.batches(2)
    ternary = toy_chain.state(rule=rule)
    one, all_of_them = (
        jitted(toy_chain.stages(rule), rule, toy_chain.specs(), layers_at_once=layers)(
            ternary, batch, STEP, KEY, jnp.asarray(False)
        )[0]["blocks"]["dense"]
        for layers in (1, toy_chain.LAYERS)
    )
    moved = (np.asarray(one["residual"]) != np.asarray(ternary["blocks"]["dense"]["residual"])).mean()
    differ = (np.asarray(one["residual"]) != np.asarray(all_of_them["residual"])).mean()
    assert moved > 0.2
    assert differ < 0.01


@pytest.mark.parametrize("remat", [True, False])
def test_one_micro_batch_is_the_same_path(untied, remat):
    batch = toy_chain.batches(1, seed=5)
    votes = untied.votes(untied.ternary, micro(batch, 0))[1]
    assert_trees_equal(untied.sweep(batch, remat)[0], update(RULE, untied.specs, untied.ternary, votes, STEP))


def test_the_order_of_micro_batches_does_not_matter(untied, three):
    reordered = jax.tree.map(lambda leaf: leaf[jnp.asarray([2, 0, 1])], three)
    assert_trees_equal(untied.sweep(reordered)[0], untied.sweep(three)[0])


def test_a_canary_loses_no_unit(untied, three):
    """Accumulators of 2^40 move by exactly what accumulators of 0 (and one octave more in E) move by."""
    small = jax.tree_util.tree_map_with_path(
        lambda path, leaf: {
            "corr": jnp.zeros_like(leaf),
            "exponent": leaf + jnp.ones_like(leaf),
        }.get(path[-1].key, leaf),
        untied.ternary,
    )
    near_zero = untied.sweep(three, ternary=small)[0]
    for got, moved in corrs(untied.sweep(three)[0], near_zero):
        assert moved.dtype == got.dtype == np.int64
        np.testing.assert_array_equal(got - toy_chain.CANARY, moved)


@pytest.mark.parametrize("blocked", [True, False])
def test_blocked_or_not_finite_leaves_every_bit(untied, three, blocked):
    poisoned = three if blocked else three | {"y": three["y"].at[1, 0, 0].set(jnp.nan)}
    got, loss, moved, *_ = untied.sweep(poisoned, blocked=blocked)
    assert not bool(moved)
    assert bool(jnp.isnan(loss)) != blocked
    assert_trees_equal(got, untied.ternary)


def test_a_rule_that_samples_gets_bits_of_its_own_everywhere():
    """Other bits for every layer, matrix, micro-batch and step; the same for the same."""
    rule = toy_chain.sampling()
    sweep = jitted(toy_chain.stages(rule), rule, toy_chain.specs())
    plain = jitted(toy_chain.stages(), RULE, toy_chain.specs())
    ternary, batch = toy_chain.state(), toy_chain.batches(2)
    idle = jnp.asarray(False)

    def noise(key, batch=batch):
        after = sweep(ternary, batch, STEP, key, idle)[0]
        before = plain(ternary, batch, STEP, key, idle)[0]
        drift = jax.tree.map(lambda one, two: np.asarray(one - two), after, before)
        return [drift["first"]["corr"], drift["last"]["corr"], *drift["blocks"]["dense"]["corr"]]

    first, again, other = noise(KEY), noise(KEY), noise(jax.random.key(1))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    for one in range(len(first)):
        assert (first[one] != other[one]).mean() > 0.9
        for two in range(one):
            assert (first[one] != first[two]).mean() > 0.9
    for drift in first:
        own, voted = drift % toy_chain.VOTED, drift // toy_chain.VOTED
        assert (own != voted % toy_chain.VOTED).mean() > 0.9
        # Two micro-batches with the same bits would add up to even numbers.
        assert 0.3 < (voted % 2).mean() < 0.7


class Bytes:
    """The byte model, whole and as stages."""

    def __init__(self, tied):
        config = ModelConfig(width=16, layers=2, heads=2, kv_heads=1, head_dim=8, hidden=20, context=16, tied=tied)
        ternary = TernaryConfig(rule=Integral(schedule=Schedule(steps=20, warmup=0)), group_size=8)
        self.rule, self.model = ternary.rule, ByteLM(config, ternary)
        self.tokens = np.random.default_rng(0).integers(0, 256, (1, 2, 9)).astype(np.uint8)
        self.specs = matrix_specs(self.model, jax.ShapeDtypeStruct((1, 8), jnp.int32))
        self.ternary = jax.jit(self.model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["ternary"]
        self.sweep = jitted(byte_stages(config, ternary), self.rule, self.specs)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_byte_model_in_stages_is_the_byte_model(tied):
    built = Bytes(tied)

    def loss(variables, tokens):
        return cross_entropy(built.model.apply(variables, tokens[:, :-1]), tokens[:, 1:]).mean()

    value, votes = jax.jit(value_and_votes(loss, built.rule, built.specs))(built.ternary, built.tokens[0])
    expected = update(built.rule, built.specs, built.ternary, votes, STEP)
    got, swept, *_ = built.sweep(built.ternary, built.tokens, STEP, KEY, jnp.asarray(False))
    np.testing.assert_allclose(swept, value, rtol=1e-5)
    assert_trees_equal(got, expected)

"""Experts: the same as a loop over dense ones, whoever else is there, and nothing for those who do not take part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import fresh

from arbs_jax import Integral, TernaryConfig, value_and_votes
from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.experts import Experts, ExpertsConfig, rearrange, route
from arbs_kernels.decode import decode

TERNARY = TernaryConfig(rule=Integral(), group_size=8)
WIDTH, HIDDEN = 15, 10
RNG = np.random.default_rng(0)
X, CONTEXT, TOWARDS = (jnp.asarray(RNG.standard_normal((2, 7, WIDTH)), jnp.float32) for _ in range(3))
ACTIVE = jnp.asarray(RNG.random((2, 7)) < 0.6)
# A few dozen float32 operations on values of order one.
TOLERANCE = 200 * 2.0**-24


class Built:
    """Experts with fresh state; `run(x, active)` gives the gradient of `update * TOWARDS` in `x`, and the output."""

    def __init__(self, experts, top_k):
        self.layer = Experts(ExpertsConfig(experts=experts, hidden=HIDDEN, top_k=top_k), TERNARY)
        self.variables, self.specs = fresh(self.layer, X, CONTEXT)
        self.top_k = top_k

        def loss(x, active):
            out = self.layer.apply(self.variables, x, CONTEXT, active)
            return jnp.sum(out.update * TOWARDS), out

        self.run = jax.jit(jax.grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def built():
    return Built(4, 2)


def weight_of(matrix, in_features):
    """Decoded weight of one matrix; of all experts where there is an expert axis."""
    scale = TERNARY.rule.scale(matrix, TERNARY.group_size)
    plain = lambda trits, scale: decode(trits, scale, in_features, TERNARY.group_size, jnp.float32)  # noqa: E731
    return jax.vmap(plain)(matrix["trits"], scale) if matrix["trits"].ndim == 3 else plain(matrix["trits"], scale)


def dense_experts(ternary, x, context, top_k):
    """Every expert for every position, and then a weighted choice."""

    def norm(values):
        return values / jnp.sqrt(jnp.mean(values**2, axis=-1, keepdims=True) + 1e-6)

    def logits(name, values):
        return norm(values) @ weight_of(ternary["router"][name], WIDTH).T

    scores = logits("centroids", x) + logits("context_centroids", context)
    probability = jax.nn.softmax(scores)
    rank = jnp.argsort(jnp.argsort(-probability, axis=-1), axis=-1)
    chosen = jnp.where(rank < top_k, probability, 0)
    mixed = chosen / chosen.sum(-1, keepdims=True)
    total = jnp.zeros_like(x)
    for expert in range(scores.shape[-1]):
        gate = weight_of(ternary["gate_proj"], WIDTH)[expert]
        up = weight_of(ternary["up_proj"], WIDTH)[expert]
        down = weight_of(ternary["down_proj"], HIDDEN)[expert]
        total += mixed[..., expert, None] * ((jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return total, rank < top_k


def assert_equals_dense(built):
    def dense(x):
        update, chosen = dense_experts(built.variables["ternary"], x, CONTEXT, built.top_k)
        return jnp.sum(update * TOWARDS), (update, chosen)

    gradient, out = built.run(X, jnp.ones_like(ACTIVE))
    expected_gradient, (update, chosen) = jax.jit(jax.grad(dense, has_aux=True))(X)
    np.testing.assert_allclose(out.update, update, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=10 * TOLERANCE)
    np.testing.assert_array_equal(out.counts_X, chosen.sum((0, 1)))
    assert out.counts_X.sum() == built.top_k * X.shape[0] * X.shape[1]


def test_experts_equal_a_loop_over_dense_ones(built):
    assert_equals_dense(built)


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "top_k"), [(3, 3), (1, 1)])
def test_all_experts_and_one_expert_equal_dense_ones(experts, top_k):
    assert_equals_dense(Built(experts, top_k))


def test_inactive_positions_cost_and_change_nothing(built):
    everybody, nobody = jnp.ones_like(ACTIVE), jnp.zeros_like(ACTIVE)
    (_, every), (gradient, some) = built.run(X, everybody), built.run(X, ACTIVE)
    keep = np.asarray(ACTIVE)
    np.testing.assert_allclose(np.asarray(some.update)[keep], np.asarray(every.update)[keep], rtol=0, atol=TOLERANCE)
    assert int(some.counts_X.sum()) == 2 * keep.sum()
    assert not np.asarray(some.update)[~keep].any()
    assert not np.asarray(gradient)[~keep].any()
    _, other = built.run(jnp.where(ACTIVE[..., None], X, 7.0), ACTIVE)
    np.testing.assert_array_equal(other.update, some.update)
    assert other.balance == some.balance
    gradient, none = built.run(X, nobody)
    assert not np.asarray(none.update).any()
    assert none.balance == 0
    assert not np.asarray(gradient).any()


@pytest.mark.slow
def test_chosen_experts_vote_and_others_do_not(built):
    one = X[:1, :1], CONTEXT[:1, :1]

    def loss(variables):
        out = built.layer.apply(variables, *one)
        return jnp.sum(jnp.square(out.update)) + 0.1 * out.balance

    _, votes = jax.jit(value_and_votes(loss, TERNARY.rule, built.specs))(built.variables["ternary"])
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert np.asarray(votes[name]["count"]).sum() == 2
        moved = np.abs(np.asarray(votes[name]["score"])).sum((1, 2)) > 0
        np.testing.assert_array_equal(moved, np.asarray(votes[name]["count"]) == 1)
    for name in ("centroids", "context_centroids"):
        assert votes["router"][name]["count"] == 1
        assert np.asarray(votes["router"][name]["score"]).any()


routed = jax.jit(route, static_argnums=2)


def test_ties_go_to_the_lower_number():
    logits = jnp.asarray([[0, 0, 0, 0], [1, 2, 2, 1], [0, 3, 0, 0]], jnp.float32)
    routing = routed(logits, jnp.asarray([True, True, True]), 2)
    np.testing.assert_array_equal(routing.experts_MxK, [[0, 1], [1, 2], [1, 0]])
    np.testing.assert_allclose(routing.weights_MxK.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(routing.counts_X, [2, 3, 1, 0])
    assert routing.experts_MxK.dtype == routing.counts_X.dtype == jnp.int32


@pytest.mark.parametrize(("logits", "loss"), [(np.eye(4) * 50, 1.0), (np.eye(4)[[2] * 4] * 50, 4.0)])
def test_balance_is_one_when_even_and_the_number_of_experts_at_worst(logits, loss):
    routing = routed(jnp.asarray(logits, jnp.float32), jnp.ones(4, jnp.bool_), 1)
    np.testing.assert_allclose(routing.balance, loss, rtol=1e-6)


def test_rearranging_has_the_gradient_of_a_gather():
    rng = np.random.default_rng(3)
    order = rng.permutation(15).astype(np.int32)
    inverse = np.argsort(order).astype(np.int32)
    rows, towards = (jnp.asarray(rng.integers(-4, 5, shape), jnp.float32) for shape in ((5, 2), (15, 2)))

    def forward_and_back(rearranged):
        out, vjp = jax.vjp(rearranged, rows)
        return out, vjp(towards)[0]

    got = jax.jit(forward_and_back, static_argnums=0)(lambda rows: rearrange(3, rows, order, inverse))
    np.testing.assert_array_equal(got[0], np.repeat(rows, 3, axis=0)[order])
    np.testing.assert_array_equal(got[1], np.asarray(towards)[inverse].reshape(5, 3, 2).sum(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 0}, "experts.hidden must be at least 1, got 0"),
        ({"top_k": 9}, "at most experts.experts, got 9 and 8"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        ExpertsConfig(**change)

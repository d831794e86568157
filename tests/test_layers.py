"""Linen modules over ternary state: no parameters, no floats, at home in anyone's model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import is_float, score_by_hand

from arbs_jax import Integral, TernaryConfig, TernaryDense, TernaryEmbed, TernaryRMSNorm, matrix_specs, value_and_votes
from arbs_jax.errors import ConfigError
from arbs_jax.layers import projections, silu_gated, written_out
from arbs_jax.state import MatrixSpec
from arbs_jax.votes import decode_tree, scale_tree
from arbs_kernels.codec import unpack_rows

RULE = Integral()
CONFIG = TernaryConfig(rule=RULE, group_size=8)
DENSE = TernaryDense(features=6, config=CONFIG)
EMBED = TernaryEmbed(num_embeddings=11, features=9, config=CONFIG)
X = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (2, 5, 9)), jnp.float32)
IDS = jnp.asarray([[1, 4, 1], [10, 0, 4]], jnp.int32)


class Foreign(nn.Module):
    """Somebody's model: ordinary layers with parameters around ternary ones, dropout, a batch statistic."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(9)(x))
        x = TernaryRMSNorm()(TernaryDense(features=9, config=CONFIG)(x))
        return nn.Dense(2)(TernaryDense(features=7, config=CONFIG, name="named")(x))


@pytest.fixture(scope="module")
def dense():
    return DENSE.init(jax.random.key(0), X)


@pytest.fixture(scope="module")
def embed():
    return EMBED.init(jax.random.key(0), IDS)


def weight_of(variables, features):
    """Effective weight in float64 of a fresh matrix: power-of-two scales."""
    ternary = variables["ternary"]
    trits = np.asarray(unpack_rows(ternary["trits"], features))
    scale = 2.0 ** np.asarray(ternary["exponent"]).astype(np.float64)
    return trits, trits * np.repeat(scale, 8, axis=1)[:, :features]


@pytest.mark.parametrize(("module", "argument"), [(DENSE, X), (EMBED, IDS)])
def test_only_integers_and_only_in_the_ternary_collection(module, argument):
    variables = module.init(jax.random.key(0), argument)
    assert set(variables) == {"ternary"}
    assert set(variables["ternary"]) == {"trits", "exponent", "corr", "votes"}
    assert not [leaf for leaf in jax.tree.leaves(variables) if is_float(leaf)]
    assert not TernaryRMSNorm().init(jax.random.key(0), X)


def test_dense_is_a_product_with_the_weight(dense):
    _, weight = weight_of(dense, 9)
    y = DENSE.apply(dense, X)
    assert y.shape == (2, 5, 6)
    np.testing.assert_array_equal(y, np.asarray(X) @ weight.T)
    gradient = jax.grad(lambda x: jnp.sum(DENSE.apply(dense, x)))(X)
    np.testing.assert_array_equal(gradient, np.broadcast_to(weight.sum(axis=0), X.shape))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_keep_their_dtype(dense, embed, dtype):
    x = X.astype(dtype)
    assert DENSE.apply(dense, x).dtype == dtype
    assert jax.grad(lambda x: DENSE.apply(dense, x).astype(jnp.float32).sum())(x).dtype == dtype
    assert TernaryRMSNorm().apply({}, x).dtype == dtype
    table = TernaryEmbed(num_embeddings=11, features=9, config=CONFIG, dtype=jnp.dtype(dtype))
    assert table.apply(embed, IDS).dtype == dtype
    assert table.apply(embed, x, method="attend").dtype == dtype


def test_embedding_looks_up_and_attends(embed):
    trits, weight = weight_of(embed, 9)
    np.testing.assert_array_equal(EMBED.apply(embed, IDS), weight[np.asarray(IDS)])
    np.testing.assert_array_equal(EMBED.apply(embed, X, method="attend"), np.asarray(X) @ weight.T)
    # A looked-up row is no sum over inputs, so its scale ignores the width.
    assert set(np.unique(embed["ternary"]["exponent"])) == {-1}
    assert trits.any()


def test_a_tied_table_takes_votes_from_both_uses(embed):
    gy = np.random.default_rng(1).integers(-3, 4, (2, 3, 11)).astype(np.float32)
    trits, weight = weight_of(embed, 9)

    class Tied(nn.Module):
        def setup(self):
            self.table = TernaryEmbed(num_embeddings=11, features=9, config=CONFIG)

        def __call__(self, ids):
            return self.table.attend(self.table(ids))

    model = Tied()
    specs = matrix_specs(model, IDS)
    assert specs == {"table": MatrixSpec(11, 9, 8, fan_in=1, table=True)}
    loss = lambda variables: jnp.sum(model.apply(variables, IDS) * gy)  # noqa: E731
    votes = value_and_votes(loss, RULE, specs)({"table": embed["ternary"]})[1]["table"]
    assert votes["count"] == 2
    rows = weight[np.asarray(IDS)].reshape(6, 9)
    looked_up = np.zeros_like(weight)
    np.add.at(looked_up, np.asarray(IDS).reshape(-1), gy.reshape(6, 11) @ weight)
    expected = score_by_hand(gy.reshape(6, 11).T @ rows, trits, 8) + score_by_hand(looked_up, trits, 8)
    np.testing.assert_array_equal(votes["score"], expected)


def test_a_table_that_only_attends(embed):
    variables = EMBED.init(jax.random.key(0), X, method="attend")
    np.testing.assert_array_equal(variables["ternary"]["trits"], embed["ternary"]["trits"])


def test_at_home_in_a_foreign_model():
    model, x = Foreign(), X.reshape(10, 9)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    assert set(variables) == {"params", "ternary"}
    assert set(variables["params"]) == {"Dense_0", "Dense_1"}
    specs = matrix_specs(model, x)
    assert specs == {"TernaryDense_0": MatrixSpec(9, 9, 8), "named": MatrixSpec(7, 9, 8)}

    def loss(variables, params):
        return jnp.mean(model.apply(variables | {"params": params}, x) ** 2)

    params, ternary = variables["params"], variables["ternary"]
    value, votes = jax.jit(value_and_votes(loss, RULE, specs))(ternary, params)
    assert set(votes) == set(ternary)
    assert any(np.asarray(vote["score"]).any() for vote in votes.values())
    # The ordinary layers, on either side of the ternary ones, train as ever.
    got, gradients = jax.jit(jax.value_and_grad(lambda p: loss({"ternary": ternary}, p)))(params)
    assert abs(got - value) <= 1e-6 * value
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients["Dense_0"]))
    # The ternary collection is not written by a call that was not asked to.
    assert set(model.apply(variables, x, mutable=["ternary_spec", "batch_stats"])[1]) == {"ternary_spec"}


def test_layers_under_different_names_are_drawn_apart():
    model = Foreign()
    ternary = jax.jit(model.init)(jax.random.key(0), X)["ternary"]
    assert (ternary["TernaryDense_0"]["trits"][:7] != ternary["named"]["trits"]).any()


def test_decoded_weights_replace_the_packed(dense, embed):
    weight = decode_tree(dense["ternary"], matrix_specs(DENSE, X), RULE, jnp.float32)
    np.testing.assert_array_equal(DENSE.apply({"dense": weight}, X), DENSE.apply(dense, X))
    table = {"dense": decode_tree(embed["ternary"], matrix_specs(EMBED, IDS), RULE, jnp.float32)}
    np.testing.assert_array_equal(EMBED.apply(table, IDS), EMBED.apply(embed, IDS))
    np.testing.assert_array_equal(EMBED.apply(table, X, method="attend"), EMBED.apply(embed, X, method="attend"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [5, 100])
def test_scales_that_were_made_once_replace_the_accumulators(dense, embed, dtype, rows):
    x = jnp.asarray(np.random.default_rng(rows).integers(-3, 4, (rows, 9)), dtype)
    for module, variables, method in ((DENSE, dense, None), (EMBED, embed, "attend")):
        specs = matrix_specs(module, X if module is DENSE else IDS)
        once = {"dense": scale_tree(variables["ternary"], specs, RULE, jnp.dtype(dtype))}
        assert once["dense"]["scale"].dtype == dtype
        # Accumulators that would give another scale are not read.
        other = variables["ternary"] | {"exponent": variables["ternary"]["exponent"] + jnp.int8(3)}
        got = module.apply(once | {"ternary": other}, x, method=method)
        np.testing.assert_array_equal(got, module.apply(variables, x, method=method))


class Several(nn.Module):
    """Two matrices of one input."""

    together: bool

    @nn.compact
    def __call__(self, x):
        layers = [TernaryDense(features=size, config=CONFIG, name=name) for name, size in (("a", 6), ("b", 4))]
        return projections(x, *layers) if self.together else tuple(layer(x) for layer in layers)


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("decoded", [False, True])
def test_projections_are_their_layers(rows, decoded):
    apart, together = Several(together=False), Several(together=True)
    x = jnp.asarray(np.random.default_rng(rows).integers(-3, 4, (rows, 9)), jnp.float32)
    variables = together.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, apart.init(jax.random.key(0), x))
    if decoded:
        specs = matrix_specs(together, x)
        variables = {"dense": decode_tree(variables["ternary"], specs, RULE, jnp.float32)}
    for got, expected in zip(together.apply(variables, x), apart.apply(variables, x), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    gradients = [
        jax.grad(lambda x, model=model: sum(jnp.sum(y**2) for y in model.apply(variables, x)))(x)
        for model in (together, apart)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-5)


def test_rms_norm():
    x = np.random.default_rng(2).standard_normal((3, 50)).astype(np.float32)
    norm = TernaryRMSNorm()
    y = np.asarray(norm.apply({}, x)).astype(np.float64)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + 1e-6)
    # A mean of 50 squares, a reciprocal root and a product; each step within a few roundoffs.
    np.testing.assert_allclose(y, exact, rtol=60 * 2**-24)
    np.testing.assert_allclose((y**2).mean(axis=-1), 1, rtol=1e-5)
    # In float16 these squares would overflow, in bfloat16 their mean would lose most bits: statistics are float32.
    short = np.asarray(norm.apply({}, jnp.asarray(300 * x, jnp.bfloat16))).astype(np.float64)
    np.testing.assert_allclose(short, exact, rtol=2 * 2**-8, atol=1e-30)
    assert not np.asarray(norm.apply({}, jnp.zeros((2, 4), jnp.float32))).any()


def test_what_is_written_out_is_as_it_was_and_its_cotangents_are_free():
    def loss(x):
        one, two = written_out((x, 2 * x))
        return jnp.sum(one * two)

    assert float(loss(jnp.asarray([3.0, 4.0]))) == 50
    np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray([3.0, 4.0])), [12, 16])
    # A barrier for the cotangents as well would have them written before they are rounded.
    assert [str(jax.make_jaxpr(of)(X)).count("optimization_barrier") for of in (loss, jax.grad(loss))] == [1, 1]


def test_shapes_that_make_no_matrix_are_refused():
    with pytest.raises(ConfigError, match=r"at least one row and column, got \(0, 9\)"):
        TernaryDense(config=CONFIG).init(jax.random.key(0), X)
    with pytest.raises(ConfigError, match=r"got \(0, 4\)"):
        TernaryEmbed(features=4, config=CONFIG).init(jax.random.key(0), IDS)


def test_an_unknown_implementation_is_an_error():
    config = TernaryConfig(implementation="abacus")
    with pytest.raises(ValueError, match="no implementation 'abacus'"):
        TernaryDense(features=3, config=config).init(jax.random.key(0), X)


@pytest.mark.parametrize("shape", [(5, 9), (2, 3, 4), (7,)], ids=str)
def test_a_gated_activation_and_its_gradient_are_those_of_the_formula(shape):
    gate, up, cotangent = np.random.default_rng(4).standard_normal((3, *shape))
    y, back = jax.vjp(silu_gated, jnp.asarray(gate, jnp.float32), jnp.asarray(up, jnp.float32))
    sigmoid = 1 / (1 + np.exp(-gate))
    np.testing.assert_allclose(y, gate * sigmoid * up, rtol=1e-5)
    of_gate, of_up = back(jnp.asarray(cotangent, jnp.float32))
    np.testing.assert_allclose(of_gate, cotangent * up * sigmoid * (1 + gate * (1 - sigmoid)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(of_up, cotangent * gate * sigmoid, rtol=1e-5)


def test_a_gated_activation_keeps_the_product_it_is_made_of_and_nothing_else():
    def hidden(joined):
        return silu_gated(*jnp.split(joined, 2, axis=-1))

    kept = jax.eval_shape(lambda joined: jax.vjp(hidden, joined)[1], jnp.zeros((6, 8)))
    assert [leaf.shape for leaf in jax.tree.leaves(kept) if leaf.size] == [(6, 8)]

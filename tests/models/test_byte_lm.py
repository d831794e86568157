"""The byte model: causal, the same with a cache, tied or not, decoded or packed, rematerialised or not."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_trees_equal, is_float

from arbs_jax import Integral, TernaryConfig, matrix_specs, value_and_votes
from arbs_jax.errors import ConfigError
from arbs_jax.models import PRESETS, VOCABULARY, ByteLM, ModelConfig, cross_entropy, empty_cache, preset
from arbs_jax.models.byte_lm import Block, rotate, rotation
from arbs_jax.state import flatten_specs, iter_matrices, validate_tree
from arbs_jax.votes import decode_tree

CONFIG = ModelConfig(width=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=20, context=16)
TERNARY = TernaryConfig(rule=Integral(), group_size=8)
LENGTH = 9
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH)).astype(np.int32)
# Float sums of equal terms in another order: a few dozen operations deep, values of order one.
RELATIVE = 200 * 2.0**-24


@pytest.fixture(scope="module", autouse=True)
def full_precision() -> Iterator[None]:
    """GPUs round the operands of float32 products to tf32 unless asked not to."""
    with jax.default_matmul_precision("highest"):
        yield


class Built:
    """A model with fresh variables; its forward pass and its votes compiled once, when first asked for."""

    def __init__(self, config):
        self.config = config
        self.model = ByteLM(config, TERNARY)
        self.variables = jax.jit(self.model.init)(jax.random.key(0), TOKENS)
        self.specs = matrix_specs(self.model, TOKENS)
        self.forward = jax.jit(lambda variables, tokens: self.model.apply(variables, tokens))

    @cached_property
    def logits(self):
        return np.asarray(self.forward(self.variables, TOKENS))

    @cached_property
    def votes(self):
        """(loss, votes)."""

        def loss(variables):
            return cross_entropy(self.model.apply(variables, TOKENS[:, :-1]), TOKENS[:, 1:]).mean()

        return jax.jit(value_and_votes(loss, TERNARY.rule, self.specs))(self.variables["ternary"])


@pytest.fixture(scope="module")
def untied():
    return Built(CONFIG)


@pytest.fixture(scope="module")
def tied():
    return Built(replace(CONFIG, tied=True))


@pytest.fixture(scope="module", params=["untied", "tied"])
def built(request):
    return request.getfixturevalue(request.param)


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=RELATIVE * np.abs(expected).max())


def test_state_is_integers_in_the_documented_tree(built):
    ternary = built.variables["ternary"]
    assert set(built.variables) == {"ternary"}
    assert set(ternary) == {"embed", "blocks"} | (set() if built.config.tied else {"head"})
    assert not [leaf for leaf in jax.tree.leaves(ternary) if is_float(leaf)]
    assert all(leaf.shape[0] == CONFIG.layers for leaf in jax.tree.leaves(ternary["blocks"]))
    validate_tree(ternary, built.specs)
    paths = [path for path, _ in iter_matrices(ternary)]
    assert len(paths) == 7 + (1 if built.config.tied else 2)
    # Layers are drawn apart.
    trits = np.asarray(ternary["blocks"]["mlp"]["up_proj"]["trits"])
    assert (trits[0] != trits[1]).mean() > 0.5


def test_logits(built):
    assert built.logits.shape == (2, LENGTH, VOCABULARY)
    assert built.logits.dtype == np.float32
    assert np.isfinite(built.logits).all()
    # Not one distribution for every position.
    assert np.abs(np.diff(built.logits, axis=1)).max() > 0.01
    # Bytes as they come from a file are as good as int32.
    as_bytes = np.minimum(TOKENS, 255)
    np.testing.assert_array_equal(
        built.forward(built.variables, as_bytes.astype(np.uint8)), built.forward(built.variables, as_bytes)
    )


@pytest.mark.parametrize("position", [0, 3, LENGTH - 2])
def test_later_tokens_leave_earlier_logits_bitwise_alone(built, position):
    changed = TOKENS.copy()
    changed[:, position + 1 :] = (changed[:, position + 1 :] + 77) % VOCABULARY
    logits = np.asarray(built.forward(built.variables, changed))
    np.testing.assert_array_equal(logits[:, : position + 1], built.logits[:, : position + 1])
    assert (logits[:, position + 1 :] != built.logits[:, position + 1 :]).any(axis=(0, 2)).all()


def test_gradients_of_later_positions_are_exactly_zero():
    block = Block(CONFIG, TERNARY)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 6, 16)), jnp.float32)
    variables = jax.jit(block.init)(jax.random.key(0), x)

    def output(x):
        return jnp.sum(block.apply(variables, x)[0], axis=(0, 2))

    gradient = np.abs(np.asarray(jax.jit(jax.jacrev(output))(x)))[:, 0].max(axis=-1)
    # Row t holds the influence of every position on output t: lower triangular, without a gap.
    np.testing.assert_array_equal(gradient != 0, np.tril(np.ones((6, 6), bool)))


def test_decoding_with_a_cache_is_the_full_forward_pass(built):
    apply = jax.jit(lambda tokens, cache, start: built.model.apply(built.variables, tokens, cache, start))
    cache = empty_cache(built.config, 2, 12)
    logits, cache = apply(TOKENS[:, :4], cache, 0)
    close(logits, built.logits[:, :4])
    for start in range(4, LENGTH):
        logits, cache = apply(TOKENS[:, start : start + 1], cache, start)
        close(logits[:, 0], built.logits[:, start])
    written = np.asarray(jnp.any(cache["k"] != 0, axis=(0, 1, 3, 4)))
    np.testing.assert_array_equal(written, np.arange(12) < LENGTH)
    assert cache["k"].shape == cache["v"].shape == (2, 2, 12, 2, 4)


def test_a_cache_beyond_the_context_is_refused():
    assert empty_cache(CONFIG, 1, 16)["v"].shape == (2, 1, 16, 2, 4)
    with pytest.raises(ConfigError, match="17 positions exceeds the model's context of 16"):
        empty_cache(CONFIG, 1, 17)


def test_decoded_weights_give_the_same_logits(built):
    dense = decode_tree(built.variables["ternary"], built.specs, TERNARY.rule, jnp.float32)
    close(built.forward({"dense": dense}, TOKENS), built.logits)


def test_a_tied_table_votes_twice_every_other_matrix_once(built):
    votes = built.votes[1]
    counts = {path: np.unique(vote["count"]).tolist() for path, vote in iter_votes(votes)}
    assert counts == {path: [1 + (path == "embed" and built.config.tied)] for path in flatten_specs(built.specs)}
    assert all(np.asarray(vote["score"]).any() for _, vote in iter_votes(votes))


def iter_votes(votes, prefix=""):
    if "count" in votes:
        yield prefix, votes
        return
    for name in votes:
        yield from iter_votes(votes[name], f"{prefix}/{name}" if prefix else name)


def test_rematerialisation_changes_no_vote(untied):
    assert untied.config.remat
    plain = Built(replace(CONFIG, remat=False))
    assert_trees_equal(plain.variables, untied.variables)
    value, votes = untied.votes
    plain_value, plain_votes = plain.votes
    close(plain_value, value)
    assert_trees_equal(plain_votes, votes)


def test_short_activations_stay_near(untied):
    short = ByteLM(replace(CONFIG, dtype="bfloat16"), TERNARY)
    logits = jax.jit(short.apply)(untied.variables, TOKENS)
    assert logits.dtype == jnp.float32
    assert (logits != untied.logits).any()
    # Every one of about twenty roundings in a row may be off by 2^-8, and they add like a random walk.
    difference = np.asarray(logits) - untied.logits
    assert np.sqrt(np.mean(difference**2)) < 2**-8 * np.sqrt(20) * np.sqrt(np.mean(untied.logits**2))


def test_rotary_positions_are_relative():
    rng = np.random.default_rng(2)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(at_q, at_k):
        turned = [rotate(x, *rotation(jnp.asarray([at]), 8, 10_000.0, x.dtype)) for x, at in ((q, at_q), (k, at_k))]
        return float(jnp.sum(turned[0] * turned[1]))

    # Angles up to 100 radians carry 100 roundoffs.
    tolerance = 8 * 100 * 2**-24 * float(jnp.linalg.norm(q) * jnp.linalg.norm(k))
    assert abs(product(5, 2) - product(98, 95)) < tolerance
    assert abs(product(0, 0) - float(jnp.sum(q * k))) < tolerance
    assert abs(product(5, 2) - product(5, 3)) > 100 * tolerance
    turned = rotate(q, *rotation(jnp.asarray([37]), 8, 10_000.0, q.dtype))
    np.testing.assert_allclose(jnp.linalg.norm(turned), jnp.linalg.norm(q), rtol=1e-6)


def test_cross_entropy_is_nats():
    rng = np.random.default_rng(3)
    logits, targets = rng.standard_normal((2, 3, 10)).astype(np.float32), rng.integers(0, 10, (2, 3))
    probability = np.exp(logits.astype(np.float64))
    probability /= probability.sum(axis=-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probability, targets[..., None], axis=-1)[..., 0])
    np.testing.assert_allclose(cross_entropy(jnp.asarray(logits), jnp.asarray(targets)), expected, rtol=20 * 2**-24)
    # Logits that overflow an exponential do not overflow the loss.
    large = jnp.asarray([[[1000.0, 0.0]]], jnp.float32)
    assert cross_entropy(large, jnp.asarray([[1]])) == 1000


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_as_large_as_their_names_say(name):
    factor = {"m": 1e6, "b": 1e9}[name[-1]]
    config = preset(name)
    specs = flatten_specs(matrix_specs(ByteLM(config, TernaryConfig()), jax.ShapeDtypeStruct((1, 8), jnp.int32)))
    weights = sum(
        spec.out_features * spec.in_features * (config.layers if path.startswith("blocks") else 1)
        for path, spec in specs.items()
    )
    assert weights == pytest.approx(float(name.removeprefix("byte-")[:-1]) * factor, rel=0.1)


def test_presets_take_changes_and_refuse_unknown_names():
    assert preset("byte-3m", tied=True) == replace(PRESETS["byte-3m"], tied=True)
    with pytest.raises(ConfigError, match=r"no preset 'byte-7m'; pass one of byte-0\.4m, .*byte-1b"):
        preset("byte-7m")
    with pytest.raises(ConfigError, match=r"model\.width must be at least 1, got 0"):
        preset("byte-3m", width=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, r"model\.layers must be at least 1, got 0"),
        ({"kv_heads": 3}, r"model\.kv_heads must divide model\.heads, got 3 and 4"),
        ({"head_dim": 5}, r"model\.head_dim must be even .* got 5"),
        ({"dtype": "float16"}, r"model\.dtype must be 'float32' or 'bfloat16', got 'float16'"),
    ],
)
def test_configuration_out_of_range(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)

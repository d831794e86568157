"""Fresh matrices follow the stated distribution and are born packed; damaged state is named leaf and value."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import is_float, values_of

from arbs_jax import state as state_module
from arbs_jax.errors import ConfigError, StateError
from arbs_jax.state import (
    InitConfig,
    MatrixSpec,
    flatten_specs,
    init_matrix,
    init_trits,
    iter_matrices,
    map_matrices,
    validate_matrix,
    validate_tree,
)
from arbs_kernels.codec import unpack_rows

SPEC = MatrixSpec(6, 11, 4)
INITS = [InitConfig(), InitConfig(threshold=1.0)]


@pytest.fixture(scope="module")
def matrix():
    return init_matrix(jax.random.key(0), SPEC)


def normal_share_within(threshold, std):
    """P(|w| <= threshold) for a normal `w`, by summing the density."""
    edges = np.linspace(-threshold, threshold, 20_001)
    middles = (edges[1:] + edges[:-1]) / 2
    return float(np.sum(np.exp(-((middles / std) ** 2) / 2)) / (std * math.sqrt(2 * math.pi)) * (edges[1] - edges[0]))


@pytest.mark.parametrize("init", INITS, ids=lambda init: f"threshold {init.threshold}")
@pytest.mark.parametrize("fan_in", [0, 1, 4096])
def test_trits_are_signs_of_a_normal_beyond_the_threshold(init, fan_in):
    spec = MatrixSpec(300, 400, fan_in=fan_in)
    trits = np.asarray(unpack_rows(init_trits(jax.random.key(3), spec, init), 400))
    share = normal_share_within(init.threshold, 1.0)
    five_sigma = 5 * math.sqrt(share * (1 - share) / trits.size) + 2**-16
    assert abs(np.mean(trits == 0) - share) < five_sigma
    # As many of one sign as of the other, in all, and in no column or row otherwise.
    deviation = math.sqrt(1 - share)
    assert abs(trits.sum()) < 5 * deviation * math.sqrt(trits.size)
    assert np.abs(trits.sum(axis=0)).max() < 6 * deviation * math.sqrt(300)
    assert np.abs(trits.sum(axis=1)).max() < 6 * deviation * math.sqrt(400)


def test_the_default_is_the_scaled_law_and_the_fixed_one():
    for fan_in in (1, 64, 100, 4096):
        scaled_std = min(0.1, 1 / math.sqrt(fan_in))
        assert min(0.05, 0.5 * scaled_std) / scaled_std == pytest.approx(InitConfig().threshold)
    assert pytest.approx(InitConfig().threshold) == 0.05 / 0.1


def test_a_key_determines_the_trits():
    spec = MatrixSpec(20, 30)
    first, again, other = (np.asarray(init_trits(jax.random.key(seed), spec, InitConfig())) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.9


def test_blocks_of_rows_differ_and_are_cropped(monkeypatch):
    monkeypatch.setattr(state_module, "_DRAWN_AT_ONCE", 8 * 40)
    packed = np.asarray(init_trits(jax.random.key(0), MatrixSpec(21, 40), InitConfig()))
    assert packed.shape == (21, 8)
    assert len({row.tobytes() for row in packed}) == 21


@pytest.mark.parametrize("init", INITS, ids=lambda init: f"threshold {init.threshold}")
def test_exponents_follow_the_formula(init):
    for fan_in in (1, 2, 3, 8, 33, 64, 1000, 65_536, 10**7):
        assert init.exponent(fan_in) == min(max(round(math.log2(0.5 / math.sqrt(fan_in))), -8), 0)
    assert init.exponent(64) == -4
    assert InitConfig(exponent_range=(-3, 0)).exponent(10**7) == -3
    assert InitConfig(exponent_range=(2, 5)).exponent(64) == 2


@pytest.mark.parametrize("fan_in", [0, 1])
def test_fresh_leaves(fan_in):
    spec = MatrixSpec(6, 300, 64, fan_in=fan_in)
    fresh = init_matrix(jax.random.key(0), spec)
    validate_matrix("m", fresh, spec)
    assert set(np.unique(fresh["exponent"])) == {InitConfig().exponent(fan_in or 300)}
    assert not np.asarray(fresh["corr"]).any()
    assert fresh["votes"] == 0


def test_a_large_table_is_born_packed():
    spec = MatrixSpec(200_000, 64, 32, fan_in=1)
    made = list(values_of(jax.make_jaxpr(lambda key: init_matrix(key, spec))(jax.random.key(0))))
    assert max(value.size for value in made) < spec.out_features * spec.in_features
    assert not [value for value in made if value.shape and is_float(value)]
    # All together, the four leaves included, they are few enough to prove that the walk saw the inside of the loop.
    assert sum(value.size == state_module._DRAWN_AT_ONCE for value in made) > 3


def test_spec_derives_its_shapes():
    assert (SPEC.shape, SPEC.groups, SPEC.packed) == ((6, 11), 3, 3)
    assert SPEC.leaf_types() == {
        "trits": (np.uint8, (6, 3)),
        "exponent": (np.int8, (6, 3)),
        "corr": (np.int64, (6, 3)),
        "votes": (np.int64, ()),
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MatrixSpec(0, 5), r"at least one row and column, got \(0, 5\)"),
        (lambda: MatrixSpec(5, -1), r"at least one row and column, got \(5, -1\)"),
        (lambda: MatrixSpec(5, 5, 10), r"group_size must be one of \(4, .*\), got 10"),
        (lambda: InitConfig(threshold=-1.0), r"threshold must be in \[0, 4\) standard deviations, got -1.0"),
        (lambda: InitConfig(exponent_range=(0, -8)), r"ordered within .* got \(0, -8\)"),
        (lambda: InitConfig(exponent_range=(-127, 0)), r"within \[-126, 126\], got \(-127, 0\)"),
    ],
)
def test_configuration_out_of_range(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_valid_state_passes_alone_and_stacked(matrix):
    validate_matrix("m", matrix, SPEC)
    validate_matrix("m", jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), matrix), SPEC)
    validate_matrix("m", matrix | {"momentum": jnp.zeros((6, 11), jnp.int8)}, SPEC)


WRONG = {
    "narrowed accumulator": (
        {"corr": np.zeros((6, 3), np.int32)},
        r"a/m/corr must be int64, got int32 \(int64 narrowed by a transfer or a load\?\)",
    ),
    "narrowed counter": ({"votes": np.zeros((), np.int32)}, "a/m/votes must be int64, got int32"),
    "float accumulator": ({"corr": np.zeros((6, 3), np.float32)}, "a/m/corr must be int64, got float32"),
    "signed bytes": ({"trits": np.full((6, 3), 127, np.int8)}, "a/m/trits must be uint8, got int8"),
    "another shape": (
        {"exponent": np.zeros((6, 4), np.int8)},
        r"a/m/exponent must have shape \(6, 3\) .* got \(6, 4\)",
    ),
    "a missing axis": ({"corr": np.zeros((3,), np.int64)}, r"a/m/corr must have shape \(6, 3\) .* got \(3,\)"),
    "two layer axes": ({"trits": np.ones((1, 1, 6, 3), np.uint8)}, r"a/m/trits must have shape .* got \(1, 1, 6, 3\)"),
    "a layer axis of its own": (
        {"corr": np.zeros((2, 6, 3), np.int64)},
        r"a/m/corr has layer axis \(2,\), the leaves before it \(\)",
    ),
    "a stacked counter": ({"votes": np.zeros((2,), np.int64)}, r"a/m/votes has layer axis \(2,\)"),
    "float state of a rule": (
        {"momentum": np.zeros((6, 11), np.float32)},
        "a/m/momentum must be an integer array, got float32",
    ),
    "negative votes": ({"votes": np.array(-7, np.int64)}, "a/m/votes must be at least 0, got -7"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_validation_names_the_leaf_and_both_values(matrix, changes, message):
    with pytest.raises(StateError, match=message):
        validate_matrix("a/m", matrix | changes, SPEC)


def test_validation_finds_bytes_that_are_no_code(matrix):
    trits = np.asarray(matrix["trits"]).copy()
    unused = sorted(set(range(256)) - {-(-value * 256 // 243) for value in range(243)})
    assert len(unused) == 13
    trits[0, 0], trits[2, 1] = unused[0], unused[-1]
    with pytest.raises(StateError, match="a/m/trits holds 2 bytes that are no code"):
        validate_matrix("a/m", matrix | {"trits": trits}, SPEC)


@pytest.mark.parametrize("name", ["trits", "exponent", "corr", "votes"])
def test_validation_misses_a_missing_leaf(matrix, name):
    with pytest.raises(StateError, match=f"a/m/{name} is missing; .* trits, exponent, corr, votes"):
        validate_matrix("a/m", {key: leaf for key, leaf in matrix.items() if key != name}, SPEC)


def test_trees_are_compared_by_path(matrix):
    specs = {"b": {"one": SPEC, "two": SPEC}, "a": SPEC}
    tree = {"a": matrix, "b": {"two": matrix, "one": matrix}}
    validate_tree(tree, specs)
    with pytest.raises(StateError, match=r"missing matrices \['b/two'\], unknown matrices \['c'\]"):
        validate_tree({"a": matrix, "b": {"one": matrix}, "c": matrix}, specs)
    with pytest.raises(StateError, match=r"missing matrices \['a'\], unknown matrices \[\]"):
        validate_tree(tree | {"a": {name: matrix[name] for name in ("trits", "corr")}}, specs)
    with pytest.raises(StateError, match="b/two/corr must be int64, got int8"):
        validate_tree({"a": matrix, "b": {"one": matrix, "two": matrix | {"corr": matrix["exponent"]}}}, specs)


def test_walks_over_trees(matrix):
    tree = {"b": {"two": matrix, "one": matrix}, "a": matrix}
    assert [path for path, _ in iter_matrices(tree)] == ["a", "b/one", "b/two"]
    assert list(flatten_specs({"b": {"two": SPEC, "one": SPEC}, "a": SPEC})) == ["a", "b/one", "b/two"]
    assert map_matrices(lambda path, _, other: (path, other), tree, {"a": 1, "b": {"one": 2, "two": 3}}) == {
        "b": {"two": ("b/two", 3), "one": ("b/one", 2)},
        "a": ("a", 1),
    }
    assert map_matrices(lambda path, _: path, matrix) == ""

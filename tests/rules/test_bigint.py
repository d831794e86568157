"""`bigint` replays the source system's layer: vectors made by running it, through the public path.

Further vectors in a folder named by ARBS_ORACLE_DIR are replayed as well.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_trees_equal, int64

from arbs_jax import BigInt, TernaryConfig, TernaryDense, matrix_specs, update, value_and_votes
from arbs_jax.errors import ConfigError
from arbs_jax.state import MatrixSpec, validate_matrix
from arbs_jax.votes import decode_tree
from arbs_kernels.codec import pack_flat, pack_rows, unpack_flat, unpack_rows

FOLDERS = [Path(__file__).parent.parent / "oracle"]
if "ARBS_ORACLE_DIR" in os.environ:
    FOLDERS.append(Path(os.environ["ARBS_ORACLE_DIR"]))
VECTORS = [path for folder in FOLDERS for path in sorted(folder.glob("*.npz"))]
RULE = BigInt()


def test_every_folder_holds_vectors():
    assert all(any(path.parent == folder for path in VECTORS) for folder in FOLDERS)


def close(got, expected, atol=0.0):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_replays(path):
    data = np.load(path)
    rows, columns, group_size = (int(data[name]) for name in ("out_dim", "in_dim", "group_size"))
    spec = MatrixSpec(rows, columns, group_size)
    trits = unpack_flat(data["T_packed"], rows, columns)
    ternary = {
        "trits": pack_rows(jnp.asarray(trits)),
        "exponent": jnp.asarray(data["E"].reshape(rows, spec.groups)),
        "corr": jnp.zeros((rows, spec.groups), jnp.int64),
        "votes": jnp.zeros((), jnp.int64),
    }
    validate_matrix(path.stem, ternary, spec)
    model = TernaryDense(features=rows, config=TernaryConfig(rule=RULE, group_size=group_size))
    x0 = jnp.asarray(data["x0"])
    assert matrix_specs(model, x0) == spec

    def loss(variables, x, gy):
        y = model.apply(variables, x)
        return jnp.sum(y * gy), y

    @jax.jit
    def step(ternary, x, gy, t):
        votes = value_and_votes(lambda *arguments: loss(*arguments)[0], RULE, spec)(ternary, x, gy)[1]
        gx, y = jax.grad(lambda x: loss({"ternary": ternary}, x, gy), has_aux=True)(x)
        return update(RULE, spec, ternary, votes, t), votes, y, gx, weight(ternary)

    def weight(ternary):
        return decode_tree(ternary, spec, RULE, jnp.float32)["weight"]

    for t in range(int(data["steps"])):
        x, gy = jnp.asarray(data[f"x{t}"]), jnp.asarray(data[f"gy{t}"])
        ternary, votes, y, gx, w = step(ternary, x, gy, t)
        close(w, data[f"w{t}"])
        # Sums may cancel: what is within 1e-5 is measured against the size of their terms.
        close(y, data[f"y{t}"], atol=1e-5 * np.max(np.abs(data[f"x{t}"]) @ np.abs(data[f"w{t}"]).T))
        close(gx, data[f"gx{t}"], atol=1e-5 * np.max(np.abs(data[f"gy{t}"]) @ np.abs(data[f"w{t}"])))
        np.testing.assert_array_equal(votes["score"], data[f"score{t}"])
        assert int(votes["count"]) == 1
        np.testing.assert_array_equal(ternary["corr"], data[f"corr{t}"].reshape(rows, spec.groups), strict=True)
        assert int(ternary["votes"]) == int(data[f"step{t}"].item()) == t + 1
    close(weight(ternary), data["w_final"])
    unmoved = np.asarray(unpack_rows(ternary["trits"], columns))
    np.testing.assert_array_equal(unmoved, data["T"], strict=True)
    np.testing.assert_array_equal(pack_flat(unmoved), data["T_packed"], strict=True)
    np.testing.assert_array_equal(np.asarray(ternary["exponent"]).reshape(-1), data["E"], strict=True)
    validate_matrix(path.stem, ternary, spec)


def leaves(exponent, corr, votes):
    return {"exponent": jnp.asarray(exponent, jnp.int8), "corr": int64(corr), "votes": int64(votes)}


@pytest.mark.parametrize("strength", [4.0, 16.0, 0.5])
def test_the_scale_is_the_running_mean(strength):
    rng = np.random.default_rng(0)
    exponent, corr = rng.integers(-8, 1, (9, 5)), rng.integers(-(2**45), 2**45, (9, 5))
    votes, group_size = 2**42 + 1, 32
    scale = BigInt(strength).scale(leaves(exponent, corr, votes), group_size)
    assert scale.dtype == jnp.float32
    shift = strength * corr / (votes * float(group_size))
    # c, n and two products rounded to float32, an addition of up to 2^4, and the exponential's own roundoffs.
    bound = np.log(2) * (np.abs(shift) * 5 + np.abs(exponent + shift)) * 2**-24 + 4 * 2**-24
    np.testing.assert_array_less(np.abs(np.asarray(scale) / 2.0 ** (exponent + shift) - 1), bound)


def test_without_votes_the_scale_is_the_base():
    np.testing.assert_array_equal(RULE.scale(leaves([[-3, 0]], [[5, -(2**40)]], 0), 8), [[0.125, 1.0]])


def test_unanimous_votes_shift_by_the_strength():
    """After any number of votes with every column agreeing, the scale has moved by 2^4; against, by 2^-4."""
    for votes in (1, 2, 1000):
        scale = RULE.scale(leaves([[0, 0]], [[32 * votes, -32 * votes]], votes), 32)
        np.testing.assert_allclose(scale, [[16.0, 1 / 16]], rtol=2**-20)


def test_update_subtracts_in_64_bits():
    state = leaves([[0, 0]], [[2**40, -(2**62)]], 2**40) | {"trits": jnp.zeros((1, 1), jnp.uint8)}
    votes = {"score": jnp.asarray([[-7, 5]], jnp.int32), "count": jnp.asarray(3, jnp.int32)}
    after = jax.jit(lambda m, v: RULE.update(m, v, MatrixSpec(1, 5, 4), jnp.int32(0), jax.random.key(0))[0])(
        state, votes
    )
    assert_trees_equal(
        after, leaves([[0, 0]], [[2**40 + 7, -(2**62) - 5]], 2**40 + 3) | {"trits": jnp.zeros((1, 1), jnp.uint8)}
    )


def test_stacked_leaves_are_scaled_layer_by_layer():
    one, two = leaves([[0, -1]], [[3, -4]], 2), leaves([[-2, -8]], [[-9, 1]], 5)
    stacked = jax.tree.map(lambda *both: jnp.stack(both), one, two)
    expected = [RULE.scale(one, 4), RULE.scale(two, 4)]
    np.testing.assert_array_equal(RULE.scale(stacked, 4), expected)


def test_votes_are_rounded_to_integers():
    collected = {"score": jnp.asarray([[3.0, -32.0]], jnp.float32), "count": jnp.asarray(2.0, jnp.float32)}
    votes = RULE.vote(collected, {}, MatrixSpec(1, 5, 4), jax.random.key(0))
    assert_trees_equal(votes, {"score": jnp.asarray([[3, -32]], jnp.int32), "count": jnp.asarray(2, jnp.int32)})


@pytest.mark.parametrize("strength", [0, -1.0, float("nan")])
def test_strength_must_be_positive(strength):
    with pytest.raises(ConfigError, match=f"must be positive, got {strength}"):
        BigInt(strength)

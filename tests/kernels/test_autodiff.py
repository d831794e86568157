"""Input gradients and votes through `jax.grad`, under every transformation, and what is kept for backward."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import PowerLaw, assert_trees_equal, is_float, score_by_hand, values_of

from arbs_kernels.autodiff import (
    JOINED_ROWS,
    MatmulSpec,
    make_probe,
    ternary_gather,
    ternary_matmul,
    ternary_matmuls,
)
from arbs_kernels.codec import pack_rows

N, K, G, M = 14, 33, 8, 3


SPEC = MatmulSpec(K, G, PowerLaw())


@dataclass(frozen=True)
class Problem:
    leaves: dict
    trits: np.ndarray
    weight: np.ndarray


def problem(seed, rows=N):
    rng = np.random.default_rng(seed)
    trits = rng.integers(-1, 2, (rows, K)).astype(np.int8)
    exponent = rng.integers(-2, 2, (rows, -(-K // G))).astype(np.int8)
    leaves = {"trits": pack_rows(jnp.asarray(trits)), "exponent": jnp.asarray(exponent)}
    return Problem(leaves, trits, trits * 2.0 ** exponent[:, np.arange(K) // G])


def integers(seed, *shape):
    return np.random.default_rng([seed, *shape]).integers(-3, 4, shape).astype(np.float32)


def probe(kind="score"):
    return make_probe(kind, N, K, G)


def votes_of(function):
    """Gradient of `function(probe)` at the zero score probe."""
    return jax.grad(function)(probe())


@pytest.fixture(scope="module")
def one():
    return problem(0)


def test_gradients_and_score_equal_numpy(one):
    x, gy = integers(1, M, K), integers(2, M, N)

    def loss(x, probe):
        return jnp.sum(ternary_matmul(x, one.leaves, SPEC, probe) * gy)

    value, (dx, votes) = jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(x), probe())
    assert value == np.sum((x @ one.weight.T) * gy)
    np.testing.assert_array_equal(dx, (gy @ one.weight).astype(np.float32), strict=True)
    np.testing.assert_array_equal(votes["score"], score_by_hand(gy.T @ x, one.trits, G))
    assert votes["score"].dtype == jnp.float32
    assert votes["count"] == 1


@pytest.mark.parametrize("M", [M, JOINED_ROWS])
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("kinds", [("gradient",) * 3, ("score",) * 3, ("score", None, "gradient")])
def test_several_matrices_of_one_input_are_as_each_alone(kinds, float8, M):
    """Small integers and powers of two: sums are exact in any order."""
    sizes = (14, 3, 8)
    problems = [problem(seed, rows) for seed, rows in enumerate(sizes)]
    x, gys = integers(1, M, K), [integers(seed, M, rows) for seed, rows in enumerate(sizes)]
    probes = [kind and make_probe(kind, rows, K, G) for kind, rows in zip(kinds, sizes, strict=True)]
    spec = MatmulSpec(K, G, PowerLaw(), float8=float8)

    @jax.jit
    def pulled(x, probes):
        run = lambda x, probes: ternary_matmuls(x, [one.leaves for one in problems], spec, probes)  # noqa: E731
        ys, pull = jax.vjp(run, x, probes)
        return ys, pull(tuple(map(jnp.asarray, gys)))

    ys, (dx, votes) = pulled(jnp.asarray(x), probes)
    np.testing.assert_array_equal(dx, sum(gy @ one.weight for gy, one in zip(gys, problems, strict=True)))
    for y, gy, one, kind, vote in zip(ys, gys, problems, kinds, votes, strict=True):
        np.testing.assert_array_equal(y, x @ one.weight.T)
        if kind is None:
            assert vote is None
            continue
        expected = score_by_hand(gy.T @ x, one.trits, G) if kind == "score" else gy.T @ x
        np.testing.assert_array_equal(vote[kind], expected)
        assert vote["count"] == 1


def test_the_gradient_probe_is_the_weight_gradient(one):
    x, gy = integers(1, M, K), integers(2, M, N)
    votes = jax.grad(lambda probe: jnp.sum(ternary_matmul(jnp.asarray(x), one.leaves, SPEC, probe) * gy))(
        probe("gradient")
    )
    np.testing.assert_array_equal(votes["gradient"], gy.T @ x, strict=True)
    assert votes["count"] == 1


def test_the_probe_decides_what_is_collected(one):
    x = jnp.ones((M, K), jnp.float32)
    both = probe() | probe("gradient")
    for keys in (("score",), ("count",), ("score", "gradient", "count")):
        asked = {key: both[key] for key in keys}
        votes = jax.grad(lambda p: jnp.sum(ternary_matmul(x, one.leaves, SPEC, p)))(asked)
        assert set(votes) == set(keys)
        assert jax.tree.map(jnp.shape, votes) == jax.tree.map(jnp.shape, asked)


def test_without_a_probe_activations_still_get_their_gradient(one):
    x, gy = integers(3, 2, 5, K), integers(4, 2, 5, N)
    y, pull = jax.vjp(lambda x: ternary_matmul(x, one.leaves, SPEC), jnp.asarray(x))
    assert y.shape == (2, 5, N)
    np.testing.assert_array_equal(y, x @ one.weight.T)
    np.testing.assert_array_equal(pull(jnp.asarray(gy))[0], gy @ one.weight)


def test_short_activations_keep_their_dtype_and_the_exact_score(one):
    x, gy = integers(1, M, K), integers(2, M, N)
    function = lambda x, p: jnp.sum(ternary_matmul(x, one.leaves, SPEC, p) * jnp.asarray(gy, jnp.bfloat16))  # noqa: E731
    dx, votes = jax.grad(function, argnums=(0, 1))(jnp.asarray(x, jnp.bfloat16), probe())
    assert dx.dtype == jnp.bfloat16
    assert votes["score"].dtype == jnp.float32
    np.testing.assert_array_equal(votes["score"], score_by_hand(gy.T @ x, one.trits, G))


def test_gathered_rows_vote_once_a_call_with_repeats_summed(one):
    ids = np.array([[3, 5, 3], [0, 3, 13]])
    gy = integers(5, 2, 3, K)

    def loss(probe):
        rows = ternary_gather(jnp.asarray(ids, jnp.int32), one.leaves, SPEC, jnp.float32, probe)
        return jnp.sum(rows * gy)

    dw = np.zeros((N, K), np.float32)
    np.add.at(dw, ids.reshape(-1), gy.reshape(-1, K))
    value, votes = jax.value_and_grad(loss)(probe())
    assert value == np.sum(one.weight[ids] * gy)
    np.testing.assert_array_equal(votes["score"], score_by_hand(dw, one.trits, G))
    assert votes["count"] == 1
    np.testing.assert_array_equal(jax.grad(loss)(probe("gradient"))["gradient"], dw, strict=True)
    # Rows that nobody asked for have no gradient and cast no vote.
    absent = np.setdiff1d(np.arange(N), ids)
    assert not np.asarray(votes["score"])[absent].any()


def test_every_use_is_a_vote_of_its_own(one):
    xs, gys = integers(6, 2, M, K), integers(7, 2, M, N)

    def loss(probe):
        return sum(
            jnp.sum(ternary_matmul(jnp.asarray(x), one.leaves, SPEC, probe) * gy) for x, gy in zip(xs, gys, strict=True)
        )

    votes = votes_of(loss)
    expected = sum(score_by_hand(gy.T @ x, one.trits, G) for x, gy in zip(xs, gys, strict=True))
    np.testing.assert_array_equal(votes["score"], expected)
    assert votes["count"] == 2
    # Signs are taken before the uses are summed: this is not the score of the summed gradient.
    assert (expected != score_by_hand(sum(gy.T @ x for x, gy in zip(xs, gys, strict=True)), one.trits, G)).any()


def test_a_loop_over_one_matrix_counts_its_turns(one):
    xs, gys = integers(8, 5, M, K), integers(9, 5, M, N)

    def loss(probe):
        def turn(total, entry):
            x, gy = entry
            return total + jnp.sum(ternary_matmul(x, one.leaves, SPEC, probe) * gy), None

        return jax.lax.scan(turn, jnp.float32(0), (jnp.asarray(xs), jnp.asarray(gys)))[0]

    votes = jax.jit(votes_of, static_argnums=0)(loss)
    np.testing.assert_array_equal(
        votes["score"], sum(score_by_hand(gy.T @ x, one.trits, G) for x, gy in zip(xs, gys, strict=True))
    )
    assert votes["count"] == 5


def test_transformations_agree_with_a_loop_over_layers():
    """jit, lax.scan over stacked layers and jax.checkpoint change neither gradients nor votes."""
    square = MatmulSpec(K, G, PowerLaw())
    layers = []
    for seed in range(3):
        rng = np.random.default_rng([20, seed])
        trits = rng.integers(-1, 2, (K, K)).astype(np.int8)
        layers.append({"trits": pack_rows(jnp.asarray(trits)), "exponent": jnp.full((K, 5), -3, jnp.int8)})
    x = jnp.asarray(integers(10, M, K))
    single = make_probe("score", K, K, G)
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731

    def layer(x, leaves, probe):
        return jnp.tanh(ternary_matmul(x, leaves, square, probe))

    def looped(x, probes):
        for leaves, probe in zip(layers, probes, strict=True):
            x = layer(x, leaves, probe)
        return jnp.sum(x * x)

    def scanned(body):
        def loss(x, probes):
            step = lambda x, entry: (body(x, *entry), None)  # noqa: E731
            return jnp.sum(jax.lax.scan(step, x, (stack(layers), probes))[0] ** 2)

        return loss

    dx, votes = jax.grad(looped, argnums=(0, 1))(x, [single] * 3)
    # Float sums may be ordered otherwise after compilation: three layers of 33-term sums, gains below 2.
    tolerance = 3 * 8 * 40 * 2.0**-24 * float(jnp.abs(dx).max())
    for body in (layer, jax.checkpoint(layer)):
        got_dx, got_votes = jax.jit(jax.grad(scanned(body), argnums=(0, 1)))(x, stack([single] * 3))
        np.testing.assert_allclose(got_dx, dx, rtol=0, atol=tolerance)
        assert_trees_equal(got_votes, stack(votes))
        np.testing.assert_array_equal(got_votes["count"], [1, 1, 1])


def test_vmap_votes_per_example_or_sums_them(one):
    xs, gys = integers(11, 4, M, K), integers(12, 4, M, N)
    scores = [score_by_hand(gy.T @ x, one.trits, G) for x, gy in zip(xs, gys, strict=True)]

    def loss(probe, x, gy):
        return jnp.sum(ternary_matmul(x, one.leaves, SPEC, probe) * gy)

    each = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(probe(), jnp.asarray(xs), jnp.asarray(gys))
    np.testing.assert_array_equal(each["score"], scores)
    np.testing.assert_array_equal(each["count"], np.ones(4))

    def total(probe):
        return jnp.sum(jax.vmap(loss, in_axes=(None, 0, 0))(probe, jnp.asarray(xs), jnp.asarray(gys)))

    together = votes_of(total)
    np.testing.assert_array_equal(together["score"], sum(scores))
    assert together["count"] == 4


def test_vmap_over_matrices():
    problems = [problem(seed) for seed in (30, 31)]
    leaves = jax.tree.map(lambda *both: jnp.stack(both), *(p.leaves for p in problems))
    x, gy = integers(1, M, K), integers(2, M, N)
    function = lambda leaves, p: jnp.sum(ternary_matmul(jnp.asarray(x), leaves, SPEC, p) * gy)  # noqa: E731
    votes = jax.vmap(jax.grad(function, argnums=1), in_axes=(0, None))(leaves, probe())
    np.testing.assert_array_equal(votes["score"], [score_by_hand(gy.T @ x, p.trits, G) for p in problems])


@pytest.mark.parametrize("kind", ["score", "gradient"])
@pytest.mark.parametrize("operator", ["matmul", "gather"])
def test_nothing_of_the_weights_shape_is_kept_for_backward(one, kind, operator):
    x = jnp.ones((M, K), jnp.float32)
    ids = jnp.zeros((M,), jnp.int32)

    def run(x, probe):
        if operator == "gather":
            return ternary_gather(ids, one.leaves, SPEC, jnp.float32, probe)
        return ternary_matmul(x, one.leaves, SPEC, probe)

    kept = jax.tree.leaves(jax.vjp(run, x, probe(kind))[1])
    floats = [leaf for leaf in kept if is_float(leaf)]
    # Of floats, the activations alone; of integers, nothing beyond the state itself.
    assert all(leaf.shape == x.shape for leaf in floats)
    assert len(floats) == (operator == "matmul")
    assert all(leaf.size < N * K for leaf in kept if not is_float(leaf))


def test_a_scan_over_layers_keeps_only_its_activations():
    """The residuals of a stack, as the loop carries them: nothing in floats but each layer's input."""
    layers = 4
    leaves = {"trits": jnp.zeros((layers, K, 7), jnp.uint8), "exponent": jnp.zeros((layers, K, 5), jnp.int8)}
    probes = jax.tree.map(lambda leaf: jnp.stack([leaf] * layers), make_probe("gradient", K, K, G))

    def run(x, probes):
        step = lambda x, entry: (ternary_matmul(x, entry[0], SPEC, entry[1]), None)  # noqa: E731
        return jax.lax.scan(step, x, (leaves, probes))[0]

    x = jnp.ones((1, K), jnp.float32)
    kept = [leaf for leaf in jax.tree.leaves(jax.vjp(run, x, probes)[1]) if is_float(leaf)]
    assert layers * x.size <= sum(leaf.size for leaf in kept) <= (layers + 1) * x.size
    # The weight does exist inside a turn of the loop, but of one layer at a time (scales are repeated to whole groups).
    largest = max(value.size for value in values_of(jax.make_jaxpr(run)(x, probes)) if is_float(value))
    assert K * K <= largest <= K * 5 * G


def test_make_probe():
    shapes = jax.tree.map(jnp.shape, make_probe("score", 3, 33, 32))
    assert shapes == {"score": (3, 2), "count": ()}
    shapes = jax.tree.map(jnp.shape, make_probe("gradient", 3, 33, 32))
    assert shapes == {"gradient": (3, 33), "count": ()}
    leaves = jax.tree.leaves(make_probe("gradient", 3, 33, 32))
    assert all(leaf.dtype == jnp.float32 and not leaf.any() for leaf in leaves)
    with pytest.raises(ValueError, match="'score' or 'gradient', got 'hessian'"):
        make_probe("hessian", 3, 33, 32)


def test_a_wrong_dtype_of_activations_is_an_error(one):
    with pytest.raises(ValueError, match="must be float32 or bfloat16, got int32"):
        ternary_matmul(jnp.ones((M, K), jnp.int32), one.leaves, SPEC)

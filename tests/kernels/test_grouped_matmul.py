"""Products of rows sorted by expert against NumPy in float64, for every implementation; scores exactly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import activations, product_bound, random_matrix, score_by_hand, values_of

from arbs_kernels import backends
from arbs_kernels.grouped_matmul import (
    grouped_matmul,
    grouped_matmul_input_gradient,
    grouped_score,
    grouped_weight_gradient,
    reference,
)
from arbs_kernels.selection import UnsupportedError

# Rows, rows of each expert, N, K, G.
CASES = {
    "one expert": (7, [7], 5, 33, 32),
    "one row each": (3, [1, 1, 1], 4, 6, 4),
    "empty experts at both ends": (13, [0, 0, 5, 0, 8, 0], 17, 81, 16),
    "rows of no expert": (20, [3, 9, 2], 9, 40, 12),
    "more rows promised than there are": (10, [4, 9, 3], 6, 20, 8),
    "nobody has a row": (6, [0, 0], 3, 10, 6),
    "no rows": (0, [0, 0], 3, 10, 6),
    "blocks of every length": (41, [16, 1, 7, 8, 9], 12, 70, 64),
    "short last group": (19, [4, 11, 4], 31, 257, 128),
    "few rows for many": (5, [0, 1, 0, 2, 1, 0, 1], 40, 96, 32),
    "more than a tile": (300, [150, 0, 129], 40, 96, 32),
}


def stacked(rng, experts, out_features, in_features, group_size):
    matrices = [random_matrix(rng, out_features, in_features, group_size) for _ in range(experts)]
    return matrices, jnp.stack([m.trits for m in matrices]), jnp.stack([m.scale for m in matrices])


def spans(sizes, rows):
    ends = np.minimum(np.cumsum(sizes), rows)
    return list(zip(np.concatenate([[0], ends[:-1]]), ends, strict=True))


@pytest.fixture(params=[8, 256], ids="blocks of {}".format)
def block(request, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", request.param)


class GroupedMatmul:
    """What holds for every implementation; a backend adds a subclass that names it."""

    implementation: str

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_products(self, case, dtype):
        rows, sizes, out_features, in_features, group_size = case
        rng = np.random.default_rng([21, rows])
        matrices, trits, scale = stacked(rng, len(sizes), out_features, in_features, group_size)
        x, exact_x = activations(rng, (rows, in_features), dtype)
        dy, exact_dy = activations(rng, (rows, out_features), dtype)
        static = {"group_size": group_size, "implementation": self.implementation}

        def both(x, dy, sizes, trits, scale):
            y = grouped_matmul(x, sizes, trits, scale, **static)
            return y, grouped_matmul_input_gradient(dy, sizes, trits, scale, in_features=in_features, **static)

        y, dx = jax.jit(both)(x, dy, jnp.asarray(sizes, jnp.int32), trits, scale)
        assert y.dtype == dx.dtype == dtype
        assert y.shape == (rows, out_features)
        assert dx.shape == (rows, in_features)
        y, dx = (np.asarray(value).astype(np.float64) for value in (y, dx))
        for matrix, (begin, end) in zip(matrices, spans(sizes, rows), strict=True):
            for got, left, right in ((y, exact_x, matrix.weight.T), (dx, exact_dy, matrix.weight)):
                bound = product_bound(left[begin:end], right, dtype)
                assert (np.abs(got[begin:end] - left[begin:end] @ right) <= bound).all()
        assert not y[sum(sizes) :].any()
        assert not dx[sum(sizes) :].any()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_scores(self, case, dtype):
        rows, sizes, out_features, in_features, group_size = case
        rng = np.random.default_rng([22, rows])
        matrices, trits, _ = stacked(rng, len(sizes), out_features, in_features, group_size)
        # Small integers: sums are exact in any order, and some are exactly 0.
        x, dy = (rng.integers(-3, 4, (rows, width)) for width in (in_features, out_features))
        run = jax.jit(grouped_score, static_argnames=("group_size", "implementation"))
        score = run(
            jnp.asarray(x, dtype),
            jnp.asarray(dy, dtype),
            jnp.asarray(sizes, jnp.int32),
            trits,
            group_size=group_size,
            implementation=self.implementation,
        )
        assert score.dtype == jnp.int32
        for expert, (begin, end) in enumerate(spans(sizes, rows)):
            expected = score_by_hand(dy[begin:end].T @ x[begin:end], matrices[expert].dense_trits, group_size)
            np.testing.assert_array_equal(score[expert], expected)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_weight_gradients(self, case, dtype):
        rows, sizes, out_features, in_features, _ = case
        rng = np.random.default_rng([27, rows])
        # Small integers: sums are exact in any order, and in either dtype of the result.
        x, dy = (rng.integers(-1, 2, (rows, width)) for width in (in_features, out_features))
        run = jax.jit(grouped_weight_gradient, static_argnames=("dtype", "implementation"))
        arrays = (jnp.asarray(x, dtype), jnp.asarray(dy, dtype), jnp.asarray(sizes, jnp.int32))
        gradients = run(*arrays, dtype=jnp.dtype(dtype), implementation=self.implementation)
        assert gradients.dtype == dtype
        assert gradients.shape == (len(sizes), out_features, in_features)
        for expert, (begin, end) in enumerate(spans(sizes, rows)):
            np.testing.assert_array_equal(gradients[expert].astype(jnp.float32), dy[begin:end].T @ x[begin:end])

    def test_an_infinite_row_stays_with_its_expert(self):
        _, trits, scale = stacked(np.random.default_rng(23), 3, 4, 10, 4)
        x = jnp.ones((9, 10), jnp.float32).at[4].set(jnp.inf)
        sizes = jnp.asarray([4, 1, 3], jnp.int32)
        y = grouped_matmul(x, sizes, trits, scale, group_size=4, implementation=self.implementation)
        assert np.isfinite(np.delete(np.asarray(y), 4, axis=0)).all()

    def test_vmap(self):
        _, trits, scale = stacked(np.random.default_rng(24), 2, 4, 10, 4)
        x = jnp.asarray(np.random.default_rng(25).standard_normal((3, 9, 10)), jnp.float32)
        sizes = jnp.asarray([[9, 0], [2, 5], [0, 1]], jnp.int32)

        def run(x, sizes):
            return grouped_matmul(x, sizes, trits, scale, group_size=4, implementation=self.implementation)

        together = jax.vmap(run)(x, sizes)
        for one, rows, size in zip(together, x, sizes, strict=True):
            np.testing.assert_allclose(one, run(rows, size), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("block")
class TestXla(GroupedMatmul):
    implementation = "xla"

    def test_one_weight_is_dense_at_a_time(self):
        _, trits, scale = stacked(np.random.default_rng(26), 50, 30, 40, 4)
        sizes = jnp.full((50,), 2, jnp.int32)
        x = jnp.ones((100, 40), jnp.bfloat16)
        traced = jax.make_jaxpr(lambda x: grouped_matmul(x, sizes, trits, scale, group_size=4))(x)
        assert max(value.size for value in values_of(traced)) < 100 * 40 * 3


@pytest.mark.skipif(backends.triton_missing() is not None, reason=f"needs {backends.triton_missing()}")
class TestTriton(GroupedMatmul):
    implementation = "triton"

    @pytest.mark.parametrize(
        ("rows", "experts", "out_features", "refused"),
        [
            (2**28, 1, 1, "x"),
            (2, 2**20, 2**11, "trits"),
            (2, 2**18, 3 * 2**10, "scale"),
            (2**20, 2, 2**11, "the result"),
        ],
    )
    def test_refuses_what_32_bits_do_not_address(self, rows, experts, out_features, refused):
        shapes = {"x": (rows, 10), "trits": (experts, out_features, 2), "scale": (experts, out_features, 3)}
        x, trits, scale = (
            jax.ShapeDtypeStruct(shape, jnp.uint8 if name == "trits" else jnp.float32) for name, shape in shapes.items()
        )
        sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
        run = partial(grouped_matmul, group_size=4, implementation="triton")
        with pytest.raises(
            UnsupportedError, match=f"takes at most {2**31 - 1} elements of {refused}, got .*pass 'xla'"
        ):
            jax.eval_shape(run, x, sizes, trits, scale)


def given(**changes):
    plain = {
        "x": jnp.ones((2, 10), jnp.float32),
        "dy": jnp.ones((2, 3), jnp.float32),
        "group_sizes": jnp.ones((2,), jnp.int32),
        "trits": jnp.zeros((2, 3, 2), jnp.uint8),
        "scale": jnp.ones((2, 3, 2), jnp.float32),
        "in_features": 10,
        "group_size": 8,
        "implementation": None,
    }
    return plain | changes


NAMES = {
    grouped_matmul: ("x", "group_sizes", "trits", "scale", "group_size", "implementation"),
    grouped_matmul_input_gradient: (
        "dy",
        "group_sizes",
        "trits",
        "scale",
        "in_features",
        "group_size",
        "implementation",
    ),
    grouped_score: ("x", "dy", "group_sizes", "trits", "group_size", "implementation"),
}
ARGUMENTS = NAMES | {grouped_weight_gradient: ("x", "dy", "group_sizes", "implementation")}


@pytest.mark.parametrize("operator", NAMES, ids=lambda operator: operator.__name__)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_sizes": jnp.ones((2,), jnp.float32)}, r"group_sizes must be int32 \(X,\), got float32 \(2,\)"),
        ({"group_sizes": jnp.ones((3,), jnp.int32)}, r"each of the 3 group_sizes, got uint8 \(2, 3, 2\)"),
        ({"trits": jnp.zeros((3, 2), jnp.uint8)}, r"trits must be uint8 \(X, N, P\) .* got uint8 \(3, 2\)"),
        ({"group_size": 7}, "group_size must be one of .*, got 7"),
        ({"trits": jnp.zeros((2, 3, 3), jnp.uint8)}, r"trits must be uint8 \(N, 2\) .* got uint8 \(3, 3\)"),
    ],
)
def test_every_operator_refuses(operator, changes, message):
    with pytest.raises(ValueError, match=f"{operator.__name__}: .*{message}"):
        operator(**{name: given(**changes)[name] for name in NAMES[operator]})


@pytest.mark.parametrize("operator", ARGUMENTS, ids=lambda operator: operator.__name__)
def test_an_unknown_implementation_is_an_error_that_lists_the_known(operator):
    with pytest.raises(
        UnsupportedError, match=f"{operator.__name__} has no implementation 'abacus'; pass one of .*xla"
    ):
        operator(**{name: given(implementation="abacus")[name] for name in ARGUMENTS[operator]})


@pytest.mark.parametrize(
    ("operator", "changes", "message"),
    [
        (grouped_matmul, {"x": jnp.ones((2, 10), jnp.int8)}, "x must be float32 or bfloat16, got int8"),
        (grouped_matmul, {"scale": jnp.ones((2, 2), jnp.float32)}, r"2 experts on three axes, got \(2, 2\)"),
        (grouped_matmul, {"scale": jnp.ones((2, 3, 1), jnp.float32)}, r"scale must be float32 \(3, 2\)"),
        (grouped_matmul_input_gradient, {"dy": jnp.ones((2, 4), jnp.float32)}, r"dy must have shape \(M, 3\)"),
        (grouped_score, {"dy": jnp.ones((5, 3), jnp.float32)}, "agree in rows and dtype"),
        (grouped_score, {"dy": jnp.ones((2, 3), jnp.bfloat16)}, "agree in rows and dtype"),
        (grouped_weight_gradient, {"dy": jnp.ones((5, 3), jnp.float32)}, "agree in rows and dtype"),
        (grouped_weight_gradient, {"group_sizes": jnp.ones((2,), jnp.float32)}, r"must be int32 \(X,\), got float32"),
    ],
)
def test_one_operator_refuses(operator, changes, message):
    with pytest.raises(ValueError, match=f"{operator.__name__}: .*{message}"):
        operator(**{name: given(**changes)[name] for name in ARGUMENTS[operator]})

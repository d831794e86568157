"""The score against NumPy, for every implementation: exact wherever the gradient has a sign."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROUNDOFF, activations, random_matrix, score_by_hand

from arbs_kernels import backends
from arbs_kernels.cases import SMALL_CASES
from arbs_kernels.correlation_score import correlation_score, mosaic_gpu, score_of_gradient, weight_gradient
from arbs_kernels.selection import UnsupportedError


class CorrelationScore:
    """What holds for every implementation; a backend adds a subclass that names it."""

    implementation: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of the activations that it takes, the most exact first."""

    def score(self, x, dy, trits, group_size):
        run = jax.jit(correlation_score, static_argnames=("group_size", "implementation"))
        return run(x, dy, trits, group_size=group_size, implementation=self.implementation)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("case", SMALL_CASES, ids=str)
    def test_exact_away_from_ties(self, case, dtype):
        rng = np.random.default_rng([6, case.products])
        matrix = random_matrix(rng, case.out_features, case.in_features, case.group_size)
        x, right = activations(rng, (case.rows, case.in_features), dtype)
        dy, left = activations(rng, (case.rows, case.out_features), dtype)
        if dtype not in self.dtypes:
            with pytest.raises(UnsupportedError, match=f"takes {self.dtypes[0]}, got {dtype}"):
                self.score(x, dy, matrix.trits, case.group_size)
            return
        score = self.score(x, dy, matrix.trits, case.group_size)
        assert score.dtype == jnp.int32
        assert score.shape == (case.out_features, case.groups)

        dw = left.T @ right
        # A sum of M products in float32 may be off by this much: only such a gradient's sign is in doubt.
        doubt = np.abs(dw) <= (np.abs(left.T) @ np.abs(right)) * case.rows * ROUNDOFF["float32"]
        ones = np.ones_like(dw)
        doubtful_columns = np.abs(score_by_hand(ones, (doubt & (matrix.dense_trits != 0)).astype(int), case.group_size))
        off = np.abs(np.asarray(score) - score_by_hand(dw, matrix.dense_trits, case.group_size))
        np.testing.assert_array_less(off, 2 * doubtful_columns + 1)
        # The density of dW at 0 is 0.4/sqrt(M), the doubtful interval 2*M*M*0.64 roundoffs: hardly any weight.
        assert doubt.sum() <= 2 + 4 * case.rows**1.5 * ROUNDOFF["float32"] * dw.size

    @pytest.mark.parametrize("group_size", [4, 6, 32])
    def test_small_integers_are_exact_ties_included(self, group_size):
        rng = np.random.default_rng([7, group_size])
        matrix = random_matrix(rng, 23, 37, group_size)
        x, dy = rng.integers(-2, 3, (6, 37)), rng.integers(-2, 3, (6, 23))
        dw = dy.T @ x
        assert (dw == 0).any()
        for dtype in self.dtypes:
            score = self.score(jnp.asarray(x, dtype), jnp.asarray(dy, dtype), matrix.trits, group_size)
            np.testing.assert_array_equal(score, score_by_hand(dw, matrix.dense_trits, group_size))

    def test_bounds_are_reached(self):
        """Full agreement is G, full disagreement -G, and a short last group counts its own columns only."""
        trits = random_matrix(np.random.default_rng(8), 2, 10, 4).trits
        ones = jnp.full_like(trits, 255)  # ceil(242 * 256 / 243): five trits of +1
        x = jnp.ones((1, 10), self.dtypes[0])
        score = self.score(x, jnp.asarray([[1.0, -1.0]], self.dtypes[0]), ones, 4)
        np.testing.assert_array_equal(score, [[4, 4, 2], [-4, -4, -2]])

    def test_only_the_sign_counts(self):
        rng = np.random.default_rng(9)
        matrix = random_matrix(rng, 9, 30, 8)
        x, dy = rng.integers(-2, 3, (4, 30)), rng.integers(-2, 3, (4, 9))
        plain = self.score(jnp.asarray(x, self.dtypes[0]), jnp.asarray(dy, self.dtypes[0]), matrix.trits, 8)
        scaled = self.score(jnp.asarray(x, self.dtypes[0]), jnp.asarray(dy * 2.0**-60, self.dtypes[0]), matrix.trits, 8)
        np.testing.assert_array_equal(plain, scaled)
        negative = self.score(jnp.asarray(x, self.dtypes[0]), jnp.asarray(-dy, self.dtypes[0]), matrix.trits, 8)
        np.testing.assert_array_equal(plain, -negative)

    def test_nan_votes_for_neither_side(self):
        matrix = random_matrix(np.random.default_rng(10), 3, 8, 4)
        x = jnp.ones((1, 8), self.dtypes[0]).at[0, :4].set(jnp.nan)
        score = np.asarray(self.score(x, jnp.ones((1, 3), self.dtypes[0]), matrix.trits, 4))
        np.testing.assert_array_equal(score[:, 0], 0)
        np.testing.assert_array_equal(score[:, 1], matrix.dense_trits[:, 4:].sum(axis=1))


class TestXla(CorrelationScore):
    implementation = "xla"


@pytest.mark.skipif(backends.triton_missing() is not None, reason=f"needs {backends.triton_missing()}")
class TestTriton(CorrelationScore):
    implementation = "triton"


@pytest.mark.usefixtures("simulated")
class TestMosaicGpu(CorrelationScore):
    """On Hopper as it is, simulated on a CPU."""

    implementation = "mosaic_gpu"
    dtypes = ("bfloat16",)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "tiles",
        [
            {"rows": 128, "columns": 256},
            {"rows": 128, "columns": 256, "by_rows": False},
            {"cluster": True},
            {"rows": 128, "columns": 192, "steps": 2, "depth": 128, "band": 1},
        ],
        ids=str,
    )
    def test_tiles(self, tiles):
        rng = np.random.default_rng(13)
        matrix = random_matrix(rng, 300, 1440, 32)  # 288 codes a row: tiles cross from one plane into the next
        x, dy = rng.integers(-2, 3, (70, 1440)), rng.integers(-2, 3, (70, 300))
        run = jax.jit(functools.partial(mosaic_gpu.score, group_size=32, tiles=tiles))
        score = run(jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16), matrix.trits)
        np.testing.assert_array_equal(score, score_by_hand(dy.T @ x, matrix.dense_trits, 32))

    @pytest.mark.parametrize("columns", [700, 703])
    def test_tiles_begin_at_any_code(self, columns):
        """At the codes 0, 116 and 92 of 140, or 0, 115 and 89 of 141."""
        rng = np.random.default_rng([15, columns])
        matrix = random_matrix(rng, 5, columns, 32)
        x, dy = rng.integers(-2, 3, (2, columns)), rng.integers(-2, 3, (2, 5))
        score = self.score(jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16), matrix.trits, 32)
        np.testing.assert_array_equal(score, score_by_hand(dy.T @ x, matrix.dense_trits, 32))

    @pytest.mark.parametrize("shape", [(4, 400), (8, 301), (12, 303), (3, 401), (4, 100), (16, 160)])
    def test_rows_of_codes_go_round(self, shape):
        codes = np.random.default_rng(16).integers(0, 256, shape, np.uint8)
        rows = np.asarray(mosaic_gpu.extended(jnp.asarray(codes), 128))
        assert rows.shape[1] >= shape[1] + 128 + 16
        assert rows.shape[1] % 16 == 0
        np.testing.assert_array_equal(rows, np.tile(codes, (1, 4))[:, : rows.shape[1]])

    def test_mapped(self):
        rng = np.random.default_rng(14)
        matrices = [random_matrix(rng, 9, 40, 8) for _ in range(2)]
        x, dy = rng.integers(-2, 3, (2, 6, 40)), rng.integers(-2, 3, (2, 6, 9))
        run = jax.vmap(functools.partial(correlation_score, group_size=8, implementation="mosaic_gpu"))
        trits = jnp.stack([matrix.trits for matrix in matrices])
        score = run(jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16), trits)
        for one, matrix, right, left in zip(score, matrices, x, dy, strict=True):
            np.testing.assert_array_equal(one, score_by_hand(left.T @ right, matrix.dense_trits, 8))

    def test_refuses_float32(self):
        with pytest.raises(UnsupportedError, match="'mosaic_gpu' takes bfloat16, got float32; pass 'triton' or 'xla'"):
            refused(implementation="mosaic_gpu")

    def test_refuses_a_tile_that_does_not_fit(self):
        x, dy = jnp.ones((2, 10), jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16)
        with pytest.raises(UnsupportedError, match="needs 288768 bytes of shared memory, more than 232448"):
            mosaic_gpu.score(x, dy, jnp.zeros((3, 2), jnp.uint8), group_size=8, tiles={"steps": 5})


def test_weight_gradient_is_the_float32_product():
    rng = np.random.default_rng(11)
    x, dy = rng.standard_normal((50, 7)).astype(np.float32), rng.standard_normal((50, 5)).astype(np.float32)
    dw = weight_gradient(jnp.asarray(x), jnp.asarray(dy))
    assert dw.dtype == jnp.float32
    magnitude = np.abs(dy.T).astype(np.float64) @ np.abs(x)
    off = np.abs(np.asarray(dw).astype(np.float64) - dy.T.astype(np.float64) @ x)
    np.testing.assert_array_less(off, 51 * ROUNDOFF["float32"] * magnitude)
    short = weight_gradient(jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16))
    assert short.dtype == jnp.float32


def test_score_of_gradient_takes_stacks():
    rng = np.random.default_rng(12)
    matrices = [random_matrix(rng, 4, 11, 6) for _ in range(3)]
    dw = rng.standard_normal((3, 4, 11)).astype(np.float32)
    stacked = score_of_gradient(jnp.asarray(dw), jnp.stack([m.trits for m in matrices]), group_size=6)
    expected = [score_by_hand(one, matrix.dense_trits, 6) for one, matrix in zip(dw, matrices, strict=True)]
    np.testing.assert_array_equal(stacked, expected)


def refused(**changes):
    plain = {
        "x": jnp.ones((2, 10), jnp.float32),
        "dy": jnp.ones((2, 3), jnp.float32),
        "trits": jnp.zeros((3, 2), jnp.uint8),
        "group_size": 8,
    }
    return correlation_score(**plain | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.ones((2, 10), jnp.int32)}, "x must be float32 or bfloat16, got int32"),
        ({"dy": jnp.ones((2, 4), jnp.float32)}, r"dy must have shape \(M, 3\), got \(2, 4\)"),
        (
            {"dy": jnp.ones((5, 3), jnp.float32)},
            r"agree in rows and dtype, got float32 \(2, 10\) and float32 \(5, 3\)",
        ),
        ({"dy": jnp.ones((2, 3), jnp.bfloat16)}, r"agree .* float32 \(2, 10\) and bfloat16 \(2, 3\)"),
        ({"trits": jnp.zeros((3, 3), jnp.uint8)}, r"trits must be uint8 \(N, 2\) .* got uint8 \(3, 3\)"),
        ({"group_size": 7}, "group_size must be one of .*, got 7"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match="correlation_score: .*" + message):
        refused(**changes)


def test_an_unknown_implementation_is_an_error_that_lists_the_known():
    with pytest.raises(UnsupportedError, match=r"no implementation 'abacus'; pass one of .*xla"):
        refused(implementation="abacus")

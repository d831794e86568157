"""Samples of a gradient against NumPy, for every implementation: integers exact away from rounding ties, sums close."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_kernels import backends
from arbs_kernels.cases import SMALL_CASES
from arbs_kernels.codec import pack_rows
from arbs_kernels.gradient_sample import LARGEST, STEPS, gradient_sample
from arbs_kernels.noise import positions
from arbs_kernels.selection import UnsupportedError

SEED = 2**31 + 77
SHAPES = sorted({(case.out_features, case.in_features, case.group_size) for case in SMALL_CASES})


def drawn(out_features, in_features, dtype, seed=0):
    """(gradient, factors of rows, factors of columns, trits); a tenth of the entries is clipped."""
    rng = np.random.default_rng([out_features, in_features, seed])
    gradient = jnp.asarray(rng.standard_normal((out_features, in_features)), dtype)
    rows, columns = (np.exp2(rng.uniform(0, 1.5, size)).astype(np.float32) for size in (out_features, in_features))
    return gradient, rows, columns, rng.integers(-1, 2, (out_features, in_features)).astype(np.int8)


class GradientSample:
    """What holds for every implementation; a backend adds a subclass that names it."""

    implementation: str

    def run(self, gradient, rows, columns, trits, group_size, seed=SEED):
        run = jax.jit(gradient_sample, static_argnames=("group_size", "implementation"))
        options = {"group_size": group_size, "implementation": self.implementation}
        return run(gradient, rows, columns, pack_rows(trits), jnp.uint32(seed), **options)

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [*((shape, "float32") for shape in SHAPES), *((shape, "bfloat16") for shape in SHAPES[::3])],
        ids=str,
    )
    def test_samples_and_agrees(self, shape, dtype):
        out_features, in_features, group_size = shape
        gradient, rows, columns, trits = drawn(out_features, in_features, dtype)
        sample, agreement = self.run(gradient, rows, columns, trits, group_size)
        assert (sample.dtype, sample.shape) == (jnp.int8, gradient.shape)
        g = np.asarray(gradient, np.float64)
        u = np.clip(g * rows[:, None].astype(np.float64) * columns, -LARGEST, LARGEST)
        noise = (np.asarray(positions(jnp.uint32(SEED), g.shape)) >> 8) * 2.0**-24
        exact = STEPS * u + noise
        # At most 125 in float32: what a few roundoffs of it can turn is this near a tie.
        clear = np.abs(exact - np.round(exact)) > 1e-4
        assert clear.mean() > 0.99 or g.size < 100
        np.testing.assert_array_equal(np.asarray(sample)[clear], np.floor(exact)[clear])
        assert np.abs(np.asarray(sample) - np.floor(exact)).max() <= 1
        groups = -(-in_features // group_size)
        padding = ((0, 0), (0, groups * group_size - in_features))
        terms = np.pad(g * trits, padding).reshape(out_features, groups, group_size)
        assert (agreement.dtype, agreement.shape) == (jnp.float32, (out_features, groups))
        # Sums of n float32 terms in any order: n roundoffs of the sum of their sizes.
        bound = group_size * 2.0**-24 * np.abs(terms).sum(axis=-1)
        assert (np.abs(np.asarray(agreement) - terms.sum(axis=-1)) <= bound).all()

    def test_rounding_is_of_the_seed(self):
        gradient, rows, columns, trits = drawn(9, 40, "float32")
        first, again, other = (self.run(gradient, rows, columns, trits, 8, seed)[0] for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (np.asarray(first) != np.asarray(other)).mean() > 0.2

    def test_mapped_matrices_vote_as_they_would_alone(self):
        gradient, rows, columns, trits = (
            jnp.stack(parts) for parts in zip(*(drawn(6, 23, "bfloat16", seed) for seed in range(6)), strict=True)
        )
        stacks = [leaf.reshape(2, 3, *leaf.shape[1:]) for leaf in (gradient, rows, columns, pack_rows(trits))]
        seeds = jnp.arange(3, dtype=jnp.uint32)

        def one(gradient, rows, columns, trits, seed):
            return gradient_sample(
                gradient, rows, columns, trits, seed, group_size=6, implementation=self.implementation
            )

        together = jax.jit(jax.vmap(jax.vmap(one), in_axes=(0, 0, 0, 0, None)))(*stacks, seeds)
        for i in range(2):
            for j in range(3):
                alone = jax.jit(one)(*(leaf[i, j] for leaf in stacks), seeds[j])
                for got, expected in zip(together, alone, strict=True):
                    np.testing.assert_array_equal(got[i, j], expected)


class TestXla(GradientSample):
    implementation = "xla"


@pytest.mark.skipif(backends.triton_missing() is not None, reason=f"needs {backends.triton_missing()}")
class TestTriton(GradientSample):
    implementation = "triton"


def arguments(**changes):
    plain = {
        "gradient": jnp.zeros((2, 11), jnp.float32),
        "rows": jnp.ones((2,), jnp.float32),
        "columns": jnp.ones((11,), jnp.float32),
        "trits": jnp.full((2, 3), 128, jnp.uint8),
        "seed": jnp.uint32(0),
        "group_size": 4,
    }
    return plain | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gradient": jnp.zeros((2, 11), jnp.int8)},
            r"gradient must be float32 or bfloat16 \(N, K\), got int8 \(2, 11\)",
        ),
        ({"gradient": jnp.zeros((11,), jnp.float32)}, r"gradient must be .* \(N, K\), got float32 \(11,\)"),
        ({"rows": jnp.ones((3,), jnp.float32)}, r"rows must be float32 \(2,\), got float32 \(3,\)"),
        ({"columns": jnp.ones((11,), jnp.bfloat16)}, r"columns must be float32 \(11,\), got bfloat16 \(11,\)"),
        ({"trits": jnp.zeros((2, 4), jnp.uint8)}, r"trits must be uint8 \(2, 3\), got uint8 \(2, 4\)"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match="gradient_sample: " + message):
        gradient_sample(**arguments(**changes))


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(UnsupportedError, match="gradient_sample has no implementation 'abacus'"):
        gradient_sample(**arguments(implementation="abacus"))

"""One step of packed latents against NumPy, for every implementation: integers, exact away from rounding ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_kernels import backends, latents
from arbs_kernels.latent_step import latent_step
from arbs_kernels.noise import positions
from arbs_kernels.selection import UnsupportedError

NORM, RATE, SEED, OFFSET = 0.9, 3.7, 12345, 987654321
CASES = ((7, 33, 5), (5, 64, 3), (9, 21, 2), (1, 1, 5), (2, 1310, 4), (4, 10, 1))


def packed(v, planes):
    leaves = latents.encode(jnp.asarray(v, jnp.int16), planes)
    return leaves["trits"], leaves.get("residual", jnp.zeros((0, *leaves["trits"].shape), jnp.uint8))


def moved_by_hand(direction, v, planes, power, rate=RATE, norm=NORM):
    """(the latents after the step, how far each step is from where rounding turns)."""
    d = direction.astype(np.float64)
    d = np.clip(np.sign(d) * norm * (np.abs(d) / norm) ** power, -4, 4)
    noise = (np.asarray(positions(jnp.uint32(SEED), v.shape)) + np.uint32(OFFSET) >> 8) * 2.0**-24
    exact = noise - np.float64(np.float32(rate)) * d
    half = latents.half_range(planes)
    return np.clip(v + np.floor(exact), -half, half), np.abs(exact - np.round(exact))


class LatentStep:
    """What holds for every implementation; a backend adds a subclass that names it."""

    implementation: str

    def run(self, direction, v, planes, power=2.0, rate=RATE):
        step = jax.jit(latent_step, static_argnames=("power", "implementation"))
        scalars = (jnp.float32(NORM), jnp.float32(rate), jnp.uint32(SEED), jnp.uint32(OFFSET))
        trits, residual, counts = step(
            direction, *packed(v, planes), *scalars, power=power, implementation=self.implementation
        )
        assert trits.dtype == residual.dtype == jnp.uint8
        moved = np.asarray(latents.decode(trits, residual, v.shape[1])).astype(int)
        assert (counts.dtype, counts.shape) == (jnp.int32, (v.shape[0], 3))
        edge = latents.zero_half_range(planes)
        before, now = (np.sign(latent) * (np.abs(latent) > edge) for latent in (v, moved))
        saturated = np.abs(moved) == latents.half_range(planes)
        np.testing.assert_array_equal(counts, np.stack([before != now, now == 0, saturated], axis=-1).sum(axis=1))
        return moved, trits

    @pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(("out_features", "in_features", "planes"), CASES)
    def test_moves(self, out_features, in_features, planes, dtype, power):
        rng = np.random.default_rng([out_features, in_features])
        half = latents.half_range(planes)
        v = rng.integers(-half, half + 1, (out_features, in_features))
        direction = jnp.asarray(rng.standard_normal(v.shape), dtype)
        got, _ = self.run(direction, v, planes, power)
        expected, margin = moved_by_hand(np.asarray(direction), v, planes, power)
        # An entry of up to 4 times the rate, in float32: a few roundoffs of 16 decide only what is this near a tie.
        clear = margin > 1e-5
        assert clear.mean() > 0.99 or v.size < 100
        np.testing.assert_array_equal(got[clear], expected[clear])
        assert np.abs(got - expected).max() <= 1

    def test_padding_keeps_the_trit_zero(self):
        v = np.full((3, 7), latents.half_range(5))
        _, trits = self.run(jnp.full((3, 7), -9.0, jnp.float32), v, 5)
        whole = np.asarray(latents.decode(trits, None, 10))
        np.testing.assert_array_equal(whole[:, 7:], 0)
        np.testing.assert_array_equal(whole[:, :7], 1)

    def test_no_direction_or_no_rate_is_no_step(self):
        v = np.arange(-121, 122)[None, :]
        np.testing.assert_array_equal(self.run(jnp.zeros((1, 243), jnp.float32), v, 5)[0], v)
        for entry in (1.0, np.inf, np.nan):
            np.testing.assert_array_equal(self.run(jnp.full((1, 243), entry, jnp.float32), v, 5, rate=0.0)[0], v)

    def test_mapped_matrices_move_as_they_would_alone(self):
        rng = np.random.default_rng(3)
        direction = jnp.asarray(rng.standard_normal((2, 3, 4, 23)), jnp.float32)
        v = rng.integers(-13, 14, (2, 3, 4, 23))
        leaves = [[packed(v[i, j], 3) for j in range(3)] for i in range(2)]
        trits, residual = (jnp.stack([jnp.stack([pair[at] for pair in row]) for row in leaves]) for at in (0, 1))
        rates = jnp.asarray([1.0, 2.0, 4.0], jnp.float32)

        def one(direction, trits, residual, rate):
            scalars = (jnp.float32(NORM), rate, jnp.uint32(SEED), jnp.uint32(OFFSET))
            return latent_step(direction, trits, residual, *scalars, power=2.0, implementation=self.implementation)

        inner = jax.vmap(one)
        together = jax.jit(jax.vmap(inner, in_axes=(0, 0, 0, None)))(direction, trits, residual, rates)
        for i in range(2):
            for j in range(3):
                alone = jax.jit(one)(direction[i, j], trits[i, j], residual[i, j], rates[j])
                for got, expected in zip(together, alone, strict=True):
                    np.testing.assert_array_equal(got[i, j], expected)


class TestXla(LatentStep):
    implementation = "xla"


@pytest.mark.skipif(backends.triton_missing() is not None, reason=f"needs {backends.triton_missing()}")
class TestTriton(LatentStep):
    implementation = "triton"


def arguments(**changes):
    trits, residual = packed(np.zeros((2, 11)), 3)
    scalars = {"norm": jnp.float32(1), "rate": jnp.float32(1), "seed": jnp.uint32(0), "offset": jnp.uint32(0)}
    plain = {"direction": jnp.zeros((2, 11), jnp.float32), "trits": trits, "residual": residual, "power": 1.0}
    return plain | scalars | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"direction": jnp.zeros((2, 11), jnp.int8)},
            r"direction must be float32 or bfloat16 \(N, K\), got int8 \(2, 11\)",
        ),
        ({"direction": jnp.zeros((2, 16), jnp.float32)}, r"trits must be uint8 \(2, 4\), got uint8 \(2, 3\)"),
        ({"residual": jnp.zeros((2, 2, 4), jnp.uint8)}, r"residual must be uint8 \(2, 2, 3\), got uint8 \(2, 2, 4\)"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match="latent_step: " + message):
        latent_step(**arguments(**changes))


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(UnsupportedError, match="latent_step has no implementation 'abacus'"):
        latent_step(**arguments(implementation="abacus"))

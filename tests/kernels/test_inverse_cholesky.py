"""Inverse Cholesky factors against their definition in double precision, for every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_kernels import backends
from arbs_kernels.inverse_cholesky import inverse_cholesky
from arbs_kernels.selection import UnsupportedError

RIDGE = 1e-5
ROUNDOFF = 2.0**-24


def gram_of(R: int, condition: float, seed: int = 0) -> np.ndarray:
    """Of columns of length one whose singular values fall to 1/condition of the largest."""
    rng = np.random.default_rng([R, seed])
    left, right = np.linalg.qr(rng.standard_normal((2 * R, R)))[0], np.linalg.qr(rng.standard_normal((R, R)))[0]
    x = (left * np.geomspace(1, 1 / condition, R)) @ right.T
    x /= np.linalg.norm(x, axis=0)
    return x.T @ x


class InverseCholesky:
    """What holds for every implementation; a backend adds a subclass that names it."""

    implementation: str

    def run(self, gram, ridge=RIDGE):
        run = jax.jit(inverse_cholesky, static_argnames=("ridge", "implementation"))
        return run(jnp.asarray(gram, jnp.float32), ridge=ridge, implementation=self.implementation)

    @pytest.mark.parametrize("condition", [1, 30, 1000])
    @pytest.mark.parametrize("R", [1, 2, 15, 16, 33, 40, 64, 65, 128, 160])
    def test_is_the_inverse_of_the_transposed_factor(self, R, condition):
        gram = gram_of(R, condition)
        factor = self.run(gram)
        assert (factor.dtype, factor.shape) == (jnp.float32, (R, R))
        exact = np.linalg.inv(np.linalg.cholesky(gram + RIDGE * np.eye(R))).T
        f = np.asarray(factor, np.float64)
        assert not np.tril(f, -1).any()
        # The matrix itself is rounded, and every elimination: some R roundoffs of it, which its inverse magnifies.
        assert np.abs(f - exact).max() < 8 * R * ROUNDOFF * np.linalg.norm(exact, 2) ** 3
        unit = f.T @ (gram + RIDGE * np.eye(R)) @ f
        np.testing.assert_allclose(unit, np.eye(R), atol=8 * R * ROUNDOFF * np.linalg.norm(exact, 2) ** 2)

    def test_the_ridge_is_added_to_the_diagonal(self):
        np.testing.assert_allclose(self.run(np.diag([3.0, 0.0]), 0.25), np.diag([3.25**-0.5, 2.0]), rtol=1e-6)

    @pytest.mark.parametrize("R", [5, 64, 128])
    def test_a_matrix_of_lower_rank_gives_a_finite_factor(self, R):
        x = np.random.default_rng(R).standard_normal((200, 2)) @ np.random.default_rng(1).standard_normal((2, R))
        x /= np.linalg.norm(x, axis=0)
        for gram in (x.T @ x, np.ones((R, R)), np.zeros((R, R))):
            f = np.asarray(self.run(gram), np.float64)
            assert np.isfinite(f).all()
            assert np.abs(f).max() < 2 * RIDGE**-0.5
            # Columns come out no longer than one.
            assert np.linalg.eigvalsh(f.T @ gram @ f).max() < 1 + 1e-4

    @pytest.mark.parametrize("R", [7, 80])
    def test_mapped_matrices_are_factored_as_they_would_be_alone(self, R):
        stack = jnp.asarray([gram_of(R, 10, seed) for seed in range(6)], jnp.float32).reshape(2, 3, R, R)

        def one(gram):
            return inverse_cholesky(gram, RIDGE, implementation=self.implementation)

        together = jax.jit(jax.vmap(jax.vmap(one)))(stack)
        for i in range(2):
            for j in range(3):
                # Products within it may add up in another order.
                np.testing.assert_allclose(together[i, j], jax.jit(one)(stack[i, j]), atol=1e-5)


class TestXla(InverseCholesky):
    implementation = "xla"


@pytest.mark.skipif(backends.triton_missing() is not None, reason=f"needs {backends.triton_missing()}")
class TestTriton(InverseCholesky):
    implementation = "triton"


@pytest.mark.parametrize(
    ("gram", "ridge", "message"),
    [
        (jnp.zeros((2, 3), jnp.float32), 1.0, r"gram must be float32 \(R, R\), got float32 \(2, 3\)"),
        (jnp.zeros((2,), jnp.float32), 1.0, r"gram must be float32 \(R, R\), got float32 \(2,\)"),
        (jnp.zeros((2, 2), jnp.bfloat16), 1.0, r"gram must be float32 \(R, R\), got bfloat16 \(2, 2\)"),
        (jnp.zeros((2, 2), jnp.float32), 0.0, r"ridge must be above 0, got 0.0"),
        (jnp.zeros((2, 2), jnp.float32), float("nan"), r"ridge must be above 0, got nan"),
    ],
)
def test_refuses(gram, ridge, message):
    with pytest.raises(ValueError, match="inverse_cholesky: " + message):
        inverse_cholesky(gram, ridge)


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(UnsupportedError, match="inverse_cholesky has no implementation 'abacus'"):
        inverse_cholesky(jnp.eye(2, dtype=jnp.float32), 1.0, implementation="abacus")

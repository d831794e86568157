"""What an orthonormal basis of the momentum's columns costs: by Cholesky factors, of this library's kernel and of the
vendor's, and by the iterations on Gram matrices that it was made of before.

    python time_basis.py

Microseconds a call of `orthonormal_columns` on stacks of tall matrices, and of the factor alone; and how far the basis
is from orthonormal.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.rules.orthogonal import orthonormal_columns
from arbs_kernels.inverse_cholesky import inverse_cholesky
from arbs_kernels.timing import seconds_per_call

STACKS = [(24, 1728, 40), (24, 640, 40), (24, 640, 8), (11, 5632, 128), (11, 2048, 128)]
"""(layers and matrices that move together, rows, rank): `byte-50m`'s, `byte-1b`'s."""
START = ((8.305, -23.663, 16.876), (4.145, -3.020, 0.553), (3.940, -2.881, 0.538), (3.311, -2.440, 0.490))
END = ((2.320, -1.669, 0.410), (1.895, -1.270, 0.375), (1.5, -0.5, 0.0))


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """In float32 throughout."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def iterated(x: jax.Array) -> jax.Array:
    """The basis as it was: seven minimax polynomials, and the Gram matrix taken twice."""

    def polynomials(gram: jax.Array, coefficients: tuple[tuple[float, float, float], ...]) -> jax.Array:
        identity = jnp.eye(gram.shape[0], dtype=jnp.float32)
        total = identity
        for a, b, c in coefficients:
            polynomial = a * identity + b * gram + c * product(gram, gram)
            total = product(polynomial, total)
            gram = product(product(polynomial.T, gram), polynomial)
        return total

    gram = product(x.T, x)
    unit = jax.lax.rsqrt(jnp.diagonal(gram) + 1e-30)
    gram = gram * (unit[:, None] * unit[None, :])
    trace = jnp.trace(gram) + 1e-30
    bound = jnp.minimum(1 / (trace * jnp.sqrt(jnp.sum(jnp.square(gram / trace)))), 1)
    ridge = 1e-6 * jnp.eye(x.shape[1], dtype=jnp.float32)
    half = product(x, unit[:, None] * (polynomials(gram * bound + ridge, START) * jnp.sqrt(bound)))
    return product(half, polynomials(product(half.T, half), END))


def main() -> None:
    """Prints a line a stack."""
    print(jax.devices()[0].device_kind, jax.__version__)
    gpu = jax.default_backend() != "cpu"
    arms: dict[str, Callable[[jax.Array], jax.Array]] = {"iterated": iterated}
    for name in ("xla", "triton") if gpu else ("xla",):
        arms[name] = partial(orthonormal_columns, implementation=name)
    for stack in STACKS:
        rng = np.random.default_rng(0)
        sets = [(jnp.asarray(rng.standard_normal(stack), jnp.float32),) for _ in range(8)]
        parts = []
        for name, arm in arms.items():
            took = seconds_per_call(jax.vmap(arm), sets)
            q = np.asarray(jax.jit(arm)(sets[0][0][0]), np.float64)
            off = np.abs(np.linalg.svd(q, compute_uv=False) - 1).max()
            parts.append(f"{name} {1e6 * took:7.1f} us ({off:.0e} off)")
        grams = [(product(jnp.swapaxes(x, 1, 2), x) / stack[1],) for (x,) in sets]
        for name in list(arms)[1:]:
            factor = jax.vmap(partial(inverse_cholesky, ridge=1e-5, implementation=name))
            parts.append(f"factor, {name} {1e6 * seconds_per_call(factor, grams):6.1f} us")
        print(f"{stack!s:<16} {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()

"""Must the whole step be orthogonalised, or only what the momentum holds? Validation loss of `latent10`.

    python experiments/2026_11_28_deflation/deflation.py --variants whole polar:0:1 polar:1:1

A variant is `INNER:ITERATIONS:WEIGHT`: how the part of the step in the momentum's basis is brought to singular values
of one, how many quintic iterations the rest gets, and the weight of the rest at a root-mean-square singular value of
one. `whole` is Newton-Schulz on the whole step.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent / "2026_11_21_update_kernels"))
from orthogonalisation import JORDAN, flags, train

from arbs_jax.rules import latent, momentum
from arbs_jax.rules.noise import white
from arbs_jax.rules.orthogonal import _FAST, _product, orthonormal_columns
from arbs_kernels.gram_newton_schulz.reference import polynomials

TINY = 1e-30


def polar(x: jax.Array) -> jax.Array:
    """Singular values of a tall matrix brought near one on its small Gram matrix, largest kept below it first."""
    gram = _product(x.T, x)
    bound = 1 / (jnp.linalg.norm(gram) + TINY)
    return x @ (polynomials(gram * bound, _FAST, _product) * jnp.sqrt(bound))


def unit(x: jax.Array) -> jax.Array:
    """Columns of length one."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=0) + TINY)


INNER: dict[str, Callable[[jax.Array], jax.Array]] = {"polar": polar, "basis": orthonormal_columns, "unit": unit}


def quintic(x: jax.Array) -> jax.Array:
    """One iteration on a matrix without outstanding singular values, after a bound by their eighth powers."""
    tall = x.shape[0] > x.shape[1]
    y = x.T if tall else x
    gram = (y @ y.T).astype(jnp.float32)
    scale = 1 / (jnp.trace(gram) + TINY)
    gram = gram * scale
    square = gram @ gram
    bound = 1 / (jnp.sqrt(jnp.linalg.norm(square)) + TINY)
    a, b, c = JORDAN
    polynomial = a * jnp.eye(gram.shape[0]) + b * bound * gram + c * bound * bound * square
    y = (jnp.sqrt(bound * scale) * polynomial).astype(y.dtype) @ y
    return y.T if tall else y


def deflated(inner: str, iterations: int, weight: float) -> Callable[..., Any]:
    """A stand-in for `LowRankMomentum.advance` that gives the direction orthogonalised, part by part."""

    def advance(self: Any, leaves: Any, u: jax.Array, beta: float, mix: float, salt: jax.Array, step: jax.Array) -> Any:
        left = momentum._decode(leaves["left"], leaves["left_scale"])
        right = momentum._decode(leaves["right"], leaves["right_scale"])
        product = momentum._product
        directions = right * jax.lax.rsqrt(jnp.sum(jnp.square(right), axis=0) + TINY)
        basis = orthonormal_columns(beta * (left @ (right.T @ directions)) + (1 - beta) * product(u, directions))
        old, new = beta * (right @ (left.T @ basis)), product(u.T, basis)
        image = old + (1 - beta) * new
        inside = (1 - mix) * image + mix * new
        low_rank = product(left, right.T, u.dtype) * ((1 - mix) * beta)
        whole = (low_rank + ((1 - mix) * (1 - beta) + mix) * u).astype(u.dtype)
        rest = whole - product(basis, inside.T, u.dtype)
        if iterations:
            rest = quintic(rest)
        else:
            freedom = min(u.shape) - basis.shape[1]
            squares = jnp.sum(jnp.square(rest.astype(jnp.float32)))
            rest = rest * jnp.sqrt(freedom / (squares + TINY)).astype(u.dtype)
        d = product(basis, INNER[inner](inside).T, u.dtype) + jnp.asarray(weight, u.dtype) * rest
        d = d * jnp.asarray(max(u.shape) ** 0.5, u.dtype)
        left_code, left_scale = momentum._encode(basis, white(salt, 2, step, basis.shape))
        right_code, right_scale = momentum._encode(image, white(salt, 3, step, image.shape))
        return d, {
            "left": left_code,
            "left_scale": left_scale,
            "right": right_code,
            "right_scale": right_scale,
        }

    return advance


def main() -> None:
    """Trains the variants, prints a line each."""
    kept = momentum.LowRankMomentum.advance, latent.newton_schulz

    def install(name: str) -> None:
        if name == "whole":
            momentum.LowRankMomentum.advance, latent.newton_schulz = kept
            return
        inner, iterations, weight = name.split(":")
        momentum.LowRankMomentum.advance = deflated(inner, int(iterations), float(weight))
        latent.newton_schulz = lambda d: d

    train(flags(__doc__, ["whole", "polar:0:1", "polar:1:1"]).parse_args(), install)


if __name__ == "__main__":
    main()

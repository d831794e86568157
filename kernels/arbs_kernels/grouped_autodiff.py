"""Products by expert joined for differentiation, as `arbs_kernels.autodiff` joins those of one matrix.

Probes have a leading axis of experts: `"score"` (X, N, R) or `"gradient"` (X, N, K), and `"count"` (X,), whose
cotangent is 1 for an expert that had rows and 0 for one that had none.
"""

from functools import partial

import jax
import jax.numpy as jnp

from arbs_kernels.autodiff import Leaves, MatmulSpec, Probe, in_turn, kinds_of
from arbs_kernels.grouped_matmul import (
    grouped_matmul,
    grouped_matmul_input_gradient,
    grouped_score,
    grouped_weight_gradient,
)


def ternary_grouped_matmul(
    x: jax.Array, group_sizes: jax.Array, leaves: Leaves, spec: MatmulSpec, probe: Probe | None = None
) -> jax.Array:
    """`y = x W_e^T` for rows sorted by expert `e`; differentiable in `x` and in `probe`.

    Args:
        x: activations `(M, K)`, float32 or bfloat16. Rows past the sum of `group_sizes` belong to no expert: they give
            zeros and vote for nothing.
        group_sizes: `int32 (X,)`, rows of each expert.
        leaves: integer state of the experts, every leaf with a leading axis X.
        spec: static description of one expert's product.
        probe: see the module; None collects no votes.

    Returns:
        `(M, N)` in the dtype of `x`.
    """
    return _product(spec, x, group_sizes, dict(leaves), None if probe is None else dict(probe))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: MatmulSpec, x: jax.Array, sizes: jax.Array, leaves: dict, probe: dict | None) -> jax.Array:
    x, leaves = in_turn(x, leaves)
    return grouped_matmul(
        x,
        sizes,
        leaves["trits"],
        spec.law.scale(leaves, spec.group_size),
        group_size=spec.group_size,
        implementation=spec.implementation,
    )


def _product_forward(spec: MatmulSpec, x: jax.Array, sizes: jax.Array, leaves: dict, probe: dict | None):
    return _product(spec, x, sizes, leaves, probe), (x, sizes, leaves, kinds_of(probe))


def _product_backward(spec: MatmulSpec, saved, dy: jax.Array):
    x, sizes, leaves, kinds = saved
    dy, leaves = in_turn(dy, leaves)
    dy = dy.astype(x.dtype)
    dx = grouped_matmul_input_gradient(
        dy,
        sizes,
        leaves["trits"],
        spec.law.scale(leaves, spec.group_size),
        in_features=spec.in_features,
        group_size=spec.group_size,
        implementation=spec.implementation,
    )
    if kinds is None:
        return dx, None, None, None
    dtypes, votes = dict(kinds.dtypes), {}
    if "score" in dtypes:
        score = grouped_score(
            x, dy, sizes, leaves["trits"], group_size=spec.group_size, implementation=spec.implementation
        )
        votes["score"] = score.astype(dtypes["score"])
    if "gradient" in dtypes:
        votes["gradient"] = grouped_weight_gradient(x, dy, sizes, dtype=dtypes["gradient"])
    # Made from `dy`, as the count of a product is, so that it adds up where uses do.
    one = jnp.where(jnp.any(jnp.isnan(dy)), jnp.float32(1), jnp.float32(1))
    ends = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), x.shape[0])
    votes["count"] = jnp.where(jnp.diff(ends, prepend=jnp.int32(0)) > 0, one, jnp.float32(0))
    return dx, None, None, {name: votes[name] for name in dtypes}


_product.defvjp(_product_forward, _product_backward)

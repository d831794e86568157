"""Products by expert joined for differentiation, as `arbs_kernels.autodiff` joins those of one matrix.

Probes have a leading axis of experts: `"score"` (X, N, R) or `"gradient"` (X, N, K), and `"count"` (X,), whose
cotangent is 1 for an expert that had rows and 0 for one that had none.

Gradients of all experts at once may be more than there is room for, while few rows made them. A probe of *factors* has
the rows of every use of the experts in place of `"gradient"`: `"x"` (uses, M, K), `"dy"` (uses, M, N) and `"sizes"`
(uses, X), from which `expert_gradient` makes one expert's, summed over all uses, when its turn comes.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from arbs_kernels.autodiff import Leaves, MatmulSpec, Probe, in_turn, kinds_of
from arbs_kernels.correlation_score import weight_gradient
from arbs_kernels.grouped_matmul import (
    grouped_matmul,
    grouped_matmul_input_gradient,
    grouped_score,
    grouped_weight_gradient,
)


def make_factor_probe(
    uses: int, rows: int, experts: int, out_features: int, in_features: int, dtype: jnp.dtype
) -> dict[str, jax.Array]:
    """Zeros whose cotangents are the factors of the experts' gradients; see the module."""
    return {
        "x": jnp.zeros((uses, rows, in_features), dtype),
        "dy": jnp.zeros((uses, rows, out_features), dtype),
        "sizes": jnp.zeros((uses, experts), jnp.float32),
        "count": jnp.zeros((experts,), jnp.float32),
    }


def expert_gradient(factors: Mapping[str, jax.Array], expert: jax.Array) -> jax.Array:
    """One expert's dW `(N, K)`, in the dtype of the factors, summed over all uses in float32.

    Rows of other experts are multiplied, too, as zeros: for few rows.
    """
    sizes_UxX = jnp.round(factors["sizes"]).astype(jnp.int32)
    end_U = jax.lax.dynamic_index_in_dim(jnp.cumsum(sizes_UxX, axis=1, dtype=jnp.int32), expert, 1, keepdims=False)
    start_U = end_U - jax.lax.dynamic_index_in_dim(sizes_UxX, expert, 1, keepdims=False)
    row_M = jnp.arange(factors["dy"].shape[1], dtype=jnp.int32)
    own_UxM = (row_M >= start_U[:, None]) & (row_M < end_U[:, None])
    own = jnp.where(own_UxM[..., None], factors["dy"], jnp.zeros((), factors["dy"].dtype))
    x = factors["x"].reshape(-1, factors["x"].shape[-1])
    return weight_gradient(x, own.reshape(x.shape[0], -1), x.dtype)


def ternary_grouped_matmul(
    x: jax.Array,
    group_sizes: jax.Array,
    leaves: Leaves,
    spec: MatmulSpec,
    probe: Probe | None = None,
    use: jax.Array | int = 0,
) -> jax.Array:
    """`y = x W_e^T` for rows sorted by expert `e`; differentiable in `x` and in `probe`.

    Args:
        x: activations `(M, K)`, float32 or bfloat16. Rows past the sum of `group_sizes` belong to no expert: they give
            zeros and vote for nothing.
        group_sizes: `int32 (X,)`, rows of each expert.
        leaves: integer state of the experts, every leaf with a leading axis X.
        spec: static description of one expert's product.
        probe: see the module; None collects no votes.
        use: number of this use of the experts among those that a probe of factors is for; int32 () or int.

    Returns:
        `(M, N)` in the dtype of `x`.
    """
    number = jnp.asarray(use, jnp.int32)
    return _product(spec, x, group_sizes, number, dict(leaves), None if probe is None else dict(probe))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    spec: MatmulSpec, x: jax.Array, sizes: jax.Array, use: jax.Array, leaves: dict, probe: dict | None
) -> jax.Array:
    x, leaves = in_turn(x, leaves)
    return grouped_matmul(x, sizes, *spec.operands(leaves), **spec.options)


def _product_forward(
    spec: MatmulSpec, x: jax.Array, sizes: jax.Array, use: jax.Array, leaves: dict, probe: dict | None
):
    return _product(spec, x, sizes, use, leaves, probe), (x, sizes, use, leaves, kinds_of(probe))


def _product_backward(spec: MatmulSpec, saved, dy: jax.Array):
    x, sizes, use, leaves, kinds = saved
    dy, leaves = in_turn(dy, leaves)
    dy = dy.astype(x.dtype)
    dx = grouped_matmul_input_gradient(dy, sizes, *spec.operands(leaves), in_features=spec.in_features, **spec.options)
    if kinds is None:
        return dx, None, None, None, None
    dtypes, votes = dict(kinds.dtypes), {}
    if "score" in dtypes:
        score = grouped_score(x, dy, sizes, leaves["trits"], **spec.options)
        votes["score"] = score.astype(dtypes["score"])
    if "gradient" in dtypes:
        votes["gradient"] = grouped_weight_gradient(
            x, dy, sizes, dtype=dtypes["gradient"], implementation=spec.implementation
        )
    for name, value in (("x", x), ("dy", dy), ("sizes", sizes)):
        if name in dtypes:
            room = jnp.zeros((kinds.uses, *value.shape), dtypes[name])
            votes[name] = jax.lax.dynamic_update_index_in_dim(room, value.astype(dtypes[name]), use, 0)
    # Made from `dy`, as the count of a product is, so that it adds up where uses do.
    one = jnp.where(jnp.any(jnp.isnan(dy)), jnp.float32(1), jnp.float32(1))
    ends = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), x.shape[0])
    votes["count"] = jnp.where(jnp.diff(ends, prepend=jnp.int32(0)) > 0, one, jnp.float32(0))
    return dx, None, None, None, {name: votes[name] for name in dtypes}


_product.defvjp(_product_forward, _product_backward)

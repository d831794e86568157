"""Causal attention over whole sequences: cuDNN's fused kernels where they run, two products and a softmax elsewhere.

Arrays are suffixed by their axes: B batch, T positions, H heads, K key/value heads, C channels of a key, V of a value.
"""

import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_kernels.backends import compute_capability

Array = jax.Array | jax.ShapeDtypeStruct

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


def causal_attention(
    q_BxTxHxC: jax.Array, k_BxTxKxC: jax.Array, v_BxTxKxV: jax.Array, implementation: str = "auto"
) -> jax.Array:
    """Every position attends to itself and those before it; logits are divided by the root of C.

    Args:
        q_BxTxHxC: queries.
        k_BxTxKxC: keys; K divides H, consecutive heads share a key head (grouped-query attention).
        v_BxTxKxV: values.
        implementation: "xla" keeps a layer's probabilities in memory; "cudnn" does not, and is many times as fast;
            "auto" takes it where it works.

    Returns:
        `(B, T, H, V)` in the dtype of the queries; the softmax is float32.

    Raises:
        ConfigError: "cudnn" does not work here; the message says what is missing.
    """
    run = _cudnn if takes_cudnn(implementation, q_BxTxHxC, k_BxTxKxC, v_BxTxKxV) else _products
    return run(q_BxTxHxC, k_BxTxKxC, v_BxTxKxV)


def takes_cudnn(implementation: str, q: Array, k: Array, v: Array) -> bool:
    """Whether `causal_attention` of these arrays (or of their shapes and dtypes) goes to cuDNN.

    Its gradient then adds in any order unless the program is compiled with
    `arbs_jax.compilation.step_options`.

    Raises:
        ConfigError: "cudnn" does not work here; the message says what is missing.
    """
    if implementation == "xla":
        return False
    missing = cudnn_missing(q, k, v)
    if implementation == "cudnn" and missing is not None:
        raise ConfigError(f"attention 'cudnn' needs {missing}; pass 'auto' or 'xla'")
    return missing is None


def cudnn_missing(q: Array, k: Array, v: Array) -> str | None:
    """What this machine, or these arrays, lack for cuDNN's fused attention, or None."""
    if compute_capability() < 8.0:
        return "an NVIDIA GPU of compute capability 8.0 or later"
    try:
        jax.eval_shape(_cudnn, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (q, k, v)))
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return f"what cuDNN supports ({error})"
    return None


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _products(q_BxTxHxC: jax.Array, k_BxTxKxC: jax.Array, v_BxTxKxV: jax.Array) -> jax.Array:
    """Heads that share keys lie one after another along the positions, so that both products are plain batched ones
    and no array of the probabilities' shape is ever transposed."""
    batch, length, heads, channels = q_BxTxHxC.shape
    shared = k_BxTxKxC.shape[2]
    group = heads // shared
    q_BxKxQxC = q_BxTxHxC.reshape(batch, length, shared, group, channels).transpose(0, 2, 3, 1, 4)
    q_BxKxQxC = q_BxKxQxC.reshape(batch, shared, group * length, channels)
    logits_BxKxQxT = jnp.einsum("bkqc,btkc->bkqt", q_BxKxQxC, k_BxTxKxC, preferred_element_type=jnp.float32)
    position_Q = jnp.arange(group * length, dtype=jnp.int32) % length
    visible_QxT = jnp.arange(length, dtype=jnp.int32) <= position_Q[:, None]
    scaled_BxKxQxT = jnp.where(visible_QxT, logits_BxKxQxT * jnp.float32(channels**-0.5), -jnp.inf)
    weights_BxKxQxT = jax.nn.softmax(scaled_BxKxQxT, axis=-1).astype(q_BxTxHxC.dtype)
    y_BxKxQxV = jnp.einsum("bkqt,btkv->bkqv", weights_BxKxQxT, v_BxTxKxV)
    y_BxKxGxTxV = y_BxKxQxV.reshape(batch, shared, group, length, v_BxTxKxV.shape[-1])
    return y_BxKxGxTxV.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, v_BxTxKxV.shape[-1])

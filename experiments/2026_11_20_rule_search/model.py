"""Byte-level transformer over a tree of effective weights, and its data windows.

The model knows nothing about rules: `loss(weights, tokens)` takes the effective (float, ephemeral) weights
W = S*T of one step.  Weights of equal shape are stacked, so that a rule updates four leaves only:

    tables (2, V, D): embedding, head        attn (L, 4, D, D): q, k, v, o
    mlp_in (L, 2, H, D): gate, up            down (L, D, H)
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of one run; everything here is static."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    vocab: int = 288
    context: int = 128
    batch: int = 64
    steps: int = 2000
    bf16: bool = False
    unroll: int = 4  # layers unrolled in the scan over layers

    @property
    def hidden(self):
        """SiLU-gated MLP width: 8/3 of the model width, rounded to a multiple of 32."""
        return round(self.width * 8 / 3 / 32) * 32

    def shapes(self):
        """Shapes of the stacked weight leaves."""
        d, h, n = self.width, self.hidden, self.layers
        return {"tables": (2, self.vocab, d), "attn": (n, 4, d, d), "mlp_in": (n, 2, h, d), "down": (n, d, h)}

    def fan_in(self, name):
        """Fan-in for each leading index of a leaf, broadcastable to the leaf (the embedding counts as 1)."""
        if name == "tables":
            return np.array([1.0, self.width], np.float32).reshape(2, 1, 1)
        return np.full((1,) * len(self.shapes()[name]), self.shapes()[name][-1], np.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x, w, dtype):
    """y = x W^T in `dtype` with float32 accumulation; dW stays float32."""
    return _dot("...k,nk->...n", x, w, dtype).astype(dtype)


def _dot(spec, a, b, dtype):
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _linear_fwd(x, w, dtype):
    w = w.astype(dtype)
    return _dot("...k,nk->...n", x, w, dtype).astype(dtype), (x, w)


def _linear_bwd(dtype, saved, dy):
    x, w = saved
    dx = _dot("...n,nk->...k", dy, w, dtype).astype(x.dtype)
    dw = _dot("tn,tk->nk", dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), dtype)
    return dx, dw


linear.defvjp(_linear_fwd, _linear_bwd)


def rms_norm(x):
    """RMS norm with identity weight, computed in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def rope(x):
    """Rotary position embedding on (batch, time, head, dim)."""
    half = x.shape[-1] // 2
    freq = 10000.0 ** (-np.arange(half) / half)
    angle = np.arange(x.shape[1])[:, None] * freq
    cos, sin = (f(angle)[None, :, None, :].astype(np.float32) for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def block(mc, x, w):
    """One pre-norm transformer layer."""
    dtype = jnp.bfloat16 if mc.bf16 else jnp.float32
    b, t, d = x.shape

    def split(y):
        return y.reshape(b, t, mc.heads, d // mc.heads)

    h = rms_norm(x).astype(dtype)
    q, k, v = (split(linear(h, w["attn"][i], dtype)) for i in range(3))
    q, k = rope(rms_norm(q)), rope(rms_norm(k))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * (d // mc.heads) ** -0.5
    logits = jnp.where(np.tril(np.ones((t, t), bool)), logits, -1e30)
    att = jax.nn.softmax(logits, -1).astype(dtype)
    o = jnp.einsum("bhqk,bkhd->bqhd", att, v).reshape(b, t, d)
    x = x + linear(o, w["attn"][3], dtype).astype(x.dtype)
    h = rms_norm(x).astype(dtype)
    h = jax.nn.silu(linear(h, w["mlp_in"][0], dtype)) * linear(h, w["mlp_in"][1], dtype)
    return x + linear(h, w["down"], dtype).astype(x.dtype)


def loss(mc, weights, tokens):
    """Mean next-byte cross entropy (nats) of tokens (batch, context + 1)."""
    dtype = jnp.bfloat16 if mc.bf16 else jnp.float32
    inputs, targets = tokens[:, :-1].astype(jnp.int32), tokens[:, 1:].astype(jnp.int32)
    # A one-hot product instead of a gather: its backward is a matmul, not a contended scatter.
    x = linear(jax.nn.one_hot(inputs, mc.vocab, dtype=dtype), weights["tables"][0].T, dtype).astype(jnp.float32)
    stacked = {k: weights[k] for k in ("attn", "mlp_in", "down")}
    x, _ = jax.lax.scan(lambda y, w: (block(mc, y, w), None), x, stacked, unroll=min(mc.unroll, mc.layers))
    logits = linear(rms_norm(x).astype(dtype), weights["tables"][1], dtype).astype(jnp.float32)
    picked = jnp.sum(logits * jax.nn.one_hot(targets, mc.vocab, dtype=jnp.float32), -1)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)


def load_corpora(paths):
    """Byte corpora, split 95/5: (names, padded device arrays that a traced corpus number indexes)."""
    raw = [np.frombuffer(Path(p).read_bytes(), np.uint8) for p in paths]
    data = {}
    for part, cut in (("train", lambda r: r[: int(len(r) * 0.95)]), ("valid", lambda r: r[int(len(r) * 0.95) :])):
        parts = [cut(r) for r in raw]
        size = max(map(len, parts))
        data[part] = jnp.asarray(np.stack([np.pad(p, (0, size - len(p))) for p in parts]))
        data[part + "_len"] = jnp.asarray([len(p) for p in parts], jnp.int32)
    return [p.split("/")[-1].split(".")[0] for p in paths], data


def train_batch(mc, data, corpus, seed, step):
    """Random windows; the same seed and step give the same windows whatever the rule."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    start = jax.random.randint(key, (mc.batch,), 0, data["train_len"][corpus] - mc.context - 1)
    return data["train"][corpus, start[:, None] + np.arange(mc.context + 1)]


def valid_windows(mc, data, corpus, count):
    """`count` fixed, evenly spaced validation windows."""
    last = data["valid_len"][corpus] - mc.context - 1
    start = jnp.arange(count) * last // count
    return data["valid"][corpus, start[:, None] + np.arange(mc.context + 1)]

"""Learning rules: one traced update whose options are scalars, plus the float baselines.

Everything in `DEFAULTS` is a traced float32 scalar, so configurations that differ only there run under one
`vmap` and share one compilation.  What changes the program is in `STATIC`: the family ("int", or "adam" for the
float baselines), the group size and where Newton-Schulz sits.

Integer state is simulated exactly: `v` (latent), `m` (momentum), `c`, `cc` (log2 scales in 1/256) and `rs`, `cs`
(log2 second moments in 1/16) are float32 arrays that hold integers or, for an even number of levels, half-integers.
"""

import jax
import jax.numpy as jnp
import numpy as np

# muon: none | pre (on the sample) | post (on the momentum); rank > 0: a low-rank int8 momentum P Q^T (with mlev=1)
STATIC = {"family": "int", "group": 128, "muon": "none", "rank": 0}

DEFAULTS = {
    # run
    "seed": 0,
    "corpus": 0,
    "lr": 0.05,
    "warm": 100,
    "final": 0.05,
    "sched": 0,  # sched: 0 cosine, 1 linear, 2 WSD (last 40%)
    "lr_emb": 1.0,
    "lr_head": 1.0,
    "wd": 0.0,
    # (a) sample: u = g / RMS, rc=1 row and column RMS, rc=0 one RMS a matrix; b2 > 0 keeps an EMA of the row/column
    # second moments (adafactor); q_in: sign(u)|u|^q (0 is sign descent); ns: share of Newton-Schulz in u or d
    "rc": 1.0,
    "b2": 0.0,
    "clip": 4.0,
    "q_in": 1.0,
    "ns": 1.0,
    # (b) momentum of mlev levels (1: none); fresh=1: this step uses the momentum before it is rounded for storage
    "mlev": 1,
    "beta": 0.9,
    "unit": 0.15,
    "fresh": 1.0,
    "nest": 0.0,
    "ef": 0.0,
    "resid": 1.0,
    # (c) latent of `levels`; trit = sign(v)*(|v| > dead*half-range); sigma = spread*dead*half-range at first
    "levels": 15,
    "dead": 1 / 3,
    "spread": 2.0,
    "rms_out": 0.0,
    "rc_out": 0.0,
    "q_out": 1.0,
    "thresh": 0.0,
    "cautious": 0.0,
    "meta": 0.0,
    "kick": 0.0,
    # rounding: floor(x + .5 + amp*(U-.5)); weyl=1: U is a golden-ratio sequence in time instead of white noise
    "amp": 1.0,
    "weyl": 0.0,
    "weyl_m": 0.0,
    # (d) scale: integrator step, score_grad=1 uses sum g*T instead of sum sign(g)*T; absmean=1 adds log2 mean|v|
    "scale": 0.02,
    "score_grad": 1.0,
    "absmean": 0.0,
    "colscale": 0.0,
    "e_off": 0.0,
    "scale_final": 0.05,
    # float baselines: ternary=1 is QAT (straight-through, absmean per group), 0 is plain float32
    "ternary": 1.0,
    "b1": 0.9,
    "b2a": 0.95,
    "init_mul": 1.0,
    "emb_std": 0.1,
}


# -- schedules, counter-based noise -------------------------------------------------------------------------------


def schedule(cfg, step, steps, final):
    """Warm-up times cosine, linear or warm-up-stable-decay, ending at `final`."""
    x = (step + 1.0) / steps

    def down(y):
        return final + (1 - final) * y

    tail = jnp.clip((1 - x) / 0.4, 0, 1)
    shapes = [down(0.5 + 0.5 * jnp.cos(jnp.pi * x)), down(1 - x), down(tail)]
    chosen = jnp.where(cfg["sched"] == 0, shapes[0], jnp.where(cfg["sched"] == 1, shapes[1], shapes[2]))
    return jnp.minimum(1.0, (step + 1.0) / jnp.maximum(cfg["warm"], 1)) * chosen


def _mix(h):
    """A 32-bit finaliser (lowbias32)."""
    h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * np.uint32(0x846CA68B)
    return h ^ (h >> 16)


def uniform(shape, seed, step, salt, weyl):
    """U[0,1) from a counter (seed, step, matrix, element); weyl=1: each element a golden-ratio sequence in time."""
    index = jnp.arange(np.prod(shape), dtype=jnp.uint32).reshape(shape)
    seed = jnp.asarray(seed, jnp.uint32)
    phase = _mix(_mix(index ^ _mix(seed * 7919 + salt)) + salt)
    step = jnp.asarray(step, jnp.uint32)
    white = _mix(phase ^ _mix(step + seed * 65537 + salt * 977))
    bits = jnp.where(weyl > 0, phase + step * np.uint32(2654435769), white)
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


# -- groups and tensors -------------------------------------------------------------------------------------------


def group_sum(x, group):
    """Sum over groups of `group` columns; a row's last group may be short."""
    k = x.shape[-1]
    r = -(-k // group)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, r * group - k)])
    return x.reshape(*x.shape[:-1], r, group).sum(-1)


def group_size(k, group):
    """Number of columns in every group of a row."""
    r = -(-k // group)
    return np.minimum(group, k - group * np.arange(r)).astype(np.float32)


def spread(s, k, group):
    """Group values back to columns."""
    return jnp.repeat(s, group, axis=-1)[..., :k]


def mean2(x):
    """Mean over a matrix, for each leading index."""
    return jnp.mean(x, (-2, -1), keepdims=True)


def signed_power(x, q):
    """sign(x)|x|^q; q = 0 is the sign."""
    return jnp.where(q == 1, x, jnp.sign(x) * jnp.exp(q * jnp.log(jnp.abs(x) + 1e-30)))


def newton_schulz(g, dtype, iters=5):
    """Orthogonalised g (quintic Newton-Schulz, as in Muon), scaled to an RMS of about 1."""
    flip = g.shape[-2] > g.shape[-1]
    x = jnp.swapaxes(g, -1, -2) if flip else g
    x = (x * jax.lax.rsqrt(jnp.sum(x * x, (-2, -1), keepdims=True) + 1e-30)).astype(dtype)

    def mm(a, b):
        return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(dtype)

    for _ in range(iters):
        a = mm(x, jnp.swapaxes(x, -1, -2))
        x = 3.4445 * x + mm(-4.7750 * a + 2.0315 * mm(a, a), x)
    x = x.astype(jnp.float32) * max(g.shape[-1], g.shape[-2]) ** 0.5
    return jnp.swapaxes(x, -1, -2) if flip else x


def orthonormal(x):
    """The orthogonal polar factor of a tall matrix."""
    x = newton_schulz(x, jnp.float32) / max(x.shape[-1], x.shape[-2]) ** 0.5
    for _ in range(5):
        x = 1.5 * x - 0.5 * x @ (jnp.swapaxes(x, -1, -2) @ x)
    return x


def int8_columns(x, u):
    """x as an int8 code with one scale (log2 in 1/16) a column, stochastically rounded, then decoded."""
    scale = 2.0 ** (jnp.ceil(16 * jnp.log2(jnp.max(jnp.abs(x), -2, keepdims=True) + 1e-30)) / 16) / 127
    return jnp.clip(jnp.floor(x / scale + u), -127, 127) * scale


def low_rank(s, u, beta, resid, noise):
    """Momentum kept as P Q^T: the fresh momentum (what P Q^T misses of it weighs `resid`), and its new factors."""

    def t(x):
        return jnp.swapaxes(x, -1, -2)

    fresh = beta * s["p"] @ t(s["q"]) + (1 - beta) * u
    p = orthonormal(fresh @ s["q"])
    q = t(fresh) @ p
    return p @ t(q) * (1 - resid) + resid * fresh, {
        "p": int8_columns(p, noise(p.shape, 5)),
        "q": int8_columns(q, noise(q.shape, 6)),
    }


def factors(g2, rs, cs, cfg, step, noise):
    """Row and column second moments; b2 > 0 blends them with the stored log2 codes. Returns (row, col, codes)."""
    row, col = jnp.mean(g2, -1, keepdims=True), jnp.mean(g2, -2, keepdims=True)

    def blend(new, code):
        return jnp.where(step == 0, new, cfg["b2"] * 2.0 ** (code / 16) + (1 - cfg["b2"]) * new) + 1e-30

    row, col = blend(row, rs), blend(col, cs)

    def code(x, u):
        return jnp.floor(16 * jnp.log2(x) + u)

    return row, col, code(row, noise(row.shape, 11)), code(col, noise(col.shape, 12))


def normaliser(row, col, rc):
    """1/RMS of each element: rc=1 from the row and column moments, rc=0 from the matrix's mean."""
    mean = jnp.mean(row, -2, keepdims=True) + 1e-30
    log_rc = jnp.log(row + 1e-8 * mean) + jnp.log(col + 1e-8 * mean) - jnp.log(mean)
    return jnp.exp(-0.5 * (rc * log_rc + (1 - rc) * jnp.log(mean)))


# -- the integer rule ---------------------------------------------------------------------------------------------


def geometry(cfg):
    """(half-range, dead zone, initial sigma, offset of the grid) of the latent, in its integer units."""
    half = (cfg["levels"] - 1) / 2
    dead = cfg["dead"] * half
    return half, dead, cfg["spread"] * dead, half % 1


def trits(cfg, v):
    """T: the sign of the latent outside the dead zone."""
    return jnp.sign(v) * (jnp.abs(v) > geometry(cfg)[1])


def init_int(mc, static, cfg):
    """Integer state: latents drawn with the spread of a Gaussian init, everything else zero."""
    key = jax.random.key(jnp.asarray(cfg["seed"], jnp.int32) + 1000)
    half, _, sigma, off = geometry(cfg)
    state = {}
    for i, (name, shape) in enumerate(mc.shapes().items()):
        z = sigma * jax.random.normal(jax.random.fold_in(key, i), shape)
        v = jnp.clip(jnp.round(z - off) + off, -half, half)
        lead, n, k = shape[:-2], shape[-2], shape[-1]
        state[name] = {
            "v": v,
            "m": jnp.zeros(shape),
            "c": jnp.zeros((*lead, n, -(-k // static["group"]))),
            "cc": jnp.zeros((*lead, 1, k)),
            "rs": jnp.zeros((*lead, n, 1)),
            "cs": jnp.zeros((*lead, 1, k)),
        }
        if static["rank"]:
            q = 1e-3 * jax.random.normal(jax.random.fold_in(key, 100 + i), (*lead, k, static["rank"]))
            state[name] |= {"p": jnp.zeros((*lead, n, static["rank"])), "q": q}
    return state


def weights_int(mc, static, cfg, state):
    """Effective weights W = 2^(E + c) * T (times the optional column scale)."""
    out = {}
    sigma = geometry(cfg)[2]
    for name, s in state.items():
        k = s["v"].shape[-1]
        fan = mc.fan_in(name)
        exponent = np.round(np.log2(0.5 / np.sqrt(fan))) + np.where(fan > 1, 1.0, 0.0) * cfg["e_off"]
        mean = group_sum(jnp.abs(s["v"]), static["group"]) / group_size(k, static["group"])
        log_s = exponent + s["c"] / 256 + cfg["absmean"] * jnp.log2(mean / (0.8 * sigma) + 1e-3)
        out[name] = spread(2.0**log_s, k, static["group"]) * trits(cfg, s["v"]) * 2.0 ** (s["cc"] / 256)
    return out


def update_int(mc, static, cfg, state, grads, step):
    """One update of every leaf."""
    lr = cfg["lr"] * schedule(cfg, step, mc.steps, cfg["final"])
    scale_step = 256 * schedule(cfg, step, mc.steps, cfg["scale_final"])
    return {
        name: update_leaf(mc, static, cfg, name, salt * 64, state[name], grads[name], step, lr, scale_step)
        for salt, name in enumerate(state)
    }


def update_leaf(mc, static, cfg, name, salt, s, g, step, lr, scale_step):
    """Sample, momentum, latent and scale of one leaf."""

    def noise(shape, i, flag=0.0):
        return uniform(shape, cfg["seed"], step, salt + i, flag)

    dtype = jnp.bfloat16 if mc.bf16 else jnp.float32
    muon = static["muon"] if name != "tables" else "none"
    v, (half, dead, sigma, _) = s["v"], geometry(cfg)
    # (a) sample
    row, col, rs, cs = factors(g * g, s["rs"], s["cs"], cfg, step, noise)
    u = jnp.clip(g * normaliser(row, col, cfg["rc"]), -cfg["clip"], cfg["clip"])
    u = signed_power(u, cfg["q_in"])
    if muon == "pre":
        u = (1 - cfg["ns"]) * u + cfg["ns"] * newton_schulz(u, dtype)
    # (b) momentum: fresh in this step, rounded for storage
    m_half = (cfg["mlev"] - 1) / 2
    fresh = cfg["beta"] * s["m"] * cfg["unit"] + (1 - cfg["beta"]) * u
    factor = {}
    if static["rank"]:
        fresh, factor = low_rank(s, u, cfg["beta"], cfg["resid"], noise)

    def store(x):
        return jnp.clip(
            jnp.floor(x / cfg["unit"] - m_half % 1 + noise(g.shape, 1, cfg["weyl_m"])) + m_half % 1, -m_half, m_half
        )

    stored = store(fresh)
    nest = jnp.where(cfg["mlev"] == 1, 1.0, cfg["nest"]) if not static["rank"] else cfg["nest"]
    d = (1 - nest) * (cfg["fresh"] * fresh + (1 - cfg["fresh"]) * stored * cfg["unit"]) + nest * u
    if muon == "post":
        d = (1 - cfg["ns"]) * d + cfg["ns"] * newton_schulz(d, dtype)
    # (c) direction
    d2 = d * d
    rms = jnp.sqrt(mean2(d2) + 1e-30)
    d_row, d_col = jnp.mean(d2, -1, keepdims=True), jnp.mean(d2, -2, keepdims=True)
    d = d * jnp.exp(cfg["rc_out"] * (jnp.log(normaliser(d_row, d_col, 1.0)) + jnp.log(rms)))
    d = jnp.where(cfg["q_out"] == 1, d, rms * signed_power(d / rms, cfg["q_out"]))
    d = d * (jnp.abs(d) >= cfg["thresh"] * rms) * (1 - cfg["cautious"] * (d * u <= 0))
    d = jnp.clip(d * jnp.where(cfg["rms_out"] > 0, 1 / rms, 1.0), -cfg["clip"], cfg["clip"])
    # latent
    if name == "tables":
        lr = lr * jnp.stack([cfg["lr_emb"], cfg["lr_head"]]).reshape(2, 1, 1)
    x = -lr * (sigma * d + cfg["wd"] * v)
    away = (x * v > 0) & (jnp.abs(v) > dead)
    x = jnp.where(away, x * jnp.exp(-cfg["meta"] * (jnp.abs(v) - dead) / half), x)
    dv = jnp.floor(x + 0.5 + cfg["amp"] * (noise(g.shape, 2, cfg["weyl"]) - 0.5))
    t = trits(cfg, v)
    moved = jnp.clip(v + dv, -half, half)
    moved = jnp.clip(moved + cfg["kick"] * jnp.sign(dv) * (trits(cfg, moved) != t), -half, half)
    residual = cfg["ef"] * (x - dv) / (lr * sigma + 1e-12)
    stored = jnp.where(cfg["ef"] > 0, store(fresh - residual), stored)
    # (d) scale
    hard = group_sum(jnp.sign(g) * t, static["group"])
    soft = group_sum(g * t, static["group"])

    def unit_rms(y):
        return jnp.clip(y * jax.lax.rsqrt(mean2(y * y) + 1e-30), -4, 4)

    score = jnp.where(cfg["score_grad"] > 0, unit_rms(soft), unit_rms(hard))
    c = s["c"] + jnp.floor(noise(score.shape, 3) - cfg["scale"] * scale_step * score)
    cscore = unit_rms(jnp.sum(g * t, -2, keepdims=True))
    cc = s["cc"] + jnp.floor(noise(cscore.shape, 4) - cfg["colscale"] * scale_step * cscore)
    return {"v": moved, "m": stored, "c": c, "cc": cc, "rs": rs, "cs": cs, **factor}


# -- float baselines ----------------------------------------------------------------------------------------------


def init_adam(mc, static, cfg):
    """Float latents and AdamW moments."""
    key = jax.random.key(jnp.asarray(cfg["seed"], jnp.int32) + 1000)
    state = {}
    for i, (name, shape) in enumerate(mc.shapes().items()):
        fan = mc.fan_in(name)
        std = jnp.where(fan > 1, np.minimum(0.1, 1 / np.sqrt(fan)) * cfg["init_mul"], cfg["emb_std"])
        w = std * jax.random.normal(jax.random.fold_in(key, i), shape)
        state[name] = {"w": w, "mu": jnp.zeros(shape), "nu": jnp.zeros(shape)}
    return state


def weights_adam(mc, static, cfg, state):
    """QAT: round(w / absmean) clipped to a trit, times absmean, per group; or w itself."""

    def ternary(w):
        k = w.shape[-1]
        s = spread(group_sum(jnp.abs(w), static["group"]) / group_size(k, static["group"]), k, static["group"]) + 1e-8
        return jnp.where(cfg["ternary"] > 0, s * jnp.clip(jnp.round(w / s), -1, 1), w)

    return {name: ternary(s["w"]) for name, s in state.items()}


def update_adam(mc, static, cfg, state, grads, step):
    """AdamW with decoupled decay; the gradient of W goes straight through to the latent."""
    lr = cfg["lr"] * schedule(cfg, step, mc.steps, cfg["final"])
    out = {}
    for name, s in state.items():
        g = grads[name]
        mul = jnp.stack([cfg["lr_emb"], cfg["lr_head"]]).reshape(2, 1, 1) if name == "tables" else 1.0
        mu = cfg["b1"] * s["mu"] + (1 - cfg["b1"]) * g
        nu = cfg["b2a"] * s["nu"] + (1 - cfg["b2a"]) * g * g
        d = mu / (1 - cfg["b1"] ** (step + 1.0)) / (jnp.sqrt(nu / (1 - cfg["b2a"] ** (step + 1.0))) + 1e-8)
        out[name] = {"w": s["w"] - lr * mul * (d + cfg["wd"] * s["w"]), "mu": mu, "nu": nu}
    return out


FAMILIES = {"int": (init_int, weights_int, update_int), "adam": (init_adam, weights_adam, update_adam)}


# -- accounting ---------------------------------------------------------------------------------------------------


def packed_bits(levels):
    """Bits of one digit of `levels` values: bit planes, trit planes (five to a byte), or digits packed into words."""
    if levels <= 1:
        return 0.0
    exact = np.log2(levels)
    trit_planes = np.ceil(np.log(levels) / np.log(3) - 1e-9) * 1.6
    return float(min(np.ceil(exact), trit_planes, *(word / int(word / exact + 1e-9) for word in (32, 64))))


def bits_per_weight(mc, cfg):
    """All persistent leaves, in bits a weight: latent and momentum (packed apart or jointly, whichever is less),
    8 + 64 bits a group, 64 a column scale, 16 a row or column second moment."""
    if cfg["family"] == "adam":
        return 96.0
    lat, mom = int(cfg["levels"]), int(cfg["mlev"])
    core = min(packed_bits(lat) + packed_bits(mom), packed_bits(lat * mom))
    total = count = 0.0
    for shape in mc.shapes().values():
        lead, n, k = int(np.prod(shape[:-2])), shape[-2], shape[-1]
        count += lead * n * k
        total += lead * (72.0 * n * -(-k // cfg["group"]) * (cfg["scale"] > 0 or cfg["absmean"] == 0))
        total += lead * 8.0 * (n + k + 4) * cfg["rank"]
        total += lead * (64.0 * k * (cfg["colscale"] > 0) + 16.0 * (n + k) * (cfg["b2"] > 0))
    return core + total / count

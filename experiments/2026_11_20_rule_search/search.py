"""Run a stage of rule configurations: many at once under vmap, as JSON lines and one sorted table.

    python search.py --stage A --out $OUT --minutes 9 --corpora .corpora/pydoc.txt .corpora/tinyshakespeare.txt

Configurations of one program structure (rules.STATIC) share a compilation and run `--vmap` at a time.
Later structures compile in threads while earlier ones train. Every configuration runs on each of --use and --seeds.
"""

import argparse
import collections
import concurrent.futures
import functools
import json
import os
import time
from pathlib import Path

import configs
import jax
import jax.numpy as jnp
import model
import numpy as np
import rules

CHUNK = 100
EVALS = 4


class Program:
    """The compiled functions of one structure at one vmap size."""

    def __init__(self, mc, static, size, data, chunk):
        init, weights, update = rules.FAMILIES[static["family"]]

        def start(cfg):
            return init(mc, static, cfg)

        def train(cfg, state, first, data):
            def one(state, step):
                corpus, seed = cfg["corpus"].astype(jnp.int32), cfg["seed"].astype(jnp.int32)
                tokens = model.train_batch(mc, data, corpus, seed, step)
                loss, grads = jax.value_and_grad(functools.partial(model.loss, mc))(
                    weights(mc, static, cfg, state), tokens
                )
                return update(mc, static, cfg, state, grads, step), loss

            return jax.lax.scan(one, state, first + jnp.arange(chunk))

        def valid(cfg, state, data):
            w = weights(mc, static, cfg, state)
            windows = model.valid_windows(mc, data, cfg["corpus"].astype(jnp.int32), 256).reshape(4, 64, -1)
            stats = {}
            if static["family"] == "int":
                leaves = list(state.values())
                half, dead = rules.geometry(cfg)[:2]
                total = sum(s["v"].size for s in leaves)

                def mean(f):
                    return sum(jnp.sum(f(s)) for s in leaves) / total

                stats = {
                    "zero": mean(lambda s: jnp.abs(s["v"]) <= dead),
                    "v_edge": mean(lambda s: jnp.abs(s["v"]) >= half),
                    "m_edge": mean(lambda s: jnp.abs(s["m"]) >= (cfg["mlev"] - 1) / 2),
                }
            return jnp.mean(jax.lax.map(lambda x: model.loss(mc, w, x), windows)), stats

        one = size == 1  # a vmap over one configuration would cost slower batched products on a CPU

        def batch(f, axes):
            return _squeezed(f, axes) if one else jax.vmap(f, in_axes=axes)

        shaped = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
        cfg = {k: jax.ShapeDtypeStruct((size,), jnp.float32) for k in rules.DEFAULTS}
        t0 = time.time()
        start = batch(start, (0,))
        state = jax.eval_shape(start, cfg)
        self.start = jax.jit(start).lower(cfg).compile()
        step = jax.ShapeDtypeStruct((), jnp.int32)
        self.train = (
            jax.jit(batch(train, (0, 0, None, None)), donate_argnums=1).lower(cfg, state, step, shaped(data)).compile()
        )
        self.valid = jax.jit(batch(valid, (0, 0, None))).lower(cfg, state, shaped(data)).compile()
        self.compile_s = time.time() - t0


def _squeezed(f, axes):
    def run(*args):
        args = [jax.tree.map(lambda x: x[0], a) if ax == 0 else a for a, ax in zip(args, axes, strict=False)]
        return jax.tree.map(lambda x: x[None], f(*args))

    return run


def run_batch(mc, program, batch, size, data, chunk, left):
    """Train up to `size` configurations together; returns one record each. Gives up if it cannot end in time."""
    padded = batch + [batch[-1]] * (size - len(batch))
    cfg = {k: jnp.asarray([c[k] for c in padded], jnp.float32) for k in rules.DEFAULTS}
    t0 = time.time()
    state, curve, losses = program.start(cfg), [], None
    marks = {round(mc.steps * (i + 1) / EVALS / chunk) * chunk for i in range(EVALS)}
    for first in range(0, mc.steps, chunk):
        state, losses = program.train(cfg, state, jnp.int32(first), data)
        if first == chunk:  # the second dispatch: time one that is free of first-run costs
            jax.block_until_ready(losses)
            chunk_s = time.time() - t1
            if chunk_s * (mc.steps / chunk - 2) > left - (time.time() - t0):
                raise TimeoutError(f"{chunk_s:.1f}s a dispatch, {left:.0f}s left")
        elif first == 0:
            jax.block_until_ready(losses)
            time.time()
        if first + chunk in marks:
            val, stats = program.valid(cfg, state, data)
            curve.append(np.asarray(val))
    tail = np.asarray(losses)[:, -50:].mean(1)
    stats = {k: np.asarray(v) for k, v in stats.items()}
    wall = time.time() - t0
    records = []
    for i, c in enumerate(batch):
        # json would write NaN, which is no JSON: non-finite numbers become None
        def number(x):
            return round(float(x), 4) if np.isfinite(x) else None

        records.append(
            {
                **c,
                "bits": round(rules.bits_per_weight(mc, c), 3),
                "val_loss": number(curve[-1][i]),
                "curve": [number(v[i]) for v in curve],
                "train_loss": number(tail[i]),
                **{k: number(v[i]) for k, v in stats.items()},
                "wall_s": round(wall / len(batch), 2),
            }
        )
    return records, wall


def complete(config):
    """A configuration with every default filled in; unknown names are an error."""
    known = {**rules.STATIC, **rules.DEFAULTS, "name": "", "group_name": ""}
    unknown = set(config) - set(known)
    if unknown:
        raise ValueError(f"unknown options {sorted(unknown)}")
    return {**known, **config}


def shown(record):
    """Only what differs from the defaults, short."""
    skip = {"name", "group_name", "corpus", "seed", "family"}
    diff = {k: record[k] for k, d in {**rules.STATIC, **rules.DEFAULTS}.items() if k not in skip and record[k] != d}
    return " ".join(f"{k}={v:g}" if isinstance(v, (int, float)) else f"{k}={v}" for k, v in diff.items())


def table(records, names):
    """Mean over seeds, sorted by loss within each corpus, relative to the best QAT of that corpus."""
    out = []
    for corpus, corpus_name in enumerate(names):
        cells = collections.defaultdict(list)
        for r in records:
            if r["corpus"] == corpus:
                cells[(r["name"], round(r["bits"], 2), shown(r))].append(r["val_loss"])
        mean = {k: np.mean([np.inf if x is None else x for x in v]) for k, v in cells.items()}
        qat = [v for k, v in mean.items() if k[0].startswith("qat")]
        base = min(qat) if qat else np.nan
        out.append(f"\n== {corpus_name}: best QAT {base:.4f}\n  val     rel%   bits  n  rule")
        for key, val in sorted(mean.items(), key=lambda kv: kv[1]):
            out.append(
                f"{val:.4f} {100 * (val / base - 1):+6.1f} {key[1]:6.2f} {len(cells[key]):2d}  {key[0]}: {key[2]}"
            )
    return "\n".join(out)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--stage", default="A", help="a function of configs.py: stage_<name>")
    p.add_argument("--out", required=True)
    p.add_argument("--corpora", nargs="+", required=True)
    p.add_argument("--use", nargs="+", type=int, default=[0], help="numbers of the corpora to run on")
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--minutes", type=float, default=9.0)
    p.add_argument("--vmap", type=int, default=16, help="configurations at once")
    p.add_argument("--baseline", nargs="*", default=[], help="earlier JSON-lines files, for the table only")
    p.add_argument("--only", default="", help="comma-separated group names")
    for f in ("width", "layers", "heads", "context", "batch", "steps", "unroll"):
        p.add_argument(f"--{f}", type=int, default=getattr(model.ModelConfig, f))
    p.add_argument("--bf16", type=int, default=int(jax.default_backend() == "gpu"))
    a = p.parse_args()
    begin = time.time()
    mc = model.ModelConfig(a.width, a.layers, a.heads, 288, a.context, a.batch, a.steps, bool(a.bf16), a.unroll)
    chunk = int(np.gcd(CHUNK, a.steps))
    names, data = model.load_corpora(a.corpora)
    os.makedirs(a.out, exist_ok=True)

    launches, statics = [], []
    for group, members in getattr(configs, f"stage_{a.stage}")().items():
        if a.only and group not in a.only.split(","):
            continue
        members = [
            complete({"corpus": k, "seed": s, **c, "group_name": group})
            for k in a.use
            for s in a.seeds
            for c in members
        ]
        by_static = collections.defaultdict(list)
        for c in members:
            by_static[tuple(c[k] for k in rules.STATIC)].append(c)
        for key, cs in by_static.items():
            size = min(a.vmap, len(cs))
            if (key, size) not in statics and any(k == key for k, _ in statics):
                size = next(s for k, s in statics if k == key)  # share the compilation, at the price of padding
            if (key, size) not in statics:
                statics.append((key, size))
            launches += [(group, key, size, cs[i : i + size]) for i in range(0, len(cs), size)]
    print(
        f"{jax.devices()[0]}, {sum(len(x[3]) for x in launches)} configurations, {len(launches)} launches, "
        f"{len(statics)} programs, {sum(np.prod(s) for s in mc.shapes().values())} weights",
        flush=True,
    )

    pool = concurrent.futures.ThreadPoolExecutor(4 if jax.default_backend() == "gpu" else 1)
    programs = {
        k: pool.submit(Program, mc, dict(zip(rules.STATIC, k[0], strict=False)), k[1], data, chunk) for k in statics
    }
    records, undone, cost = [], [], {}
    path = os.path.join(a.out, f"results_{a.stage}.jsonl")
    for group, key, size, batch in launches:
        left = a.minutes * 60 - (time.time() - begin)
        guess = cost.get(key) or max(cost.values(), default=0.0) * 1.1
        if guess > left:
            undone.append((group, len(batch)))
            continue
        try:
            program = programs[(key, size)].result(timeout=max(1.0, left - guess))
            done, cost[key] = run_batch(mc, program, batch, size, data, chunk, left + 15)
        except Exception as e:  # one bad structure must not lose the rest of a GPU call
            print(f"FAILED {group} {key}: {type(e).__name__} {str(e)[:300]}", flush=True)
            undone.append((group, len(batch)))
            continue
        records += done
        with open(path, "a") as f:
            f.writelines(json.dumps(r) + "\n" for r in done)
        best = min(done, key=lambda r: r["val_loss"] or 99)
        print(
            f"[{time.time() - begin:5.0f}s] {group} {key} x{len(batch)}: {cost[key]:.1f}s "
            f"(compile {program.compile_s:.0f}s) "
            f"best {best['val_loss']} {best['name']} {shown(best)}",
            flush=True,
        )
    for earlier in a.baseline:
        records += [json.loads(line) for line in Path(earlier).read_text().splitlines()]
    text = table(records, names) + (f"\nUNDONE: {undone}" if undone else "\nall done")
    print(text, flush=True)
    with open(os.path.join(a.out, f"table_{a.stage}.txt"), "w") as f:
        f.write(text + "\n")
    os._exit(0)  # do not wait for compilations that nobody needs


if __name__ == "__main__":
    main()

"""Rules against AdamW-trained baselines: a table, results.json and the picture of loss against bits of state.

    python experiments/2026_11_20_rules/compare.py --out experiments/2026_11_20_rules

Runs on whatever JAX finds. On two CPU cores use `--preset byte-0.4m --steps 300 --batch 16 --context 64`.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import corpora
import jax
import numpy as np
from baselines import ADAMW, QAT
from harness import Data, Outcome, Run, Setting, train_baseline, train_rule
from picture import draw
from rich.console import Console
from rich.table import Table

from arbs_jax.audit import audit
from arbs_jax.training.program import Program

RATES = {"qat": (2e-3, 3e-3, 4e-3, 6e-3, 8e-3), "adamw": (1e-3, 2e-3, 4e-3, 8e-3)}
RULES = ("latent10", "latent18", "latent6", "latent4", "integral", "bigint")
FLOAT_BITS = 96.0
"""Latent, first and second moment, 32 bits each."""


def tuned(outcomes: list[Outcome]) -> tuple[float, list[Outcome]]:
    """The learning rate with the lowest mean validation loss, and its outcomes."""
    rates = sorted({outcome.run.learning_rate for outcome in outcomes})
    mean = {rate: np.mean([o.val_loss for o in outcomes if o.run.learning_rate == rate]) for rate in rates}
    best = min(rates, key=lambda rate: mean[rate])
    return best, [outcome for outcome in outcomes if outcome.run.learning_rate == best]


def row(rule: str, bits: float, outcome: Outcome, reference: dict, facts: dict, **extra: object) -> dict:
    """One line of results.json."""
    run = outcome.run
    qat = reference.get((run.corpus, run.seed))
    return {
        "rule": rule,
        "bits_per_weight": round(bits, 3),
        "val_loss": round(outcome.val_loss, 5),
        "train_loss": round(outcome.train_loss, 5),
        "relative_to_qat": None if qat is None else round(outcome.val_loss / qat - 1, 5),
        "corpus": Path(run.corpus).stem,
        "seed": run.seed,
        **facts,
        **extra,
    }


def show(rows: list[dict]) -> None:
    """The means over seeds, a line a rule and corpus."""
    table = Table(title="Validation loss by rule (means over seeds)", title_justify="left")
    for name in ("corpus", "rule", "bits/weight", "nats/byte", "against QAT"):
        table.add_column(name, justify="left" if name in ("corpus", "rule") else "right")
    keys = sorted({(r["corpus"], r["rule"], r["bits_per_weight"]) for r in rows}, key=lambda k: (k[0], k[2], k[1]))
    for corpus, rule, bits in keys:
        chosen = [r for r in rows if (r["corpus"], r["rule"]) == (corpus, rule)]
        loss = np.mean([r["val_loss"] for r in chosen])
        relative = np.mean([r["relative_to_qat"] for r in chosen])
        table.add_row(corpus, rule, f"{bits:.2f}", f"{loss:.4f}", f"{relative:+.2%}")
    Console(width=100).print(table)


def main() -> None:
    """Parses flags, trains, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corpora", nargs="+", default=["pycode", "pydoc"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates of QAT (default: see RATES)")
    parser.add_argument("--baselines", nargs="+", default=["qat", "adamw"], choices=["qat", "adamw"])
    for name, value in asdict(Setting()).items():
        if name != "remat":
            parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    setting = Setting(**{name: getattr(args, name) for name in asdict(Setting()) if name != "remat"})
    args.out.mkdir(parents=True, exist_ok=True)
    data = Data(setting, {name: corpora.load(name) for name in args.corpora})
    runs = [Run(corpus, seed) for corpus in args.corpora for seed in args.seeds]
    facts = {
        "preset": setting.preset,
        "weights": weights(setting),
        "steps": setting.steps,
        "products": setting.products,
        "device": jax.devices()[0].device_kind,
    }
    rows: list[dict] = []
    reference: dict = {}
    began = time.perf_counter()
    sweeps: list[dict] = []
    for baseline in [arm for arm in (QAT, ADAMW) if arm.name in args.baselines]:
        rates = RATES[baseline.name] if args.rates is None or baseline is not QAT else args.rates
        batch = [Run(run.corpus, run.seed, rate) for rate in rates for run in runs]
        outcomes, seconds = train_baseline(setting, baseline, data, batch)
        for rate in rates:
            losses = [round(o.val_loss, 4) for o in outcomes if o.run.learning_rate == rate]
            print(f"[{time.perf_counter() - began:6.0f}s] {baseline.name} {rate}: {losses}", flush=True)
        sweeps += [row(baseline.name, FLOAT_BITS, o, {}, facts, learning_rate=o.run.learning_rate) for o in outcomes]
        for corpus in args.corpora:
            rate, best = tuned([outcome for outcome in outcomes if outcome.run.corpus == corpus])
            if baseline is QAT:
                reference |= {(o.run.corpus, o.run.seed): o.val_loss for o in best}
            rows += [row(baseline.name, FLOAT_BITS, o, reference, facts, learning_rate=rate) for o in best]
    curves = {}
    for rule in args.rules:
        done, bits, seconds = train_rule(setting, rule, data, runs)
        rows += [row(rule, bits, outcome, reference, facts) for outcome in done]
        curves[rule] = {f"{Path(o.run.corpus).stem}/{o.run.seed}": o.curve for o in done}
        print(f"[{time.perf_counter() - began:6.0f}s] {rule} {bits:.2f} bits: {[round(o.val_loss, 4) for o in done]} "
              f"{seconds * 1e3:.2f} ms", flush=True)  # fmt: skip
        write(args.out, rows, sweeps, curves)
    draw(rows, args.out / "loss_by_bits.png")
    show(rows)


def write(out: Path, rows: list[dict], sweeps: list[dict], curves: dict) -> None:
    """Everything so far, after every rule, so that a run cut short loses nothing."""
    (out / "results.json").write_text(json.dumps(rows, indent=1))
    (out / "sweeps.json").write_text(json.dumps(sweeps, indent=1))
    (out / "curves.json").write_text(json.dumps(curves))


def weights(setting: Setting) -> int:
    """Logical weights of the model compared."""
    program = Program(setting.config("integral"))
    return audit(program.abstract_variables, program.specs).logical_ternary_weights


if __name__ == "__main__":
    main()

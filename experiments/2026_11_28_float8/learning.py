"""Does a rule learn as well with float8 products? The same model, corpora, batches and seeds with both kinds.

    python learning.py --preset byte-50m --steps 1200 --batch 32 --context 256 --corpora pycode --products dtype float8

`val_loss` is without float8, as the library validates (`arbs_jax.training.program`), `val_loss_float8` is with it, as
such a run was trained. One line of JSON for each run.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "2026_11_20_rules"))
import corpora
from harness import Data, Run, Setting, train_rule

from arbs_kernels import float8


def main() -> None:
    """Parses flags, trains, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", nargs="+", default=["pycode", "pydoc"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rules", nargs="+", default=["latent10"])
    parser.add_argument("--products", nargs="+", default=["dtype", "float8"])
    parser.add_argument("--cotangents", default=str(float8.COTANGENT), help="their dtype, with float8 products")
    parser.add_argument("--out", type=Path)
    for name in ("preset", "steps", "batch", "context", "dtype"):
        parser.add_argument(f"--{name}", type=type(getattr(Setting(), name)), default=getattr(Setting(), name))
    args = parser.parse_args()
    float8.COTANGENT = jnp.dtype(args.cotangents)
    setting = Setting(args.preset, args.steps, args.batch, args.context, args.dtype)
    data = Data(setting, {name: corpora.load(name) for name in args.corpora})
    runs = [Run(corpus, seed) for corpus in args.corpora for seed in args.seeds]
    for rule in args.rules:
        for products in args.products:
            own = replace(setting, products=products)
            done, _, _ = train_rule(own, rule, data, runs)
            rows = [
                {
                    "rule": rule,
                    "corpus": Path(outcome.run.corpus).stem,
                    "seed": outcome.run.seed,
                    "val_loss": round(outcome.val_loss, 5),
                    "val_loss_float8": outcome.val_loss_float8 and round(outcome.val_loss_float8, 5),
                    "train_loss": round(outcome.train_loss, 5),
                    "cotangents": args.cotangents if products == "float8" else args.dtype,
                    "device": jax.devices()[0].device_kind,
                    **asdict(own),
                }
                for outcome in done
            ]
            print(rule, products, f"{np.mean([row['val_loss'] for row in rows]):.4f}",
                  [(row["val_loss"], row["val_loss_float8"]) for row in rows], flush=True)  # fmt: skip
            if args.out:
                with args.out.open("a") as file:
                    file.writelines(f"{json.dumps(row)}\n" for row in rows)


if __name__ == "__main__":
    main()

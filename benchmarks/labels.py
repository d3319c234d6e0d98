"""Fine-tune pre-trained networks, and the same networks with random weights, on 1 %, 10 % and 100 % of the labels.

    for seed in 0 1 2; do
        mapet pretrain --config fashion_mnist_tiny --epochs 4 --seed $seed --out runs/fashion$seed
    done
    python benchmarks/labels.py runs/fashion0 runs/fashion1 runs/fashion2 --out runs/labels

The n-th run is fine-tuned with seed n, counted from 0. A run that was killed continues when the command is repeated.
The table is in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from spread import spread

from mapet.config.recipes import load_recipe
from mapet.jobs.finetune.run import finetune
from mapet.report.tables import Table

EPOCHS = {0.01: 60, 0.1: 15, 1.0: 3}  # by share of the labels; accuracy no longer rises much after these
ARMS = {"random-init ViT": True, "pre-trained ViT": False}


def accuracy(run: str, seed: int, share: float, reinit: bool, out: Path) -> float:
    results = out / "results.json"
    if not results.exists():
        values = load_recipe("finetune_fashion_mnist") | {
            "model": run,
            "seed": seed,
            "reinit": reinit,
            "epochs": EPOCHS[share],
            "eval_every": 1000,
            "label_share": share if share < 1 else None,
            "precision": "no",
        }
        began = time.perf_counter()
        finetune(values, out, resume=True)
        print(f"{out}: {time.perf_counter() - began:.0f} s", flush=True)
    return float(json.loads(results.read_text())["accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("runs/labels"))
    arguments = parser.parse_args()

    found: dict[tuple[str, float], list[float]] = {}
    for seed, run in enumerate(arguments.runs):
        for share in EPOCHS:
            for arm, reinit in ARMS.items():
                out = arguments.out / f"{'random' if reinit else 'pretrained'}-{share:g}-{seed}"
                found.setdefault((arm, share), []).append(100 * accuracy(run, seed, share, reinit, out))
    rows = [[arm, *(spread(found[arm, share]) for share in EPOCHS)] for arm in ARMS]
    print(Table(["", *(f"{share:.0%} of the labels" for share in EPOCHS)], rows).to_markdown())


if __name__ == "__main__":
    main()

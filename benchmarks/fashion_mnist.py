"""Pre-train and measure on Fashion-MNIST with several seeds: the recipe fashion_mnist_tiny, a table of docs/results.md.

    python benchmarks/fashion_mnist.py --out runs/fashion --seeds 0 1 2

A run that was killed continues when the command is repeated; finished seeds are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

from spread import spread

from mapet.config.recipes import load_recipe
from mapet.jobs.demo.run import FINETUNING, run_demo
from mapet.probes.rows import Row
from mapet.report.tables import Table

LABELS_PER_CLASS = 60  # 1 % of the training images
FEW = {**FINETUNING, "steps": 150, "batch_size": 64, "flip": 0.5, "crop_min": 0.8}


def measure(seed: int, out: Path) -> dict[str, Row]:
    results = out / "results.json"
    if not results.exists():
        values = load_recipe("fashion_mnist_tiny") | {"seed": seed}
        began = time.perf_counter()
        run_demo(values, out, labels_per_class=(LABELS_PER_CLASS,), finetuning=FEW, resume=True)
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s, pre-training and measuring")
    rows: dict[str, Row] = json.loads(results.read_text())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    runs = [measure(seed, arguments.out / f"seed{seed}") for seed in arguments.seeds]
    columns = list(runs[0]["pretrained_vit"])
    rows = [
        [name, *(spread([100 * run[name][column] for run in runs if column in run[name]]) for column in columns)]
        for name in runs[0]
    ]
    title = f"accuracy in %, mean (least to greatest) of seeds {arguments.seeds}"
    print(Table(["", *columns], rows, title).to_markdown())


if __name__ == "__main__":
    main()

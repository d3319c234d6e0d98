"""Compare the speed of training batches whose ids come from a token store with ids computed online.

    python benchmarks/store.py --data IMAGES --tokenizer TOKENIZER --image-size 64 --rounds 5

Both load and augment the same images (two crops of each, mirrored) and alternate within one run. Online ids need the
tokenizer's view and the tokenizer; stored ids need the digest of each image and a lookup. The ids alone, of batches
that are already loaded, are timed too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mapet.data.batches import Batch, StepSampler, ViewDataset, load_batches
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.data.seeds import Draws
from mapet.data.views import TrainView
from mapet.jobs.tokenizer.encode import encode_images
from mapet.targets.sources import OnlineIds, StoredIds, TargetSource
from mapet.tokenizers.files import load_tokenizer
from mapet.tokenstore.store import TokenStore

SIZE = 32


def loop(source: TargetSource, dataset: ViewDataset, batches: int) -> float:
    """Return the seconds for loading batches and getting their ids."""
    began = time.perf_counter()
    for batch in load_batches(dataset, StepSampler(len(dataset), SIZE, 0, 0, batches), workers=0):
        source(batch)
    return time.perf_counter() - began


def ids_alone(source: TargetSource, batches: list[Batch]) -> float:
    """Return the seconds for getting the ids of loaded batches."""
    began = time.perf_counter()
    for batch in batches:
        source(batch)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    images, tokenizer = open_images(arguments.data), load_tokenizer(arguments.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "data": arguments.data,
            "tokenizer": arguments.tokenizer,
            "views": 2,
            "mirror": True,
            "crop_min": 0.5,
            "workers": 0,
        }
        made = encode_images(values, Path(folder) / "tokens")
        print(f"encoded {made['encoded']} images, {made['views']} views each, in {made['seconds']} s")
        online = OnlineIds(tokenizer, torch.device("cpu"), seed=0)
        stored = StoredIds(TokenStore(Path(folder) / "tokens"), images, torch.device("cpu"))
        seconds: dict[str, list[float]] = {"online": [], "stored": [], "online ids": [], "stored ids": []}
        channels = tokenizer.channels
        normalise = (0.5,) * channels, (0.5,) * channels
        sources = {
            name: (
                source,
                ViewDataset(
                    images,
                    TrainView(arguments.image_size, source.view_size, 0.5, 0.5, 0.4, *normalise),
                    Reading(channels),
                    Draws(0, 0, crops=2, mirror=True),
                    digests=source.needs_digests,
                ),
            )
            for name, source in (("online", online), ("stored", stored))
        }
        for _ in range(arguments.rounds):
            for name, (source, dataset) in sources.items():
                seconds[name].append(loop(source, dataset, arguments.batches))
                keys = StepSampler(len(dataset), SIZE, 0, 0, arguments.batches)
                seconds[f"{name} ids"].append(ids_alone(source, list(load_batches(dataset, keys, workers=0))))
    count = SIZE * arguments.batches
    for name, found in seconds.items():
        rates = [count / second for second in found]
        print(f"{name}: median {statistics.median(rates):.0f} images/s ({min(rates):.0f} to {max(rates):.0f})")
    for name in ("", " ids"):
        ratios = [a / b for a, b in zip(seconds[f"online{name}"], seconds[f"stored{name}"], strict=True)]
        what = "ids alone" if name else "batches with ids"
        print(
            f"{what}, stored against online: {statistics.median(ratios):.1f} times as fast "
            f"({min(ratios):.1f} to {max(ratios):.1f})"
        )


if __name__ == "__main__":
    main()

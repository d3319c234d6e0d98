"""Time the loading of JPEGs, from file to batch, in one process with one thread, beside timm and torchvision.

    python benchmarks/loader.py

Each round loads the same files once in every way, so that a change in the machine's speed affects all of them; ratios
are taken within a round. ``cut`` is what a loading process of mapet does; ``finish`` is what the training device does
afterwards (here the same core). timm and torchvision do all of it in the loading process.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from torchvision.transforms import v2

from mapet.data.batches import ViewDataset, collate
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.data.seeds import Draws
from mapet.data.views import TrainView

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_photographs(folder: Path, count: int, width: int, height: int) -> None:
    """Write JPEGs of parts of scikit-learn's two photographs."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(count):
        whole = photographs[number % 2]
        left, top = number * 7 % 64, number * 5 % 32
        part = whole.crop((left, top, left + 560, top + 380))
        part.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:04}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--file-size", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = arguments.image_size

    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), arguments.images, *arguments.file_size)
        files = sorted(Path(folder).iterdir())
        view = TrainView(size, size, 0.2, 0.5, 0.4, MEAN, STD)
        dataset = ViewDataset(open_images(folder), view, Reading(3), Draws(0, 0))
        scale, jitter = (0.2, 1.0), 0.4
        ours = {"timm": create_transform(size, is_training=True, scale=scale, color_jitter=jitter, auto_augment=None)}
        ours["torchvision"] = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResizedCrop(size, scale=scale, interpolation=3, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(jitter, jitter, jitter),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        loaded = []

        def load(transform: Callable[[Image.Image], torch.Tensor]) -> None:
            torch.stack([transform(Image.open(file).convert("RGB")) for file in files])

        ways: dict[str, Callable[[], object]] = {
            "mapet, cut": lambda: loaded.append(collate([dataset[0, index] for index in range(len(files))])),
            "mapet, finish": lambda: view.finish(loaded.pop()["cut"]),
            **{name: lambda transform=transform: load(transform) for name, transform in ours.items()},
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for round_number in range(arguments.rounds + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                if round_number:  # the first round warms up
                    times[name].append((time.perf_counter() - began) / len(files))
    width, height = arguments.file_size
    print(f"{len(files)} JPEGs of {width} x {height} to {size} px, one thread, torch {torch.__version__}")
    print("| way | ms an image | images/s | speed, torchvision = 1 |\n|---|---:|---:|---:|")
    for name, taken in times.items():
        ratios = sorted(other / own for own, other in zip(taken, times["torchvision"], strict=True))
        median = statistics.median(taken)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {1e3 * median:.2f} | {1 / median:.0f} | {spread} |")


if __name__ == "__main__":
    main()

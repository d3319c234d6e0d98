"""``mapet eval segment``: train heads on frozen patch features, measure them, write the results."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import to_dtype

from mapet.config.base import settle
from mapet.data.batches import DamageTally, SampleKey, StepSampler, in_order
from mapet.data.workers import loading_processes, patiently
from mapet.engine.files import claimed_folder, replace_folder
from mapet.engine.parallel import check_precision, count_workers, one_device
from mapet.engine.runfolder import check_out
from mapet.errors import MapetError
from mapet.inference.models import OpenModel, open_model
from mapet.jobs.segment.config import SegmentConfig
from mapet.jobs.segment.data import MOST_CLASSES, Batch, MaskedSet, SegmentationDataset, count_pixels, open_masked
from mapet.jobs.segment.heads import Segmenter, build_head, patch_maps, predict_classes, train_head
from mapet.jobs.segment.results import Confusion, Example, write_results
from mapet.report.progress import Meter

logger = logging.getLogger(__name__)

SHOWN_IMAGES = 6


def segment(
    values: Mapping[str, Any], out: str | Path | None = None, *, console: Console | None = None
) -> dict[str, Any]:
    """Train heads on the frozen patch features of a model and measure them on images with masks.

    Args:
        values: configuration by key, see ``SegmentConfig``; ``model`` and ``data`` are required.
        out: a new folder for ``results.json``, ``results.md``, ``head.safetensors`` (of the first seed) and
            ``predictions.png``; None: nothing is written.
        console: where progress is shown; None for standard error.

    Returns:
        the content of ``results.json``: ``miou``, ``pixel_accuracy`` (also as ``accuracy``) and ``iou_per_class`` in
        0..1, means over the seeds; ``..._std``, the sample standard deviations (None for one seed); ``runs``, the
        metrics of each seed; ``majority_...``, the metrics of predicting the most frequent class everywhere; and the
        settings.

    Raises:
        MapetError: for input that cannot work; no part of the folder is written then.
    """
    config, console = settle(SegmentConfig, values), console or Console(stderr=True)
    if out is not None:
        check_out(config.data, out)
    with nullcontext() if out is None else claimed_folder(Path(out)):
        result, head, examples = _Evaluation(config, console).measure()
        if out is not None:
            replace_folder(Path(out), partial(write_results, result, head, examples))
    return result


class _Evaluation:
    """A model and images with masks, checked to fit together, and the heads that are trained and measured on them."""

    def __init__(self, config: SegmentConfig, console: Console) -> None:
        self.config, self.console, self.device = config, console, one_device()
        check_precision(config.precision)
        train, test = open_masked(config)
        if train.reduce_zero_label:
            logger.info("value 0 in the masks of %s means no class, value 1 means class 0, and so on", config.data)
        self.opened = self._open_model(config.seed)
        blank = torch.zeros(1, self.opened.reading.channels, *self.opened.view.size)
        self.width = patch_maps(self.opened, blank, config.precision).shape[1]
        self.train, train_pixels = self._check_masks(train, "training")
        self.test, test_pixels = self._check_masks(test, "test")
        if len(self.train) < config.batch_size:
            raise MapetError(
                f"batch size {config.batch_size} is larger than the training part of {len(self.train)} images; lower it"
            )
        self.classes = _check_classes(config, train_pixels, test_pixels)
        self.majority = Confusion(self.classes)
        self.majority.counts[:, int(train_pixels.argmax())] = test_pixels[: self.classes]

    def _open_model(self, seed: int) -> OpenModel:
        config = self.config
        opened = open_model(config.model, image_size=config.image_size, reinit=config.reinit, seed=seed)
        opened.network.to(self.device).requires_grad_(False)
        return replace(opened, reading=opened.reading.within(config))

    def _check_masks(self, part: MaskedSet, name: str) -> tuple[MaskedSet, Tensor]:
        """Return the images that can be read, and the number of pixels of each class, ``(MOST_CLASSES,)``."""
        readable, pixels = [], torch.zeros(MOST_CLASSES, dtype=torch.long)
        tally = DamageTally(part, self.config.max_damaged)
        count = partial(count_pixels, part, self.opened.reading)
        threads = count_workers(self.config.workers, part, torch.device("cpu")) or 1
        # After an error the pool does not wait for the masks that are left.
        with ThreadPool(threads) as pool, Meter(self.console, f"checking the {name} masks", len(part)) as meter:
            for index, found in enumerate(pool.imap(count, range(len(part)))):
                if isinstance(found, str):
                    tally.add([[(index, found)]])
                else:
                    readable.append(index)
                    pixels[: len(found)] += found
                meter.show(index + 1)
        return part.subset(readable), pixels

    def measure(self) -> tuple[dict[str, Any], nn.Module, list[Example]]:
        """Train and evaluate a head per seed; return the results, and head and examples of the first seed."""
        config, began, seconds = self.config, time.monotonic(), 0.0
        runs, confusions = [], []
        for seed in range(config.seed, config.seed + config.seeds):
            segmenter = self._train(seed)
            started = time.monotonic()
            confusion, shown = self._evaluate(segmenter)
            seconds += time.monotonic() - started
            runs.append({"seed": seed, "miou": confusion.miou, "pixel_accuracy": confusion.pixel_accuracy})
            logger.info("seed %d: mIoU %.4f, pixel accuracy %.4f", *runs[-1].values())
            confusions.append(confusion)
            if seed == config.seed:
                head, examples = segmenter.head, shown
        result = {
            **_mean_and_std("miou", runs),
            **_mean_and_std("pixel_accuracy", runs),
            "accuracy": fmean(run["pixel_accuracy"] for run in runs),
            "iou_per_class": [_mean(values) for values in zip(*(c.iou_per_class for c in confusions), strict=True)],
            "majority_miou": self.majority.miou,
            "majority_accuracy": self.majority.pixel_accuracy,
            "runs": runs,
            "train_images": len(self.train),
            "test_images": len(self.test),
            "images_per_second": len(self.test) * config.seeds / seconds,
            "seconds": time.monotonic() - began,
            **config.model_dump(mode="json", exclude={"workers", "max_damaged"}),
            "classes": self.classes,
            "image_size": list(self.opened.view.size),
            "reduce_zero_label": self.train.reduce_zero_label,
            "steps": config.total_steps(len(self.train)),
        }
        return result, head, examples

    def _train(self, seed: int) -> Segmenter:
        config, steps = self.config, self.config.total_steps(len(self.train))
        opened = self._open_model(seed) if config.reinit else self.opened
        head = build_head(config.head, self.width, self.classes, seed).to(self.device)
        segmenter = Segmenter(opened, head, config)
        batches = self._load(self.train, StepSampler(len(self.train), config.batch_size, seed, 0, steps), seed)
        with Meter(self.console, f"training, seed {seed}", steps) as meter:
            train_head(segmenter, batches, steps, meter)
        return segmenter

    def _evaluate(self, segmenter: Segmenter) -> tuple[Confusion, list[Example]]:
        count, confusion, examples = len(self.test), Confusion(self.classes), []
        batches = self._load(self.test, in_order(count, 1))  # images differ in size
        shown = {number * count // SHOWN_IMAGES for number in range(SHOWN_IMAGES)}
        with Meter(self.console, "evaluating", count) as meter:
            for index, truth, prediction in predict_classes(segmenter, batches):
                confusion.add(truth, prediction)
                if index in shown:
                    image = to_dtype(self.test.load(index, self.opened.reading), torch.float32, scale=True)
                    examples.append((image, truth, prediction))
                meter.show(index + 1)
        return confusion, examples

    def _load(
        self, images: MaskedSet, keys: StepSampler | list[list[SampleKey]], seed: int | None = None
    ) -> Iterator[Batch]:
        dataset = SegmentationDataset(images, self.opened.view, self.opened.reading, self.config, seed)
        processes = loading_processes(count_workers(self.config.workers, images, self.device))
        loader = DataLoader(dataset, batch_sampler=keys, pin_memory=self.device.type == "cuda", **processes)
        yield from patiently(iter(loader), images.name)


def _check_classes(config: SegmentConfig, train_pixels: Tensor, test_pixels: Tensor) -> int:
    """Return the number of classes; refuse classes that cannot be learned."""
    learned, tested = (set(torch.nonzero(pixels)[:, 0].tolist()) for pixels in (train_pixels, test_pixels))
    if not tested:
        raise MapetError(f"no test image of {config.data} that can be read has pixels of a class; add labelled ones")
    if len(learned) < 2:
        raise MapetError(
            f"the training masks of {config.data} hold {len(learned)} class (--ignore-index is {config.ignore_index}); "
            "at least 2 are needed, numbered from 0, so that masks of 0 and 255 must be saved as 0 and 1"
        )
    greatest = max(learned | tested)
    classes = config.classes or greatest + 1
    if greatest >= classes:
        raise MapetError(
            f"the masks of {config.data} have the class {greatest}, but --classes is {classes}; raise it, or pass the "
            "value of pixels without a class as --ignore-index"
        )
    if unseen := sorted(tested - learned):
        what = f"the test masks of {config.data} have the class {unseen[0]}, which no training mask has"
        if config.classes is None:
            raise MapetError(f"{what}; move images between the parts, or accept it with --classes {classes}")
        logger.warning("%s: it cannot be predicted", what)
    logger.info("%d classes, of which %d occur in the masks", classes, len(learned | tested))
    return classes


def _mean_and_std(key: str, runs: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    values = [run[key] for run in runs]
    return {key: fmean(values), f"{key}_std": stdev(values) if len(values) > 1 else None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None

"""``mapet eval segment``: heads trained on frozen patch features, measured, written."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from mapet.config.base import make_config
from mapet.data.batches import DamageTally, StepSampler, ViewDataset, in_order, load_batches
from mapet.data.seeds import Draws
from mapet.engine.files import claimed_folder, replace_folder
from mapet.engine.processes import count_workers, one_device
from mapet.engine.runfolder import explain_disk_errors
from mapet.engine.training import check_out
from mapet.errors import MapetError
from mapet.inference.models import OpenModel, open_model
from mapet.jobs.segment.config import SegmentConfig
from mapet.jobs.segment.heads import Confusion, HeadRecipe, build_head, patch_maps, predict_classes, train_head
from mapet.jobs.segment.masks import MaskedSet, count_pixels, open_masked
from mapet.jobs.segment.report import plot_segmentation, segmentation_markdown
from mapet.jobs.segment.views import MaskedCrop, MaskedWhole
from mapet.report.progress import Meter

logger = logging.getLogger(__name__)

SHOWN_IMAGES = 6
Example = tuple[Tensor, Tensor, Tensor]


def evaluate_segmentation(
    values: Mapping[str, Any], out: str | Path | None = None, *, console: Console | None = None
) -> dict[str, Any]:
    """Train heads on the frozen patch features of a model and measure them on images with masks.

    Args:
        values: configuration by key, see ``SegmentConfig``; ``model`` and ``data`` are needed.
        out: a new folder for ``results.json``, ``results.md``, ``head.safetensors`` (the first seed's) and
            ``predictions.png``; None: nothing is written.
        console: where progress is shown; None for standard error.

    Returns:
        what ``results.json`` holds: ``miou``, ``pixel_accuracy`` (also as ``accuracy``) and ``iou_per_class`` in 0..1,
        means over the seeds, with ``..._std``, the sample's standard deviation (None for one seed); ``runs``, the
        same by seed; ``majority_...``, of the most frequent class everywhere; and what was measured, and how.

    Raises:
        MapetError: for input that cannot work; nothing is half-written.
    """
    config = make_config(SegmentConfig, dict(values))
    console = console or Console(stderr=True)
    with ExitStack() as held:
        if out is not None:
            check_out(config.data, out)
            held.enter_context(claimed_folder(Path(out)))
        job = _prepare(config, console)
        result, head, examples = _measure(job, console)
        if out is not None:
            with explain_disk_errors(Path(out)):
                replace_folder(Path(out), partial(_write, result, head, examples))
    return result


@dataclass(frozen=True)
class _Prepared:
    """What has been checked: the model, the two parts, and the pixels of each class in them, ``(K,)``."""

    config: SegmentConfig
    opened: OpenModel
    train: MaskedSet
    test: MaskedSet
    train_pixels: Tensor
    test_pixels: Tensor

    @property
    def classes(self) -> int:
        return len(self.train_pixels)


def _prepare(config: SegmentConfig, console: Console) -> _Prepared:
    train, test = open_masked(
        config.data, ignore_index=config.ignore_index, reduce_zero_label=config.reduce_zero_label, seed=config.seed
    )
    if len(train) < config.batch_size:
        raise MapetError(
            f"batch size {config.batch_size} is larger than the training part of {len(train)} images; pass "
            f"--batch-size {len(train)} or less"
        )
    opened = _open(config, config.seed)
    _check_maps(opened, config)
    seen, tested = (_survey(part, config, what, console) for part, what in ((train, "training"), (test, "test")))
    return _Prepared(config, opened, train, test, *_settle_classes(config, seen, tested))


def _settle_classes(config: SegmentConfig, seen: Tensor, tested: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pixels of each class in the two parts, ``(K,)``, or refuse what cannot be learned or measured."""
    greatest = max(len(seen), len(tested)) - 1
    if config.classes is not None and greatest >= config.classes:
        raise MapetError(
            f"the masks of {config.data} have the class {greatest}, but --classes is {config.classes}, so that they "
            f"end at {config.classes - 1}; raise it, or say with --ignore-index which value is of no class"
        )
    if (seen > 0).sum() < 2:
        only = "no class at all" if not seen.any() else f"the single class {int(seen.argmax())}"
        raise MapetError(
            f"the training masks of {config.data} hold {only} (--ignore-index is {config.ignore_index}); at least 2 "
            "are needed, numbered from 0, so that masks of 0 and 255 must be saved as 0 and 1"
        )
    if not tested.any():
        raise MapetError(
            f"the test masks of {config.data} hold no class at all, only pixels that are ignored; add labelled ones"
        )
    classes = config.classes or greatest + 1
    seen, tested = _padded(seen, classes), _padded(tested, classes)
    occurring = int(((seen > 0) | (tested > 0)).sum())
    if config.classes is None and occurring < classes / 2:
        logger.warning(
            "of the %d classes 0 to %d that the masks of %s are taken to have, only %d occur; number classes from 0 "
            "without gaps, or say that the gaps are meant with --classes %d",
            classes,
            greatest,
            config.data,
            occurring,
            classes,
        )
    unseen = torch.nonzero((tested > 0) & (seen == 0))[:, 0].tolist()
    if unseen:
        names = ", ".join(map(str, unseen[:5])) + (", ..." if len(unseen) > 5 else "")
        what = f"the test masks of {config.data} have the class{'es' if len(unseen) > 1 else ''} {names}, which "
        if config.classes is None:
            raise MapetError(
                f"{what}no training mask has; move images between the parts, or accept it with --classes {classes}"
            )
        logger.warning("%sno training mask has: it will not be found", what)
    return seen, tested


def _open(config: SegmentConfig, seed: int) -> OpenModel:
    opened = open_model(config.model, image_size=config.image_size, reinit=config.reinit, seed=seed)
    opened.network.to(one_device(config.precision)).requires_grad_(False)
    return opened


def _check_maps(opened: OpenModel, config: SegmentConfig) -> None:
    """Refuse a model that gives no patches, or too few for the head's batch norm."""
    maps = patch_maps(opened, torch.zeros(1, opened.channels, *opened.view.size))
    if config.batch_size * maps[0, 0].numel() < 2:
        raise MapetError(
            f"model {config.model!r} makes a single patch of an image, so a batch of one is too small for the head's "
            "batch norm; take a larger --image-size or --batch-size"
        )


def _survey(part: MaskedSet, config: SegmentConfig, what: str, console: Console) -> Tensor:
    threads = max(1, count_workers(config.workers, part, torch.device("cpu")))
    total = torch.zeros(0, dtype=torch.long)
    with Meter(console, f"checking the {what} masks", len(part)) as meter:
        for done, pixels in enumerate(count_pixels(part, threads), 1):
            size = max(len(total), len(pixels))
            total = _padded(total, size) + _padded(pixels, size)
            meter.show(done)
    return total


def _padded(pixels: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(pixels, (0, size - len(pixels)))


def _measure(job: _Prepared, console: Console) -> tuple[dict[str, Any], nn.Module, list[Example]]:
    config = job.config
    runs, first_head, examples, confusions = [], None, [], []
    began, seconds = time.monotonic(), 0.0
    for seed in range(config.seed, config.seed + config.seeds):
        opened = _open(config, seed) if config.reinit else job.opened
        head = _train(job, opened, seed, console)
        started = time.monotonic()
        confusion, shown = _evaluate(job, opened, head, console)
        seconds += time.monotonic() - started
        run = {"seed": seed, "miou": confusion.miou, "pixel_accuracy": confusion.pixel_accuracy}
        logger.info("seed %d: mIoU %.4f, pixel accuracy %.4f", *run.values())
        runs.append(run)
        confusions.append(confusion)
        if first_head is None:
            first_head, examples = head, shown
    assert first_head is not None
    majority = Confusion(job.classes)
    majority.counts[:, int(job.train_pixels.argmax())] = job.test_pixels
    figures: dict[str, Any] = {}
    for key in ("miou", "pixel_accuracy"):
        found = [float(run[key]) for run in runs]
        figures |= {key: fmean(found), f"{key}_std": stdev(found) if len(found) > 1 else None}
    result = {
        **figures,
        "accuracy": figures["pixel_accuracy"],
        "iou_per_class": [_mean(values) for values in zip(*(c.iou_per_class for c in confusions), strict=True)],
        "majority_miou": majority.miou,
        "majority_accuracy": majority.pixel_accuracy,
        "runs": runs,
        "classes": job.classes,
        "train_images": len(job.train),
        "test_images": len(job.test),
        "images_per_second": len(job.test) * config.seeds / seconds,
        "seconds": time.monotonic() - began,
        **config.model_dump(mode="json", exclude={"classes", "workers", "max_damaged"}),
        "image_size": list(job.opened.view.size),
        "reduce_zero_label": job.train.reduce_zero_label,
        "steps": config.total_steps(len(job.train)),
    }
    return result, first_head, examples


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _train(job: _Prepared, opened: OpenModel, seed: int, console: Console) -> nn.Module:
    config, view = job.config, opened.view
    crop = MaskedCrop(
        view.size, _short_side(config, opened), config.crop_min, config.flip, view.mean, view.std, view.interpolation
    )
    recipe = HeadRecipe(config.total_steps(len(job.train)), config.lr, config.weight_decay, config.warmup)
    head = build_head(config.head, opened, job.classes, seed)
    batches = load_batches(
        ViewDataset(job.train, crop, opened.channels + 1, Draws(seed, seed)),
        StepSampler(len(job.train), config.batch_size, seed, 0, recipe.steps),
        count_workers(config.workers, job.train, opened.device),
        pin=opened.device.type == "cuda",
    )
    tally = DamageTally(job.train, config.max_damaged)
    with Meter(console, f"training, seed {seed}", recipe.steps) as meter:
        train_head(opened, head, batches, recipe, tally, precision=config.precision, show=meter.show)
    return head


def _evaluate(job: _Prepared, opened: OpenModel, head: nn.Module, console: Console) -> tuple[Confusion, list[Example]]:
    config, view, count = job.config, opened.view, len(job.test)
    whole = MaskedWhole(view.size, _short_side(config, opened), view.mean, view.std, view.interpolation)
    batches = load_batches(
        ViewDataset(job.test, whole, opened.channels + 1),
        in_order(count, 1),  # images are of different sizes
        count_workers(config.workers, job.test, opened.device),
        pin=opened.device.type == "cuda",
    )
    confusion, examples, began = Confusion(job.classes), [], time.monotonic()
    shown = {number * count // SHOWN_IMAGES for number in range(SHOWN_IMAGES)}
    with Meter(console, "evaluating", count) as meter:
        for index, truth, prediction in predict_classes(
            opened,
            head,
            batches,
            DamageTally(job.test, config.max_damaged),
            overlap=config.overlap,
            batch_size=config.batch_size,
            precision=config.precision,
        ):
            confusion.add(truth, prediction)
            if index in shown:
                examples.append((job.test.load(index, opened.channels + 1)[:-1], truth, prediction))
            meter.show(index + 1, f"{(index + 1) / (time.monotonic() - began):.1f} images/s")
    if not confusion.counts.any():
        raise MapetError(f"none of the test images of {config.data} that have labelled pixels can be read; repair them")
    return confusion, examples


def _short_side(config: SegmentConfig, opened: OpenModel) -> int | None:
    return None if config.mode == "whole" else config.short_side or min(opened.view.size)


def _write(result: dict[str, Any], head: nn.Module, examples: list[Example], folder: Path) -> None:
    (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "results.md").write_text(segmentation_markdown(result))
    tensors = {key: value.contiguous().cpu() for key, value in head.state_dict().items()}
    made_of = {key: str(result[key]) for key in ("head", "model", "classes", "image_size")}
    save_file(tensors, folder / "head.safetensors", metadata=made_of)
    plot_segmentation(examples, result["classes"], folder / "predictions.png")

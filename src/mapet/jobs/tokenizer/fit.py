"""Fit a tokenizer on images, and report on a tokenizer."""

import json
import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mapet.config.base import settle
from mapet.data.batches import DamageTally, ViewDataset, draw_batches, load_batches
from mapet.data.open import open_images
from mapet.data.reading import Reading, as_range
from mapet.data.seeds import Draws, Stream, fold_seed
from mapet.data.sources import ImageSet
from mapet.data.views import PlainView, TrainView, View
from mapet.engine.files import claimed_folder, replace_folder
from mapet.engine.measuring import with_measured
from mapet.engine.parallel import count_workers, explain_lost_processes, join_processes, main_first, on_main, one_device
from mapet.engine.runfolder import check_out
from mapet.errors import MapetError
from mapet.jobs.tokenizer.codebook import CodebookReport, measure_codebook, plot_atlas, plot_usage, shortcomings
from mapet.jobs.tokenizer.config import FitConfig, ReportConfig
from mapet.report.figures import plot_tokens
from mapet.report.progress import Meter
from mapet.targets.fitting import fit_codebook
from mapet.targets.tokenizer import check_readable, is_ready, settle_vocab_size, unfitted_tokenizer
from mapet.tokenizers.base import Tokenizer
from mapet.tokenizers.files import load_tokenizer, save_tokenizer

logger = logging.getLogger(__name__)

REPORT_EPOCH = -2  # neither a training epoch nor that of fitting: a report is on other views
# Enough patches to tell a dead code from a rare one, within bounds on the number of images.
PATCHES_PER_CODE, MOST_REPORT_IMAGES, LEAST_REPORT_IMAGES = 50, 20_000, 1000
SHOWN_IMAGES = 8


def fit_tokenizer(
    values: Mapping[str, Any], out: str | Path, *, console: Console | None = None
) -> tuple[Tokenizer, CodebookReport | None]:
    """Fit a k-means tokenizer on images and write it, with a report, into a new folder.

    Args:
        values: configuration by key, see ``FitConfig``; ``data`` is required.
        out: the tokenizer's folder.
        console: where progress is shown; None for standard error.

    Returns:
        the tokenizer, and the report; None instead of the report on processes other than the main one.

    Raises:
        MapetError: for input that cannot work; nothing is half-written.
    """
    config = settle(FitConfig, values)
    check_out(config.data, out)
    if is_ready(config.teacher):
        raise MapetError(f"teacher {config.teacher!r} is a tokenizer already; use it as it is, with --tokenizer")
    console = console or Console(stderr=True)
    with ExitStack() as held, explain_lost_processes():
        on_main(lambda: held.enter_context(claimed_folder(Path(out))))
        images = main_first(lambda: open_images(config.data))
        config = with_measured(config, images)
        device = torch.device(join_processes().device)
        workers = count_workers(config.workers, images, device)
        side = config.image_size // config.patch_size
        config = config.but(vocab_size=settle_vocab_size(config.teacher, config.vocab_size, len(images) * side**2))
        tokenizer = main_first(
            lambda: unfitted_tokenizer(config.teacher, config, (side, side), config.image_size, config.channels)
        ).to(device)
        dataset = _views(images, tokenizer, Reading.of(config), config.seed, config.crop_min)
        tally = DamageTally(images, config.max_damaged)
        fit_codebook(tokenizer, config, dataset, tally, batch_size=config.batch_size, workers=workers, console=console)
        report = on_main(lambda: _report(Path(out), tokenizer, dataset, workers, console, with_tokenizer=True))
    return tokenizer.eval(), report


def report_on_tokenizer(
    values: Mapping[str, Any], out: str | Path, *, console: Console | None = None
) -> CodebookReport:
    """Measure a tokenizer's codebook on images and write a report into a new folder; see ``CodebookReport``.

    Args:
        values: configuration by key, see ``ReportConfig``; ``data`` and ``tokenizer`` are required.
        out: the report's folder.
        console: where progress is shown; None for standard error.

    Raises:
        MapetError: for input that cannot work; nothing is half-written.
    """
    config, device = settle(ReportConfig, values), one_device()
    check_out(config.data, out)
    with claimed_folder(Path(out)):
        images, tokenizer = open_images(config.data), load_tokenizer(config.tokenizer, config.teacher_weights)
        reading = Reading(config.channels or tokenizer.channels, as_range(config.value_range)).within(config)
        check_readable(config.tokenizer, tokenizer.to(device), reading.channels)
        workers = count_workers(config.workers, images, device)
        dataset = _views(images, tokenizer, reading, config.seed, None)
        console = console or Console(stderr=True)
        return _report(Path(out), tokenizer, dataset, workers, console, with_tokenizer=False)


def _report(
    out: Path, tokenizer: Tokenizer, dataset: ViewDataset, workers: int, console: Console, *, with_tokenizer: bool
) -> CodebookReport:
    """Measure a codebook on views of random images; write the report, perhaps with the tokenizer, into ``out``.

    The report is ``report.json``, ``atlas.png``, ``token_maps.png`` and ``usage.png``.
    """
    wanted = PATCHES_PER_CODE * tokenizer.vocab_size // math.prod(tokenizer.grid)
    count = min(len(dataset), max(LEAST_REPORT_IMAGES, min(MOST_REPORT_IMAGES, wanted)))
    batches = draw_batches(len(dataset), count, 64, REPORT_EPOCH, fold_seed(dataset.draws.seed, Stream.SAMPLE, 1))
    keys = [key for batch in batches for key in batch]
    tally = DamageTally(dataset.images, 1.0)
    found = []
    with Meter(console, "report", count) as meter:
        for batch in load_batches(dataset, batches, workers, tokenizer.device):
            tally.add(batch["damaged"])
            ids, distances = tokenizer.encode_with_distance(batch["tokenizer_images"])
            found.append((ids.cpu(), distances.cpu()))
            meter.show(min(count, 64 * len(found)))
    ids, distances = (torch.cat(parts) for parts in zip(*found, strict=True))
    report = measure_codebook(tokenizer, ids, distances)
    for sentence in shortcomings(report):
        logger.warning("%s", sentence)

    def view(image: int) -> Tensor:
        return next(load_batches(dataset, [[keys[image]]], workers=0))["tokenizer_images"][0]

    def write(folder: Path) -> None:
        if with_tokenizer:
            save_tokenizer(tokenizer, folder)
        shown = torch.stack([view(image) for image in range(min(SHOWN_IMAGES, count))])
        (folder / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
        plot_atlas(ids, distances, tokenizer.grid, view, folder / "atlas.png")
        plot_tokens(shown, ids[: len(shown)], tokenizer.grid, tokenizer.vocab_size, folder / "token_maps.png")
        plot_usage(ids, tokenizer.vocab_size, folder / "usage.png")

    replace_folder(out, write)
    return report


def _views(images: ImageSet, tokenizer: Tokenizer, reading: Reading, seed: int, crop_min: float | None) -> ViewDataset:
    """Return the centre squares of images, or random crops if ``crop_min`` is given, as the tokenizer reads them."""
    size, mean, std = tokenizer.input_size, (0.0,) * reading.channels, (1.0,) * reading.channels
    view: View = PlainView((size, size), mean, std)
    if crop_min is not None:
        view = TrainView(0, size, crop_min, flip=0.5, jitter=0.0, mean=mean, std=std)
    return ViewDataset(images, view, reading, Draws(seed, seed))

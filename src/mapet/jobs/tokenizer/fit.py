"""Tokenizers as a product: fitted on one's own images, with a report on whether they are any good."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mapet.config.base import settle
from mapet.data.batches import DamageTally, ViewDataset, draw_batches, load_batches
from mapet.data.open import open_images
from mapet.data.seeds import Draws, Stream, fold_seed
from mapet.data.sources import ImageSet
from mapet.data.views import PlainView, TrainView, View
from mapet.engine.files import claimed_folder, replace_folder
from mapet.engine.processes import count_workers, join_processes, main_first, on_main
from mapet.engine.runfolder import check_out, explain_disk_errors
from mapet.errors import MapetError
from mapet.jobs.tokenizer.atlas import write_codebook_report
from mapet.jobs.tokenizer.codebook import CodebookReport, CodebookStatistics, shortcomings
from mapet.jobs.tokenizer.config import FitConfig, ReportConfig
from mapet.report.progress import Meter
from mapet.targets.fitting import fit_codebook
from mapet.targets.tokenizer import check_readable, is_ready, settle_vocab_size, unfitted_tokenizer
from mapet.tokenizers.base import Tokenizer
from mapet.tokenizers.files import load_tokenizer, save_tokenizer

logger = logging.getLogger(__name__)

REPORT_EPOCH = -2  # its views are neither trained on nor fitted on
# Enough patches to tell a code that is never used from one that is rare, but no more images than these.
PATCHES_PER_CODE, MOST_REPORT_IMAGES, LEAST_REPORT_IMAGES = 50, 20_000, 1000
SHOWN_IMAGES = 8

Gathered = tuple[CodebookReport, CodebookStatistics, torch.Tensor, torch.Tensor]


def fit_tokenizer(
    values: Mapping[str, Any], out: str | Path, *, console: Console | None = None
) -> tuple[Tokenizer, CodebookReport | None]:
    """Fit a k-means tokenizer on images and write it, with a report, into a new folder.

    Args:
        values: configuration by key, see ``FitConfig``; ``data`` is needed.
        out: the tokenizer's folder.
        console: where progress is shown; None for standard error.

    Returns:
        the tokenizer, and the report; None on any process but the main one.

    Raises:
        MapetError: for input that cannot work; nothing is half-written.
    """
    config = settle(FitConfig, values)
    console = console or Console(stderr=True)
    check_out(config.data, out)
    if is_ready(config.teacher):
        raise MapetError(f"teacher {config.teacher!r} is a tokenizer already; use it as it is, with --tokenizer")
    with ExitStack() as held:
        on_main(lambda: held.enter_context(claimed_folder(Path(out))))
        return _fit(config, Path(out), console)


def _fit(config: FitConfig, out: Path, console: Console) -> tuple[Tokenizer, CodebookReport | None]:
    images = main_first(lambda: open_images(config.data))
    device = torch.device(join_processes().device)
    workers = count_workers(config.workers, images, device)
    side = config.image_size // config.patch_size
    vocab_size = settle_vocab_size(config.teacher, config.vocab_size, len(images) * side**2)
    config = config.model_copy(update={"vocab_size": vocab_size})
    tokenizer = main_first(
        lambda: unfitted_tokenizer(config.teacher, config, (side, side), config.image_size, config.channels)
    ).to(device)
    view = _fit_view(tokenizer.input_size, config.channels, config.crop_min)
    dataset = ViewDataset(images, view, config.channels, Draws(config.seed, config.seed))
    fit_codebook(
        tokenizer,
        config,
        dataset,
        DamageTally(images, config.max_damaged),
        seed=config.seed,
        batch_size=config.batch_size,
        workers=workers,
        console=console,
    )

    def finish() -> CodebookReport:
        gathered = gather_statistics(tokenizer, images, view, config.channels, config.seed, workers, console)
        with explain_disk_errors(out):
            replace_folder(out, partial(_write, tokenizer, gathered))
        return gathered[0]

    return tokenizer.eval(), on_main(finish)


def report_on_tokenizer(
    values: Mapping[str, Any], out: str | Path, *, console: Console | None = None
) -> CodebookReport:
    """Report how a tokenizer does on images, into a new folder; see ``CodebookReport``.

    Args:
        values: configuration by key, see ``ReportConfig``; ``data`` and ``tokenizer`` are needed.
        out: the report's folder.
        console: where progress is shown; None for standard error.

    Raises:
        MapetError: for input that cannot work; nothing is half-written.
    """
    config = settle(ReportConfig, values)
    check_out(config.data, out)
    out, device = Path(out), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with claimed_folder(out):
        images, tokenizer = open_images(config.data), load_tokenizer(config.tokenizer, config.teacher_weights)
        channels = tokenizer.channels if config.channels is None else config.channels
        check_readable(config.tokenizer, tokenizer.to(device), channels)
        gathered = gather_statistics(
            tokenizer,
            images,
            _fit_view(tokenizer.input_size, channels, None),
            channels,
            config.seed,
            count_workers(config.workers, images, device),
            console or Console(stderr=True),
        )
        with explain_disk_errors(out):
            replace_folder(out, partial(write_codebook_report, *gathered))
    return gathered[0]


def gather_statistics(
    tokenizer: Tokenizer, images: ImageSet, view: View, channels: int, seed: int, workers: int, console: Console
) -> Gathered:
    """Tokenize random images; return the report, what it is made from, and a few views with their ids."""
    patches = tokenizer.grid[0] * tokenizer.grid[1]
    wanted = PATCHES_PER_CODE * tokenizer.vocab_size // patches
    count = min(len(images), max(LEAST_REPORT_IMAGES, min(MOST_REPORT_IMAGES, wanted)))
    keys = draw_batches(len(images), count, 64, REPORT_EPOCH, fold_seed(seed, Stream.SAMPLE, 1))
    statistics, done = CodebookStatistics(tokenizer), 0
    shown: list[torch.Tensor] = []
    tally = DamageTally(images, 1.0)
    with Meter(console, "report", count) as meter:
        for batch in load_batches(ViewDataset(images, view, channels, Draws(seed, seed)), keys, workers):
            tally.add(batch["damaged"])
            ids, distances = tokenizer.encode_with_distance(batch["tokenizer_images"].to(tokenizer.device))
            statistics.add(batch["tokenizer_images"], ids.cpu(), distances.cpu())
            shown = shown or [batch["tokenizer_images"][:SHOWN_IMAGES], ids[:SHOWN_IMAGES].cpu()]
            done += len(ids)
            meter.show(done)
    report = statistics.report()
    for sentence in shortcomings(report):
        logger.warning("%s", sentence)
    views, ids = shown
    return report, statistics, views, ids


def _write(tokenizer: Tokenizer, gathered: Gathered, folder: Path) -> None:
    save_tokenizer(tokenizer, folder)
    write_codebook_report(*gathered, folder)


def _fit_view(size: int, channels: int, crop_min: float | None) -> View:
    nothing = (0.0,) * channels, (1.0,) * channels
    return PlainView((size, size), *nothing) if crop_min is None else TrainView(0, size, crop_min, 0.5, 0.0, *nothing)

"""The tokenizer of a run: taken from a folder or fitted on the run's own images, and its baseline."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mapet.config import PretrainConfig
from mapet.data import DamageTally, ImageSet, Stream, TrainView, ViewDataset, fold_seed, load_batches
from mapet.engine import replace_file
from mapet.errors import MapetError
from mapet.report import Baseline
from mapet.tokenizers import CONFIG_FILE, KFeatures, KPixels, KTokenizer, load_tokenizer
from mapet.tokenizers.kmeans import ITERATIONS

logger = logging.getLogger(__name__)

MAX_VOCAB = 8192  # the paper's
MAX_VOCAB_PIXELS = 1024  # pixels have fewer kinds of patches than features have, and are to be had at once
POINTS_PER_CENTROID = 50  # the least that a default vocabulary is given
# Patches sampled for each centroid: faiss's own default (upstream takes 512); fewer where fitting would take more than
# so many operations, about ten minutes on ten cores, but not fewer than faiss's own least.
MOST_SAMPLED, LEAST_SAMPLED, FIT_OPERATIONS = 256, 39, 1e14
SAMPLE_BYTES = 4 << 30
BASELINE_IMAGES = 2048


def is_folder(tokenizer: str) -> bool:
    """Whether ``--tokenizer`` means a folder: it holds a fitted tokenizer, or is not a mere name."""
    path = Path(tokenizer)
    return tokenizer != "pixels" and path.is_dir() and ((path / CONFIG_FILE).exists() or tokenizer != path.name)


def settle_vocab_size(config: PretrainConfig, points: int) -> int | None:
    """Return how many ids a tokenizer fitted on so many patches gets; None if it is not to be fitted."""
    if is_folder(config.tokenizer):
        return config.vocab_size
    if config.vocab_size is not None:
        if config.vocab_size > points:
            raise MapetError(
                f"a codebook of {config.vocab_size} ids needs at least as many patches, but the images have only "
                f"{points}; take a smaller --vocab-size or more images"
            )
        return config.vocab_size
    power = max(1, int(math.log2(max(2, points / POINTS_PER_CENTROID))))
    return min(MAX_VOCAB_PIXELS if config.tokenizer == "pixels" else MAX_VOCAB, 1 << power)


def make_tokenizer(
    config: PretrainConfig,
    grid: tuple[int, int],
    images: ImageSet,
    view: TrainView,
    device: torch.device,
    workers: int,
) -> KTokenizer:
    """Return the tokenizer that the configuration names: read from its folder, or fitted on the images.

    Raises:
        MapetError: if it cannot be had, or its grid is not the student's.
    """
    if os.sep in config.tokenizer and ":" not in config.tokenizer and not Path(config.tokenizer).is_dir():
        raise MapetError(f"tokenizer folder {config.tokenizer!r} does not exist")
    if not is_folder(config.tokenizer):
        return _fit(config, grid, images, view, device, workers)
    tokenizer = load_tokenizer(config.tokenizer)
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise MapetError(
            f"vocab_size is {config.vocab_size}, but tokenizer {config.tokenizer!r} is fitted and has "
            f"{tokenizer.vocab_size} ids; leave --vocab-size out"
        )
    try:  # asked now, so that what it cannot read is refused before anything is written
        tokenizer.encode(torch.zeros(1, config.channels, config.image_size, config.image_size))
    except MapetError as error:
        raise MapetError(f"tokenizer {config.tokenizer!r} does not fit this run: {error}") from error
    if tokenizer.grid != grid:
        raise MapetError(
            f"tokenizer {config.tokenizer!r} gives {tokenizer.grid[0]} x {tokenizer.grid[1]} ids an image, but "
            f"the model has {grid[0]} x {grid[1]} patches; fit one for this image and patch size"
        )
    return tokenizer


def _fit(
    config: PretrainConfig,
    grid: tuple[int, int],
    images: ImageSet,
    view: TrainView,
    device: torch.device,
    workers: int,
) -> KTokenizer:
    patches = grid[0] * grid[1]
    vocab_size = config.vocab_size
    assert vocab_size is not None, "settle_vocab_size() sets it for a tokenizer to be fitted"
    tokenizer: KTokenizer
    if config.tokenizer == "pixels":
        patch = config.image_size // grid[0]
        tokenizer = KPixels(config.image_size, patch, config.channels, vocab_size, config.contrast)
    else:
        tokenizer = KFeatures(
            config.tokenizer,
            grid,
            vocab_size,
            config.teacher_size or config.image_size,
            config.teacher_stage,
            config.teacher_weights,
        )
    tokenizer.to(device)
    width = tokenizer.centroids.shape[1]
    affordable = FIT_OPERATIONS / (2 * ITERATIONS * vocab_size**2 * width)
    per_centroid = min(MOST_SAMPLED, max(LEAST_SAMPLED, int(affordable)))
    wanted = min(per_centroid * vocab_size, SAMPLE_BYTES // (4 * width))
    # From many images a few patches each: neighbouring patches are alike. From at most all images.
    per_image = min(patches, max(math.ceil(patches / 4), math.ceil(wanted / len(images))))
    count = min(len(images), math.ceil(wanted / per_image))
    if count * per_image < vocab_size:
        raise MapetError(
            f"a codebook of {vocab_size} ids needs at least as many patches, but {count} images give only "
            f"{count * per_image}; take a smaller --vocab-size or more images"
        )
    logger.info(
        "fitting tokenizer %r: %d ids from %d patches of %d images",
        config.tokenizer, vocab_size, count * per_image, count,
    )  # fmt: skip
    began = time.perf_counter()
    batches = _views(config, images, view, count, workers)
    tokenizer.fit(batches, points_per_image=per_image, seed=config.seed)
    logger.info("fitted in %.1f s", time.perf_counter() - began)
    return tokenizer


def _views(config: PretrainConfig, images: ImageSet, view: TrainView, count: int, workers: int) -> Iterator[Tensor]:
    """Yield augmented views of ``count`` random images, as training sees them."""
    generator = torch.Generator().manual_seed(fold_seed(config.seed, Stream.SAMPLE))
    chosen = torch.randperm(len(images), generator=generator)[:count].tolist()
    keys = [[(-1, index) for index in chosen[i : i + 64]] for i in range(0, count, 64)]
    tally = DamageTally(images, config.max_damaged)
    for batch in load_batches(ViewDataset(images, view, config.channels, config.seed), keys, workers):
        tally.add(batch)
        yield batch["view"]


def measure_baseline(
    tokenizer: KTokenizer,
    config: PretrainConfig,
    images: ImageSet,
    view: TrainView,
    file: Path,
    device: torch.device,
    workers: int,
) -> Baseline:
    """Return loss and accuracy of guessing ids by their frequency, measured once per run and kept in ``file``."""
    try:
        saved = json.loads(file.read_text())
        return Baseline(float(saved["unigram_entropy"]), float(saved["chance"]))
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        logger.warning("%s is damaged and measured again", file)
    counts = torch.zeros(tokenizer.vocab_size, dtype=torch.long)
    for views in _views(config, images, view, min(len(images), BASELINE_IMAGES), workers):
        counts += torch.bincount(tokenizer.encode(views.to(device)).flatten().cpu(), minlength=len(counts))
    share = counts / counts.sum()
    entropy = float(torch.special.entr(share.double()).sum())
    baseline = Baseline(entropy, float(share.max()))
    used = int((counts > 0).sum())
    content = {"unigram_entropy": entropy, "chance": baseline.chance, "used_ids": used, "ids": len(counts)}
    replace_file(file, json.dumps(content, indent=1) + "\n")
    logger.info(
        "tokens: %d of %d ids in use, unigram entropy %.3f nats, most frequent id %.1f%%",
        used, len(counts), entropy, 100 * baseline.chance,
    )  # fmt: skip
    return baseline

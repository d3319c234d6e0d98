"""Where a run's targets come from: a tokenizer read or fitted, or a token store; and what chance gives."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mapet.config import PretrainConfig, TeacherKeys
from mapet.engine import replace_file
from mapet.errors import MapetError
from mapet.report import Baseline
from mapet.tokenizers import CONFIG_FILE, PUBLISHED, Grid, KFeatures, KPixels, KTokenizer, Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

MAX_VOCAB = 8192  # the paper's
MAX_VOCAB_PIXELS = 1024  # pixels have fewer kinds of patches than features have, and are to be had at once
POINTS_PER_CENTROID = 50  # the least that a default vocabulary is given
BASELINE_IMAGES = 2048


def is_ready(name: str) -> bool:
    """Whether a name means a tokenizer that is not to be fitted: published, a folder that holds one, or a path."""
    path = Path(name)
    if name in PUBLISHED:
        return True
    if name == "pixels" or not path.is_dir() or (path / "config.json").is_file():  # the last: an exported backbone
        return False
    return any((folder / CONFIG_FILE).exists() for folder in (path, path / "tokenizer")) or name != path.name


def settle_vocab_size(name: str, asked: int | None, points: int) -> int | None:
    """Return how many ids a tokenizer fitted on so many patches gets; as asked if it is not to be fitted."""
    if is_ready(name):
        return asked
    if asked is not None:
        if asked > points:
            raise MapetError(
                f"a codebook of {asked} ids needs at least as many patches, but the images have only "
                f"{points}; take a smaller --vocab-size or more images"
            )
        return asked
    power = max(1, int(math.log2(max(2, points / POINTS_PER_CENTROID))))
    return min(MAX_VOCAB_PIXELS if name == "pixels" else MAX_VOCAB, 1 << power)


def unfitted_tokenizer(
    name: str,
    config: TeacherKeys,
    *,
    grid: Grid,
    image_size: int,
    channels: int,
    vocab_size: int,
    contrast: bool,
    spherical: bool,
) -> KTokenizer:
    """Return a k-means tokenizer that is still to be fitted.

    Args:
        name: "pixels", or a teacher's.
        config: how the teacher is asked.
        grid: of the student.
        image_size, channels: of the student's input.
        vocab_size: ``V``.
        contrast, spherical: see ``KPixels`` and ``KTokenizer``.
    """
    if os.sep in name and ":" not in name and not Path(name).is_dir():
        raise MapetError(f"tokenizer folder {name!r} does not exist")
    if name == "pixels":
        return KPixels(image_size, image_size // grid[0], channels, vocab_size, contrast, spherical)
    size = config.teacher_size or image_size
    return KFeatures.from_teacher(
        name, grid, vocab_size, size, config.teacher_stage, config.teacher_weights, spherical
    )  # fmt: skip


def ready_tokenizer(name: str, config: PretrainConfig, grid: Grid) -> Tokenizer:
    """Read a tokenizer that is not to be fitted.

    Raises:
        MapetError: if it cannot be had, or does not fit the student.
    """
    tokenizer = load_tokenizer(name, config.teacher_weights)
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise MapetError(
            f"vocab_size is {config.vocab_size}, but tokenizer {name!r} is fitted and has "
            f"{tokenizer.vocab_size} ids; leave --vocab-size out"
        )
    try:  # asked now, so that what it cannot read is refused before anything is written
        tokenizer.encode(torch.zeros(1, config.channels, tokenizer.input_size, tokenizer.input_size))
    except MapetError as error:
        raise MapetError(f"tokenizer {name!r} does not fit this run: {error}") from error
    check_grid(f"tokenizer {name!r}", tokenizer.grid, grid)
    return tokenizer


def check_grid(what: str, grid: Grid, wanted: Grid) -> None:
    """Refuse ids on another grid than the student's patches."""
    if grid != wanted:
        raise MapetError(
            f"{what} gives {grid[0]} x {grid[1]} ids an image, but the model has {wanted[0]} x {wanted[1]} patches; "
            "make one for this image and patch size"
        )


def measure_baseline(ids: Iterable[Tensor], vocab_size: int, file: Path) -> Baseline:
    """Return loss and accuracy of guessing ids by their frequency, measured once per run and kept in ``file``."""
    try:
        saved = json.loads(file.read_text())
        return Baseline(float(saved["unigram_entropy"]), float(saved["chance"]))
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        logger.warning("%s is damaged and measured again", file)
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for part in ids:
        counts += torch.bincount(part.flatten().cpu(), minlength=vocab_size)
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

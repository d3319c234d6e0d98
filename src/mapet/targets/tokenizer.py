"""Choose a tokenizer by name: ready or to be fitted, its number of ids, and whether it fits the student."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mapet.config.keys import KMeansKeys
from mapet.errors import MapetError
from mapet.tokenizers.base import Grid, Tokenizer
from mapet.tokenizers.files import PUBLISHED, find_tokenizer, load_tokenizer
from mapet.tokenizers.kmeans_tokenizers import KFeatures, KPixels, KTokenizer
from mapet.tokenizers.teachers import build_teacher, library_of

MAX_VOCAB = 8192  # the paper's
MAX_VOCAB_PIXELS = 1024  # there are fewer kinds of pixel patches than of features
POINTS_PER_CENTROID = 50  # a default vocabulary has at least so many patches per id


def _pixels(config: KMeansKeys, vocab_size: int, grid: Grid, image_size: int, channels: int) -> KTokenizer:
    return KPixels(image_size, image_size // grid[0], channels, vocab_size, config.contrast, config.spherical)


# K-means tokenizers that need no teacher, by the names that ``--tokenizer`` and ``tokenizer fit --teacher`` take.
WITHOUT_TEACHER: dict[str, Callable[[KMeansKeys, int, Grid, int, int], KTokenizer]] = {"pixels": _pixels}


def is_ready(name: str) -> bool:
    """Return whether a name means a tokenizer that needs no fitting: a published one, or a folder that holds one."""
    return name in PUBLISHED or find_tokenizer(name) is not None


def settle_vocab_size(name: str, asked: int | None, points: int) -> int | None:
    """Return the number of ids of a tokenizer that is fitted on ``points`` patches; ``asked`` if it needs no fitting.

    Raises:
        MapetError: if there are fewer patches than ids.
    """
    if is_ready(name):
        return asked
    if asked is None:
        power = max(1, int(math.log2(max(2, points / POINTS_PER_CENTROID))))
        return min(MAX_VOCAB_PIXELS if name in WITHOUT_TEACHER else MAX_VOCAB, 1 << power)
    if asked > points:
        raise MapetError(
            f"a codebook of {asked} ids needs at least as many patches, but the images have only {points}; take a "
            "smaller --vocab-size or more images"
        )
    return asked


def check_fittable(name: str) -> None:
    """Refuse a name of nothing whose features could be clustered; nothing is built or downloaded."""
    if os.sep in name and ":" not in name and not Path(name).is_dir():
        raise MapetError(f"tokenizer folder {name!r} does not exist")
    if name not in WITHOUT_TEACHER:
        library_of(name)


def unfitted_tokenizer(name: str, config: KMeansKeys, grid: Grid, image_size: int, channels: int) -> KTokenizer:
    """Return a k-means tokenizer whose centroids are not yet fitted.

    Args:
        name: a name from ``WITHOUT_TEACHER``, or the name of a teacher.
        config: settings of the tokenizer; ``vocab_size`` is settled.
        grid: rows and columns of the student's patches.
        image_size, channels: of the student's input.

    Raises:
        MapetError: if there is no such teacher, or its weights cannot be read.
    """
    assert config.vocab_size is not None
    check_fittable(name)
    if name in WITHOUT_TEACHER:
        return WITHOUT_TEACHER[name](config, config.vocab_size, grid, image_size, channels)
    teacher = build_teacher(name, config.teacher_stage, config.teacher_weights)
    teacher.check_channels(channels)
    return KFeatures(teacher, grid, config.vocab_size, config.teacher_size or image_size, config.spherical)


def ready_tokenizer(name: str, config: Any, grid: Grid) -> Tokenizer:
    """Read a tokenizer that needs no fitting.

    Args:
        name: a folder, or the name of a published tokenizer.
        config: configuration of a pre-training run: channels, ``vocab_size`` and the keys of a teacher.
        grid: rows and columns of the student's patches.

    Raises:
        MapetError: if the tokenizer cannot be read, or does not fit the student.
    """
    for key in ("teacher_stage", "teacher_size"):
        if getattr(config, key) is not None:
            raise MapetError(f"{key} is given, but tokenizer {name!r} is fitted already; leave it out")
    tokenizer = load_tokenizer(name, config.teacher_weights)
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise MapetError(
            f"vocab_size is {config.vocab_size}, but tokenizer {name!r} is fitted and has {tokenizer.vocab_size} ids; "
            "leave --vocab-size out"
        )
    check_readable(name, tokenizer, config.channels)
    check_grid(f"tokenizer {name!r}", tokenizer.grid, grid)
    return tokenizer


def check_readable(name: str, tokenizer: Tokenizer, channels: int) -> None:
    """Refuse a number of channels that a tokenizer cannot read."""
    size = tokenizer.input_size
    try:
        tokenizer.encode(torch.zeros(1, channels, size, size, device=tokenizer.device))
    except MapetError as error:
        raise MapetError(f"tokenizer {name!r} does not fit: {error}; choose another --channels") from error


def check_grid(what: str, grid: Grid, wanted: Grid) -> None:
    """Refuse ids on another grid than the student's patches."""
    if grid != wanted:
        raise MapetError(
            f"{what} gives {grid[0]} x {grid[1]} ids an image, but the model has {wanted[0]} x {wanted[1]} patches; "
            "make one for this image and patch size"
        )

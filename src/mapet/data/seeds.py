"""Seeds as pure functions of (seed, purpose, ...), and the random choices of a view."""

import hashlib
from dataclasses import dataclass
from enum import IntEnum


class Stream(IntEnum):
    """Purposes of randomness; each has its own stream of seeds."""

    EPOCH = 1  # the permutation of an epoch
    VIEW = 2  # crop and flip of a view of an image
    STEP = 3  # masks, dropout and stochastic depth of a step
    SAMPLE = 4  # the images and patches that a tokenizer is fitted on
    WEIGHTS = 5  # the backbone's initial weights
    HEAD = 6  # the initial weights of the parts that are not exported
    COLOUR = 7  # colour jitter of the student's images in an epoch
    STATISTICS = 9  # the images that a value range and a normalisation are measured on
    TURN = 8  # the view that an image starts with, if the number of views is fixed


def fold_seed(seed: int, stream: Stream, *parts: int) -> int:
    """Mix integers into one 63-bit seed; different purposes, epochs, indices, ... get independent seeds."""
    mixed = 0x9E3779B97F4A7C15
    for part in (seed, stream, *parts):
        mixed = ((mixed ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 29
    return mixed >> 1


def name_number(key: str) -> int:
    """Hash an image's key to 64 bits: seeds made from it do not change when other images are added."""
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:8], "little")


@dataclass(frozen=True)
class Draw:
    """The random choices of one view.

    Attributes:
        geometry: seed of crop and flip.
        colour: seed of the colour jitter.
        mirrored: whether the view is flipped; None: decided by ``geometry``.
    """

    geometry: int
    colour: int
    mirrored: bool | None = None


@dataclass(frozen=True)
class Draws:
    """Which view of an image an epoch shows: a new view in each epoch, or a fixed number of views in turn.

    A fixed number of views can be tokenized in advance. Colour jitter is drawn anew in each epoch in both cases.

    Args:
        seed: seed of crops and flips.
        colour_seed: seed of the colour jitter.
        crops: number of different crops of each image; None for a new crop in each epoch.
        mirror: show each of these crops in both orientations, instead of in one drawn at random.
    """

    seed: int
    colour_seed: int
    crops: int | None = None
    mirror: bool = False

    def number(self, epoch: int, key: str) -> int:
        """Return the number of the view that an epoch shows; not all images start with the same number."""
        if self.crops is None:
            return epoch
        views = self.crops * (2 if self.mirror else 1)
        return (epoch + fold_seed(self.seed, Stream.TURN, name_number(key))) % views

    def draw(self, number: int, key: str, epoch: int = 0) -> Draw:
        """Return the random choices of view ``number`` of an image."""
        crop, mirrored = (number // 2, number % 2 == 1) if self.mirror else (number, None)
        name = name_number(key)
        geometry = fold_seed(self.seed, Stream.VIEW, crop, name)
        return Draw(geometry, fold_seed(self.colour_seed, Stream.COLOUR, epoch, name), mirrored)

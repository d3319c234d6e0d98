"""Randomness as a pure function of (seed, purpose, ...), and what it decides about a view."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum


class Stream(IntEnum):
    """What randomness is for: each purpose has a stream of its own."""

    EPOCH = 1  # the permutation of an epoch
    VIEW = 2  # crop and flip of a view of an image
    STEP = 3  # orders and stochastic depth of a step
    SAMPLE = 4  # the images and patches that a tokenizer is fitted on
    WEIGHTS = 5  # the backbone's initial weights
    HEAD = 6  # those of the parts that are not exported
    COLOUR = 7  # the colours that the student sees in an epoch
    TURN = 8  # which of a fixed number of views an image begins with


def fold_seed(seed: int, stream: Stream, *parts: int) -> int:
    """Mix integers into one 63-bit seed: independent streams for every purpose, epoch, index, ..."""
    mixed = 0x9E3779B97F4A7C15
    for part in (seed, stream, *parts):
        mixed = ((mixed ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 29
    return mixed >> 1


def name_number(key: str) -> int:
    """64 bits that stand for an image's key, so that its views do not change when other images are added."""
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:8], "little")


@dataclass(frozen=True)
class Draw:
    """What is random about one view.

    Attributes:
        geometry: seed of crop and flip.
        colour: seed of the student's colour jitter.
        mirrored: whether it is flipped, if that is settled; None leaves it to ``geometry``.
    """

    geometry: int
    colour: int
    mirrored: bool | None = None


@dataclass(frozen=True)
class Draws:
    """Which view of an image is shown when: a new one each epoch, or in turn one of a fixed number.

    A fixed number can be tokenized beforehand. Colours are drawn anew each epoch either way.

    Args:
        seed: of crops and flips.
        colour_seed: of the student's colours.
        crops: distinct crops of each image; None for a new one each epoch.
        mirror: each of these crops in both orientations, instead of one drawn at random.
    """

    seed: int
    colour_seed: int
    crops: int | None = None
    mirror: bool = False

    @property
    def count(self) -> int | None:
        """Distinct views of each image, or None."""
        return None if self.crops is None else self.crops * (2 if self.mirror else 1)

    def number(self, epoch: int, key: str) -> int:
        """Return the number of the view that an epoch shows; images take turns from different beginnings."""
        if self.count is None:
            return epoch
        return (epoch + fold_seed(self.seed, Stream.TURN, name_number(key))) % self.count

    def draw(self, number: int, key: str, epoch: int = 0) -> Draw:
        """Return what is random about view ``number`` of an image."""
        crop, mirrored = (number // 2, number % 2 == 1) if self.mirror else (number, None)
        name = name_number(key)
        return Draw(
            fold_seed(self.seed, Stream.VIEW, crop, name),
            fold_seed(self.colour_seed, Stream.COLOUR, epoch, name),
            mirrored,
        )

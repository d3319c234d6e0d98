"""Semantic segmentation by a head on frozen patch features: heads, their training, prediction, mIoU.

A linear head on frozen patches is DINOv2's protocol (Oquab et al., 2304.07193, section 7.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from mapet.data.augment import seeded
from mapet.data.batches import Batch, DamageTally
from mapet.data.seeds import Stream, fold_seed
from mapet.engine.schedule import warmup_cosine
from mapet.errors import MapetError
from mapet.inference.models import OpenModel
from mapet.inference.streaming import autocast
from mapet.inference.tokens import read_tokens
from mapet.jobs.segment.masks import IGNORED

HIDDEN = 256  # channels of the convolutional head
CLASSES_AT_A_TIME = 16  # enlarged to full resolution: memory does not grow with the number of classes
STEPS_PER_CHECK = 10  # reading the loss makes an accelerator wait

Show = Callable[[int, str], None]  # takes what is done, and a few words


def linear_head(width: int, classes: int) -> nn.Module:
    """Batch norm, then a linear layer on each patch: ``(B, width, rows, columns)`` to ``(B, classes, ...)``."""
    return nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1))


def conv_head(width: int, classes: int) -> nn.Module:
    """The same with a 3x3 convolution, batch norm and GELU in between: a patch sees its neighbours."""
    return nn.Sequential(
        nn.BatchNorm2d(width),
        nn.Conv2d(width, HIDDEN, 3, padding=1, bias=False),
        nn.BatchNorm2d(HIDDEN),
        nn.GELU(),
        nn.Conv2d(HIDDEN, classes, 1),
    )


HEADS: dict[str, Callable[[int, int], nn.Module]] = {"linear": linear_head, "conv": conv_head}


@dataclass(frozen=True)
class HeadRecipe:
    """AdamW on the head, the learning rate warmed up and then lowered to zero as a cosine.

    Args:
        steps: in all.
        lr: peak learning rate.
        weight_decay: AdamW's.
        warmup: share of the steps that warm up.
    """

    steps: int
    lr: float
    weight_decay: float
    warmup: float


@torch.no_grad()
def patch_maps(opened: OpenModel, images: Tensor, precision: str = "no") -> Tensor:
    """Return the frozen features of normalised ``(B, C, H, W)`` images as ``(B, D, rows, columns)`` float32 maps.

    Raises:
        MapetError: if the model has no grid of patches.
    """
    with autocast(opened.device, precision):
        tokens = read_tokens(opened.network, images.to(opened.device, non_blocking=True))
    maps: Tensor = tokens.choose("patches").float().transpose(1, 2).unflatten(2, tokens.grid)
    return maps


def build_head(kind: str, opened: OpenModel, classes: int, seed: int) -> nn.Module:
    """Return a fresh head of a kind of ``HEADS`` for a model, on its device, drawn from ``seed``."""
    sample = torch.zeros(1, opened.channels, *opened.view.size)
    width = patch_maps(opened, sample).shape[1]
    with seeded(fold_seed(seed, Stream.HEAD)):
        return HEADS[kind](width, classes).to(opened.device)


def train_head(
    opened: OpenModel,
    head: nn.Module,
    batches: Iterable[Batch],
    recipe: HeadRecipe,
    tally: DamageTally,
    *,
    precision: str = "no",
    show: Show = lambda done, words: None,
) -> None:
    """Train a head in place, on batches of ``MaskedCrop``'s views; the model is left as it is.

    The loss is the cross entropy of the logits, enlarged bilinearly to the crop's pixels, over those that are of a
    class.

    Args:
        opened: the model.
        head: on its device; comes out in evaluation mode.
        batches: as many as the recipe has steps.
        recipe: of the training.
        tally: counts damaged images.
        precision: of the model; the head trains in float32.
        show: is told of progress.

    Raises:
        MapetError: if the loss is no longer finite, or too many images are damaged.
    """
    optimizer = AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    head.train()
    for step, batch in enumerate(batches):
        tally.add(batch["damaged"])
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(
                step, total=recipe.steps, warmup=round(recipe.warmup * recipe.steps), start=0.0, peak=recipe.lr, end=0.0
            )
        classes = batch["tokenizer_images"].to(opened.device, non_blocking=True)
        logits = head(patch_maps(opened, batch["images"], precision))
        loss = masked_cross_entropy(_enlarge(logits, classes.shape[-2:]), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % STEPS_PER_CHECK == 0 or step + 1 == recipe.steps:
            if not math.isfinite(value := loss.item()):
                raise MapetError(f"the loss became {value} at step {step + 1}; take a lower --lr than {recipe.lr:g}")
            show(step + 1, f"loss {value:.3f}")
    head.eval()


def masked_cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean over the pixels that are of a class; 0 if there are none.

    Args:
        logits: ``(B, K, H, W)``.
        classes: ``(B, H, W)``, ``IGNORED`` where there is none.
    """
    total = F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="sum")
    return total / (classes != IGNORED).sum().clamp(min=1)


@torch.no_grad()
def predict_classes(
    opened: OpenModel,
    head: nn.Module,
    batches: Iterable[Batch],
    tally: DamageTally,
    *,
    overlap: float = 1 / 3,
    batch_size: int = 16,
    precision: str = "no",
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield ``(index, truth, prediction)`` of each image in order, both ``(H, W)`` int64 in the mask's resolution.

    Windows of the model's input size are laid over an image with at least ``overlap``; their logits, enlarged to
    pixels, are averaged where they overlap, and enlarged once more to the mask. An image of the window's size is one
    window, so nothing is averaged.

    Args:
        opened: the model.
        head: in evaluation mode.
        batches: of one image each, in ``MaskedWhole``'s view; as many as ``batch_size`` are held at a time.
        tally: counts damaged images, which are left out.
        overlap: share of a window that the next one shows too.
        batch_size: windows that are put through the network at a time.
        precision: of the model.
    """
    rows, columns = opened.view.size
    stream = iter(batches)
    while group := list(islice(stream, batch_size)):
        for batch in group:
            tally.add(batch["damaged"])
        group = [batch for batch in group if not batch["damaged"][0]]  # a stand-in must not be taken for the image
        if not group:
            continue
        corners = [_corners(batch["images"].shape[-2:], (rows, columns), overlap) for batch in group]
        windows = torch.stack(
            [
                batch["images"][0, :, top : top + rows, left : left + columns]
                for batch, places in zip(group, corners, strict=True)
                for top, left in places
            ]
        )
        maps = torch.cat([head(patch_maps(opened, part, precision)) for part in windows.split(batch_size)])
        logits = maps.split([len(places) for places in corners])
        for batch, places, own in zip(group, corners, logits, strict=True):
            truth = batch["tokenizer_images"][0]
            merged = _merge(own, places, (rows, columns), batch["images"].shape[-2:])
            yield int(batch["index"][0]), truth, _enlarged_argmax(merged, truth.shape[-2:]).cpu()


def _corners(size: torch.Size, window: tuple[int, int], overlap: float) -> list[tuple[int, int]]:
    """Top left corners of the fewest windows that cover an image and overlap so far; the last end at its edges."""
    tops, lefts = (_starts(length, side, overlap) for length, side in zip(size, window, strict=True))
    return [(top, left) for top in tops for left in lefts]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    stride = max(1, int(side * (1 - overlap)))
    return [min(number * stride, length - side) for number in range(-(-(length - side) // stride) + 1)]


def _merge(logits: Tensor, corners: Sequence[tuple[int, int]], window: tuple[int, int], size: torch.Size) -> Tensor:
    """Average the ``(W, K, rows, columns)`` logits of an image's windows into ``(K, H, W)``."""
    total = logits.new_zeros(logits.shape[1], *size)
    count = logits.new_zeros(size)
    for (top, left), own in zip(corners, logits, strict=True):
        here = (..., slice(top, top + window[0]), slice(left, left + window[1]))
        total[here] += _enlarge(own[None], window)[0]
        count[here] += 1
    return total / count


def _enlarged_argmax(logits: Tensor, size: torch.Size) -> Tensor:
    """Class of the greatest logit at each pixel after enlarging ``(K, h, w)`` to ``size``, ``(H, W)``."""
    best, classes = logits.new_full(size, -torch.inf), torch.zeros(size, dtype=torch.long, device=logits.device)
    for first in range(0, len(logits), CLASSES_AT_A_TIME):
        value, index = _enlarge(logits[None, first : first + CLASSES_AT_A_TIME], size)[0].max(dim=0)
        better = value > best
        best, classes = torch.where(better, value, best), torch.where(better, index + first, classes)
    return classes


def _enlarge(logits: Tensor, size: Any) -> Tensor:
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


class Confusion:
    """Counts of pixels by true and predicted class, and the figures that follow from them.

    Attributes:
        counts: ``(K, K)`` int64, rows are the truth.
    """

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.long)

    def add(self, truth: Tensor, prediction: Tensor) -> None:
        """Count the pixels of an image that are of a class; both ``(H, W)`` int64."""
        known, classes = truth != IGNORED, len(self.counts)
        pairs = truth[known] * classes + prediction[known]
        self.counts += torch.bincount(pairs, minlength=classes**2).unflatten(0, (classes, classes))

    @property
    def pixel_accuracy(self) -> float:
        """Share of pixels whose class is right."""
        return float(self.counts.diagonal().sum() / self.counts.sum())

    @property
    def iou_per_class(self) -> list[float | None]:
        """Intersection over union, 0 to 1; None of a class that is neither in the truth nor predicted."""
        right = self.counts.diagonal()
        union = self.counts.sum(0) + self.counts.sum(1) - right
        return [float(r) / float(u) if u else None for r, u in zip(right, union, strict=True)]

    @property
    def miou(self) -> float:
        """Mean of the classes' intersections over unions, those that are None left out."""
        known = [value for value in self.iou_per_class if value is not None]
        return sum(known) / len(known)

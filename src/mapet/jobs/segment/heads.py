"""Heads on frozen patch features: training, and prediction in full resolution by overlapping windows.

A linear head on frozen patches is the protocol of DINOv2 (Oquab et al., 2304.07193, section 7.4).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import crop

from mapet.data.augment import seeded
from mapet.data.seeds import Stream, fold_seed
from mapet.engine.optimizer import warmup_cosine
from mapet.errors import MapetError
from mapet.inference.models import OpenModel
from mapet.inference.streaming import autocast
from mapet.inference.tokens import read_tokens
from mapet.jobs.segment.config import SegmentConfig
from mapet.jobs.segment.data import IGNORED, Batch
from mapet.report.progress import Meter

HIDDEN_CHANNELS = 256
STEPS_PER_CHECK = 10  # reading the loss makes an accelerator wait
CLASSES_AT_A_TIME = 16  # enlarged to full resolution: memory does not grow with the number of classes


def build_head(kind: str, width: int, classes: int, seed: int) -> nn.Sequential:
    """Return a head with random weights: ``(B, width, rows, columns)`` features to ``(B, classes, ...)`` logits.

    Batch norm comes first, so that one learning rate suits features of any scale.

    Args:
        kind: "linear" (a linear layer on each patch) or "conv" (a 3x3 convolution, batch norm and GELU before it).
        width: number of features of a patch.
        classes: number of classes.
        seed: of the weights.
    """
    with seeded(fold_seed(seed, Stream.HEAD)):
        if kind == "linear":
            return nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1))
        convolution = nn.Conv2d(width, HIDDEN_CHANNELS, 3, padding=1, bias=False)
        hidden = (convolution, nn.BatchNorm2d(HIDDEN_CHANNELS), nn.GELU())
        return nn.Sequential(nn.BatchNorm2d(width), *hidden, nn.Conv2d(HIDDEN_CHANNELS, classes, 1))


@dataclass(frozen=True)
class Segmenter:
    """A head on the frozen patch features of a model, both on one device.

    Attributes:
        opened: the model.
        head: takes ``(B, D, rows, columns)`` float32 features.
        config: precision of the model, training of the head, and mode of the evaluation.
    """

    opened: OpenModel
    head: nn.Module
    config: SegmentConfig

    def logits(self, images: Tensor) -> Tensor:
        """Return the ``(B, K, rows, columns)`` logits of the patches of normalised ``(B, C, H, W)`` images."""
        logits: Tensor = self.head(patch_maps(self.opened, images, self.config.precision))
        return logits


@torch.no_grad()
def patch_maps(opened: OpenModel, images: Tensor, precision: str) -> Tensor:
    """Return the frozen features of normalised ``(B, C, H, W)`` images as ``(B, D, rows, columns)`` float32 maps.

    Raises:
        MapetError: if the model has no grid of patches.
    """
    with autocast(opened.device, precision):
        tokens = read_tokens(opened.network, images.to(opened.device, non_blocking=True))
    maps: Tensor = tokens.choose("patches").float().transpose(1, 2).unflatten(2, tokens.grid)
    return maps


def train_head(segmenter: Segmenter, batches: Iterable[Batch], steps: int, meter: Meter) -> None:
    """Train the head in place, in float32, and leave it in evaluation mode; the model does not change.

    The optimiser is AdamW; the learning rate warms up linearly and then falls to zero as a cosine. The loss is the
    cross entropy of the logits, enlarged bilinearly to the pixels of the crop.

    Args:
        segmenter: the model and the head.
        batches: one for each step.
        steps: number of training steps.
        meter: shows the progress.

    Raises:
        MapetError: if the loss is no longer finite.
    """
    head, config = segmenter.head, segmenter.config
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    warmup = round(config.warmup * steps)
    head.train()
    for step, batch in enumerate(batches):
        lr = warmup_cosine(step, total=steps, warmup=warmup, start=0.0, peak=config.lr, end=0.0)
        optimizer.param_groups[0]["lr"] = lr
        masks = batch["masks"].to(segmenter.opened.device, non_blocking=True)
        loss = masked_cross_entropy(enlarge(segmenter.logits(batch["images"]), masks.shape[-2:]), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % STEPS_PER_CHECK == 0 or step + 1 == steps:
            if not math.isfinite(value := loss.item()):
                raise MapetError(f"the loss became {value} at step {step + 1}; take a lower --lr than {config.lr:g}")
            meter.show(step + 1, f"loss {value:.3f}")
    head.eval()


def masked_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the mean cross entropy over the pixels that have a class; 0 if there are none.

    Args:
        logits: ``(B, K, H, W)``.
        masks: class ids, ``(B, H, W)``, ``IGNORED`` for pixels without a class.
    """
    total = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum")
    return total / (masks != IGNORED).sum().clamp(min=1)


def enlarge(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Interpolate ``(B, K, h, w)`` logits bilinearly to ``(B, K, *size)``."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def predict_classes(segmenter: Segmenter, batches: Iterable[Batch]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield ``(index, truth, prediction)`` for each image in order, both ``(H, W)`` int64 in full resolution.

    Windows of the size of the model's input are laid over an image; their logits are enlarged to pixels, averaged
    where windows overlap, and enlarged to the size of the mask.

    Args:
        segmenter: with a head in evaluation mode.
        batches: of one whole image each, see ``SegmentationDataset``; ``batch_size`` images are held in memory.
    """
    size, config = segmenter.opened.view.size, segmenter.config
    remaining = iter(batches)
    while group := list(islice(remaining, config.batch_size)):
        images = [batch["images"][0] for batch in group]
        corners = [window_corners(image.shape[-2:], size, config.overlap) for image in images]
        windows = [crop(image, *corner, *size) for image, own in zip(images, corners, strict=True) for corner in own]
        logits = torch.cat([segmenter.logits(part) for part in torch.stack(windows).split(config.batch_size)])
        of_images = logits.split([len(own) for own in corners])
        for batch, image, own, own_logits in zip(group, images, corners, of_images, strict=True):
            truth, averaged = batch["masks"][0], _average(own_logits, own, size, image.shape[-2:])
            yield int(batch["index"][0]), truth, _enlarged_argmax(averaged, truth.shape).cpu()


def window_corners(size: Sequence[int], window: Sequence[int], overlap: float) -> list[tuple[int, ...]]:
    """Return (top, left) of the fewest windows that cover an image with an overlap; the last windows end at its edges.

    Args:
        size: rows and columns of the image.
        window: rows and columns of a window.
        overlap: smallest share of a window that the next one shows too.
    """
    starts = []
    for length, side in zip(size, window, strict=True):
        stride = max(1, int(side * (1 - overlap)))
        starts.append([*range(0, length - side, stride), length - side])
    return list(product(*starts))


def _average(logits: Tensor, corners: Sequence[Sequence[int]], window: tuple[int, int], size: torch.Size) -> Tensor:
    """Average the ``(W, K, rows, columns)`` logits of the windows of an image into ``(K, *size)``."""
    total, count = logits.new_zeros(logits.shape[1], *size), logits.new_zeros(size)
    for (top, left), own in zip(corners, logits, strict=True):
        here = (..., slice(top, top + window[0]), slice(left, left + window[1]))
        total[here] += enlarge(own[None], window)[0]
        count[here] += 1
    return total / count


def _enlarged_argmax(logits: Tensor, size: torch.Size) -> Tensor:
    """Return the class of the greatest logit of each pixel, ``size``, after enlarging ``(K, h, w)`` logits to it."""
    best, classes = logits.new_full(size, -torch.inf), torch.zeros(size, dtype=torch.long, device=logits.device)
    for first in range(0, len(logits), CLASSES_AT_A_TIME):
        value, index = enlarge(logits[None, first : first + CLASSES_AT_A_TIME], size)[0].max(dim=0)
        better = value > best
        best, classes = torch.where(better, value, best), torch.where(better, index + first, classes)
    return classes

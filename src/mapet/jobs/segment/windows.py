"""Prediction in full resolution, by overlapping windows."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import crop

from mapet.jobs.segment.dataset import Batch
from mapet.jobs.segment.heads import Segmenter, enlarge

CLASSES_AT_A_TIME = 16  # enlarged to full resolution: memory does not grow with the number of classes


@torch.no_grad()
def predict_classes(segmenter: Segmenter, batches: Iterable[Batch]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield ``(index, truth, prediction)`` for each image in order, both ``(H, W)`` int64 in full resolution.

    Windows of the size of the model's input are laid over an image; their logits are enlarged to pixels, averaged
    where windows overlap, and enlarged to the size of the mask.

    Args:
        segmenter: with a head in evaluation mode.
        batches: of one image each, made by ``MaskedViews.whole_image``; ``batch_size`` images are held in memory.
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

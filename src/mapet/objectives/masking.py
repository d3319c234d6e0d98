"""Masking: which patches are context, which are targets, and in which order they are visited.

A masking function draws a ``Mask`` for each image of a batch, on the device. Its numbers of context and target patches
are the same for every image, so that the attention mask can be constant. All functions take the same arguments:

    batch: ``B``, how many images.
    grid: rows and columns of patches; ``P`` is their product.
    targets: ``T``, how many patches are targets.
    generator: the source of randomness; None takes the device's default generator.
    device: where the masks are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

Grid = tuple[int, int]


class Mask(NamedTuple):
    """Patch numbers of each image, in raster order from 0; the two may overlap, and patches may be in neither.

    Attributes:
        context: ``(B, c)`` int64, the patches that are given.
        target: ``(B, T)`` int64, the patches that are predicted, in visiting order.
    """

    context: Tensor
    target: Tensor

    @classmethod
    def split(cls, order: Tensor, targets: int) -> Mask:
        """Take the last ``targets`` of ``(B, P)`` permutations as targets and the patches before them as context."""
        return cls(*order.split([order.shape[1] - targets, targets], dim=1))


MaskingFunction = Callable[[int, Grid, int, Generator | None, torch.device], Mask]


def random_masking(batch: int, grid: Grid, targets: int, generator: Generator | None, device: torch.device) -> Mask:
    """A uniformly random permutation of the patches."""
    noise = torch.rand(batch, grid[0] * grid[1], generator=generator, device=device)
    return Mask.split(noise.argsort(dim=1), targets)


def raster_masking(batch: int, grid: Grid, targets: int, generator: Generator | None, device: torch.device) -> Mask:
    """Row by row from the upper left corner, the same for every image."""
    return Mask.split(torch.arange(grid[0] * grid[1], device=device).expand(batch, -1), targets)


def spiral_masking(batch: int, grid: Grid, targets: int, generator: Generator | None, device: torch.device) -> Mask:
    """Ring by ring from the middle outwards, the same for every image."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.float64) - (side - 1) / 2 for side in grid)
    ring = torch.maximum(rows.abs()[:, None], columns.abs()[None, :]).flatten()
    angle = torch.atan2(rows[:, None].expand(grid), columns[None, :].expand(grid)).flatten()
    order = (ring * 20 + angle).argsort(stable=True)  # rings are at least a half apart, angles less than 2 pi
    return Mask.split(order.expand(batch, -1), targets)


def blockwise_masking(batch: int, grid: Grid, targets: int, generator: Generator | None, device: torch.device) -> Mask:
    """Targets lie in rectangular blocks (BEiT, 2106.08254, Algorithm 1); the order within either part is random.

    Blocks are added to an image until ``targets`` patches are covered. BEiT gives up after ten failed attempts in a
    row and then masks fewer patches. Here the number is constant, so single random patches fill what is missing.
    """
    covered = draw_blocks(batch, grid, targets, generator, device)
    noise = torch.rand(batch, grid[0] * grid[1], generator=generator, device=device)
    # Visible patches sort before covered ones, and covered ones stay targets when the blocks fall short.
    return Mask.split((noise + covered.flatten(1)).argsort(dim=1), targets)


def cell_masking(
    batch: int, grid: Grid, targets: int, generator: Generator | None, device: torch.device, cell: int = 2
) -> Mask:
    """Targets are square cells of ``cell`` x ``cell`` patches, drawn at random (SimMIM, 2111.09886, section 3.2).

    Cells at the right and lower edge may be cut off. Where whole cells do not add up to the number of targets, one
    cell is a target in part.
    """
    height, width = grid
    coarse = torch.rand(batch, -(-height // cell), -(-width // cell), generator=generator, device=device)
    noise = coarse.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)[:, :height, :width]
    return Mask.split(noise.flatten(1).argsort(dim=1, stable=True), targets)


def draw_blocks(
    batch: int,
    grid: Grid,
    most: int,
    generator: Generator | None,
    device: torch.device,
    min_aspect: float = 0.3,
    attempts: int = 10,
) -> Tensor:
    """Draw BEiT's block-wise masks for all images of a batch at once.

    Each round tries one block per unfinished image. The block's area is uniform between BEiT's smallest block (16 of
    196 patches, in proportion on other grids) and the number of patches still wanted. Its aspect ratio is log-uniform
    in ``[min_aspect, 1 / min_aspect]``. A block is accepted if it covers a new patch and no more than wanted.

    Returns:
        ``(B, H, W)`` boolean, true where covered; at most ``most`` patches an image.
    """
    height, width = grid
    rows = torch.arange(height, device=device)[None, :, None]
    columns = torch.arange(width, device=device)[None, None, :]
    covered = torch.zeros(batch, height, width, dtype=torch.bool, device=device)
    failures = torch.zeros(batch, dtype=torch.long, device=device)
    min_patches = max(1, round(16 / 196 * height * width))
    log_aspect = math.log(min_aspect)
    # Every success covers at least one patch, so this many rounds always suffice to finish every image.
    for _ in range(most * attempts):
        wanted = most - covered.sum((1, 2))
        active = (wanted > 0) & (failures < attempts)
        if not active.any():
            break
        draws = torch.rand(4, batch, generator=generator, device=device)
        area = min_patches + draws[0] * (wanted - min_patches)
        aspect = torch.exp(log_aspect * (1 - 2 * draws[1]))
        block_height = (area * aspect).sqrt().round().long()
        block_width = (area / aspect).sqrt().round().long()
        fits = (block_height < height) & (block_width < width)
        top = (draws[2] * (height - block_height + 1)).long()
        left = (draws[3] * (width - block_width + 1)).long()
        block = (
            (rows >= top[:, None, None])
            & (rows < (top + block_height)[:, None, None])
            & (columns >= left[:, None, None])
            & (columns < (left + block_width)[:, None, None])
        )
        new = (block & ~covered).sum((1, 2))
        accept = active & fits & (new > 0) & (new <= wanted)
        covered = covered | (block & accept[:, None, None])
        failures = torch.where(accept, torch.zeros_like(failures), failures + 1)
    return covered


MASKINGS: dict[str, MaskingFunction] = {
    "random": random_masking,
    "blockwise": blockwise_masking,
    "cells": cell_masking,
    "raster": raster_masking,
    "spiral": spiral_masking,
}

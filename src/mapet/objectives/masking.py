"""Visiting orders: ``(B, N)`` permutations of the tokens of each image, drawn on the device.

Every order begins with the prefix (class and register) tokens, goes on with the context patches and ends
with the ``T`` target patches. Each function takes the same arguments:

    batch: ``B``, how many orders.
    grid: rows and columns of patches.
    prefix: how many class and register tokens stand before the patches.
    targets: ``T``, how many patches are targets.
    generator: the source of randomness; None takes the device's default generator.
    device: where the orders are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

Grid = tuple[int, int]
OrderFunction = Callable[[int, Grid, int, int, Generator | None, torch.device], Tensor]


def _with_prefix(patch_order_BP: Tensor, prefix: int) -> Tensor:
    first = torch.arange(prefix, device=patch_order_BP.device).expand(len(patch_order_BP), prefix)
    return torch.cat([first, patch_order_BP + prefix], dim=1)


def random_order(
    batch: int, grid: Grid, prefix: int, targets: int, generator: Generator | None, device: torch.device
) -> Tensor:
    """A uniformly random permutation of the patches; its context is a uniform mask's visible part."""
    noise = torch.rand(batch, grid[0] * grid[1], generator=generator, device=device)
    return _with_prefix(noise.argsort(dim=1), prefix)


def raster_order(
    batch: int, grid: Grid, prefix: int, targets: int, generator: Generator | None, device: torch.device
) -> Tensor:
    """Row by row from the upper left corner, the same for every image."""
    patches = torch.arange(grid[0] * grid[1], device=device)
    return _with_prefix(patches.expand(batch, -1), prefix)


def spiral_order(
    batch: int, grid: Grid, prefix: int, targets: int, generator: Generator | None, device: torch.device
) -> Tensor:
    """Ring by ring from the middle outwards, the same for every image."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.float64) - (side - 1) / 2 for side in grid)
    ring = torch.maximum(rows.abs()[:, None], columns.abs()[None, :]).flatten()
    angle = torch.atan2(rows[:, None].expand(grid), columns[None, :].expand(grid)).flatten()
    patches = (ring * 20 + angle).argsort(stable=True)  # rings are at least a half apart, angles less than 2 pi
    return _with_prefix(patches.expand(batch, -1), prefix)


def blockwise_order(
    batch: int, grid: Grid, prefix: int, targets: int, generator: Generator | None, device: torch.device
) -> Tensor:
    """Targets lie in rectangular blocks (BEiT, 2106.08254, Algorithm 1); random inside either part.

    Blocks are added to an image until ``targets`` patches are covered. BEiT gives up after ten failed
    attempts in a row and then masks fewer patches; a constant layout needs the exact number, so what is
    missing then is filled with single random patches.
    """
    mask_BHW = draw_blocks(batch, grid, targets, generator, device)
    noise = torch.rand(batch, grid[0] * grid[1], generator=generator, device=device)
    # Visible patches sort before covered ones, and covered ones stay targets when the blocks fall short.
    return _with_prefix((noise + mask_BHW.flatten(1)).argsort(dim=1), prefix)


def cell_order(
    batch: int, grid: Grid, prefix: int, targets: int, generator: Generator | None, device: torch.device, cell: int = 2
) -> Tensor:
    """Targets are square cells of ``cell`` x ``cell`` patches, drawn at random (SimMIM, 2111.09886, section 3.2).

    Cells at the right and lower edge may be cut off. Where whole cells do not make up the number of targets, which is
    constant, one cell is a target in part.
    """
    height, width = grid
    coarse = torch.rand(batch, -(-height // cell), -(-width // cell), generator=generator, device=device)
    noise = coarse.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)[:, :height, :width]
    return _with_prefix(noise.flatten(1).argsort(dim=1, stable=True), prefix)


def draw_blocks(
    batch: int,
    grid: Grid,
    most: int,
    generator: Generator | None,
    device: torch.device,
    min_aspect: float = 0.3,
    attempts: int = 10,
) -> Tensor:
    """BEiT's block-wise masks, all images of the batch at once.

    Each round tries one block per unfinished image. Its area is uniform between BEiT's least block (16 of
    196 patches, in proportion on other grids) and the number still wanted, its aspect ratio log-uniform in
    ``[min_aspect, 1 / min_aspect]``; it is accepted if it covers at least one new patch and not more than
    are wanted.

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


ORDERS: dict[str, OrderFunction] = {
    "random": random_order,
    "blockwise": blockwise_order,
    "cells": cell_order,
    "raster": raster_order,
    "spiral": spiral_order,
}

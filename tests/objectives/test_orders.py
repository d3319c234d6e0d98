from __future__ import annotations

import pytest
import torch

from mapet.objectives.masking import ORDERS, blockwise_order, cell_order, draw_blocks, random_order, spiral_order

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("grid", "prefix"), [((4, 4), 1), ((3, 5), 0), ((14, 14), 5)])
def test_orders_are_permutations_that_begin_with_the_prefix(name: str, grid: tuple[int, int], prefix: int) -> None:
    patches = grid[0] * grid[1]
    order = ORDERS[name](6, grid, prefix, patches // 2, generator(), CPU)
    assert order.shape == (6, prefix + patches)
    assert torch.equal(order.sort(dim=1).values, torch.arange(prefix + patches).expand(6, -1))
    assert torch.equal(order[:, :prefix], torch.arange(prefix).expand(6, -1))


@pytest.mark.parametrize("name", ["random", "blockwise", "cells"])
def test_orders_come_from_the_generator_alone(name: str) -> None:
    first, again, other = (ORDERS[name](4, (8, 8), 1, 30, generator(seed), CPU) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_orders_visit_every_patch_equally_often_first() -> None:
    order = random_order(20_000, (3, 3), 1, 6, generator(), CPU)
    counts = torch.bincount(order[:, 1] - 1, minlength=9).float() / 20_000
    assert (counts - 1 / 9).abs().max() < 0.01  # 4.5 standard deviations


def test_blockwise_targets_are_the_blocks_filled_up_to_the_exact_number() -> None:
    order = blockwise_order(200, (14, 14), 1, 75, generator(3), CPU)
    blocks = draw_blocks(200, (14, 14), 75, generator(3), CPU).flatten(1)
    targets = torch.zeros(200, 196, dtype=torch.bool).scatter_(1, order[:, -75:] - 1, True)
    assert (targets.sum(1) == 75).all()
    assert (blocks <= targets).all()


def test_blocks_have_beits_statistics() -> None:
    """Against a loop written from BEiT's Algorithm 1, one image at a time."""
    import math
    import random

    def one_mask(source: random.Random) -> list[list[bool]]:
        mask, count = [[False] * 14 for _ in range(14)], 0
        while count < 75:
            before = count
            for _ in range(10):
                area = source.uniform(16, 75 - count)
                aspect = math.exp(source.uniform(math.log(0.3), math.log(1 / 0.3)))
                height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if height >= 14 or width >= 14:
                    continue
                top, left = source.randint(0, 14 - height), source.randint(0, 14 - width)
                cells = [(r, c) for r in range(top, top + height) for c in range(left, left + width)]
                new = [cell for cell in cells if not mask[cell[0]][cell[1]]]
                if 0 < len(new) <= 75 - count:
                    for r, c in new:
                        mask[r][c] = True
                    count += len(new)
                    break
            if count == before:
                break
        return mask

    source = random.Random(0)
    theirs = torch.tensor([one_mask(source) for _ in range(3000)])
    ours = draw_blocks(3000, (14, 14), 75, generator(), CPU)

    def edges(mask: torch.Tensor) -> torch.Tensor:
        return (mask[:, 1:] != mask[:, :-1]).sum((1, 2)) + (mask[:, :, 1:] != mask[:, :, :-1]).sum((1, 2))

    sizes = ours.sum((1, 2)).float(), theirs.sum((1, 2)).float()
    assert abs(sizes[0].mean() - sizes[1].mean()) < 0.3
    assert abs(edges(ours).float().mean() - edges(theirs).float().mean()) < 0.8
    assert (ours.float().mean(0) - theirs.float().mean(0)).abs().max() < 0.05

    def targets(order: torch.Tensor) -> torch.Tensor:
        return torch.zeros(3000, 196).scatter_(1, order[:, -75:], 1.0).view(3000, 14, 14)

    blocks, uniform = (targets(f(3000, (14, 14), 0, 75, generator(), CPU)) for f in (blockwise_order, random_order))
    assert edges(blocks).float().mean() < 0.6 * edges(uniform).float().mean()  # filled up, and still in blocks


@pytest.mark.parametrize(("side", "least"), [(7, 4), (14, 16), (28, 64)])
def test_the_least_block_is_the_same_share_of_any_grid(side: int, least: int) -> None:
    """With no room for more than one block each image's mask is that block: about 16 of 196 patches, rounded sides."""
    masks = draw_blocks(500, (side, side), least, generator(), CPU)
    areas = masks.sum((1, 2))
    assert areas.max() <= least
    assert areas.float().mean() > 0.8 * least


@pytest.mark.parametrize(("cell", "targets"), [(1, 30), (2, 24), (3, 17), (5, 24), (7, 20)])
def test_cells_are_whole_but_for_one(cell: int, targets: int) -> None:
    order = cell_order(40, (6, 6), 1, targets, generator(), CPU, cell=cell)
    masked = torch.zeros(40, 36, dtype=torch.bool).scatter_(1, order[:, -targets:] - 1, True).view(40, 6, 6)
    for image in masked:
        tiles = [image[r : r + cell, c : c + cell] for r in range(0, 6, cell) for c in range(0, 6, cell)]
        assert sum(0 < int(tile.sum()) < tile.numel() for tile in tiles) <= 1


def test_every_cell_is_masked_equally_often() -> None:
    order = cell_order(5000, (6, 6), 1, 20, generator(), CPU)
    share = torch.zeros(5000, 36).scatter_(1, order[:, -20:] - 1, 1.0).view(5000, 3, 2, 3, 2).mean((0, 2, 4))
    assert (share - 20 / 36).abs().max() < 0.03  # 4 standard deviations


def test_a_spiral_goes_round_the_middle_and_then_around_that() -> None:
    order = spiral_order(2, (4, 4), 1, 12, None, CPU)[0] - 1
    assert set(order[1:5].tolist()) == {5, 6, 9, 10}
    ring = [divmod(patch, 4) for patch in order[5:].tolist()]
    steps = [abs(a - c) + abs(b - d) for (a, b), (c, d) in zip(ring, [*ring[1:], ring[0]], strict=True)]
    assert steps == [1] * 12  # each beside the one before it, and the last beside the first
    assert spiral_order(1, (3, 3), 0, 6, None, CPU)[0, 0] == 4

import math
import random

import pytest
import torch
from torch import Generator, Tensor

from mapet.objectives.masking import (
    MASKINGS,
    Mask,
    blockwise_masking,
    cell_masking,
    draw_blocks,
    random_masking,
    spiral_masking,
)

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def target_maps(mask: Mask, rows: int, columns: int) -> Tensor:
    """Return ``(B, rows, columns)``, true where a patch is a target."""
    found = torch.zeros(len(mask.target), rows * columns, dtype=torch.bool)
    return found.scatter_(1, mask.target, True).unflatten(1, (rows, columns))


@pytest.mark.parametrize("name", MASKINGS)
@pytest.mark.parametrize(("grid", "targets"), [((4, 4), 8), ((3, 5), 1), ((14, 14), 147)])
def test_each_masking_splits_the_patches(name: str, grid: tuple[int, int], targets: int) -> None:
    patches = grid[0] * grid[1]
    context, target = MASKINGS[name](6, grid, targets, seeded(), CPU)
    assert target.shape == (6, targets)
    assert torch.equal(torch.cat([context, target], dim=1).sort(dim=1).values, torch.arange(patches).expand(6, -1))


def test_random_masking_is_uniform() -> None:
    first = random_masking(20_000, (3, 3), 6, seeded(), CPU).context[:, 0]
    assert (torch.bincount(first, minlength=9) / 20_000 - 1 / 9).abs().max() < 0.01  # 4.5 standard deviations


def draw_beits_mask(source: random.Random) -> list[list[bool]]:
    """Draw a mask of 14 x 14 patches by BEiT's Algorithm 1."""
    mask, count, failures = [[False] * 14 for _ in range(14)], 0, 0
    while count < 75 and failures < 10:
        failures += 1
        area = source.uniform(16, 75 - count)
        aspect = math.exp(source.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= 14 or width >= 14:
            continue
        top, left = source.randint(0, 14 - height), source.randint(0, 14 - width)
        cells = [(r, c) for r in range(top, top + height) for c in range(left, left + width)]
        new = [(r, c) for r, c in cells if not mask[r][c]]
        if 0 < len(new) <= 75 - count:
            for r, c in new:
                mask[r][c] = True
            count, failures = count + len(new), 0
    return mask


def test_blocks_have_the_statistics_of_beits() -> None:
    source = random.Random(0)
    theirs = torch.tensor([draw_beits_mask(source) for _ in range(3000)])
    ours = draw_blocks(3000, (14, 14), 75, seeded(), CPU)

    def mean_edges(mask: Tensor) -> Tensor:
        return sum(mask.diff(dim=dim).sum((1, 2)).float().mean() for dim in (1, 2))

    assert abs(ours.sum((1, 2)).float().mean() - theirs.sum((1, 2)).float().mean()) < 0.3
    assert abs(mean_edges(ours) - mean_edges(theirs)) < 0.8
    assert (ours.float().mean(0) - theirs.float().mean(0)).abs().max() < 0.05
    blocks, uniform = (
        mean_edges(target_maps(masking(3000, (14, 14), 75, seeded(), CPU), 14, 14))
        for masking in (blockwise_masking, random_masking)
    )
    assert blocks < 0.6 * uniform


def test_blocks_are_filled_up_to_the_number_of_targets() -> None:
    targets = target_maps(blockwise_masking(200, (14, 14), 75, seeded(3), CPU), 14, 14)
    assert (draw_blocks(200, (14, 14), 75, seeded(3), CPU) <= targets).all()


@pytest.mark.parametrize(("side", "least"), [(7, 4), (14, 16), (28, 64)])
def test_the_smallest_block_is_the_same_share_of_each_grid(side: int, least: int) -> None:
    """With room for one block only, the mask is that block: 16 of 196 patches, its sides rounded."""
    areas = draw_blocks(500, (side, side), least, seeded(), CPU).sum((1, 2))
    assert areas.max() <= least
    assert areas.float().mean() > 0.8 * least


@pytest.mark.parametrize(("cell", "targets"), [(1, 30), (2, 24), (3, 17), (5, 24), (7, 20)])
def test_at_most_one_cell_is_masked_in_part(cell: int, targets: int) -> None:
    for image in target_maps(cell_masking(40, (6, 6), targets, seeded(), CPU, cell=cell), 6, 6):
        tiles = [image[r : r + cell, c : c + cell] for r in range(0, 6, cell) for c in range(0, 6, cell)]
        assert sum(bool(tile.any() and not tile.all()) for tile in tiles) <= 1


def test_each_cell_is_masked_equally_often() -> None:
    masked = target_maps(cell_masking(5000, (6, 6), 20, seeded(), CPU), 6, 6)
    share = masked.float().view(5000, 3, 2, 3, 2).mean((0, 2, 4))
    assert (share - 20 / 36).abs().max() < 0.03  # 4 standard deviations


def test_a_spiral_goes_from_the_middle_outwards() -> None:
    order = torch.cat(spiral_masking(2, (4, 4), 12, None, CPU), dim=1)[0].tolist()
    assert set(order[:4]) == {5, 6, 9, 10}
    ring = [divmod(patch, 4) for patch in order[4:]]
    steps = [abs(a - c) + abs(b - d) for (a, b), (c, d) in zip(ring, ring[1:] + ring[:1], strict=True)]
    assert steps == [1] * 12  # neighbours, and the ring is closed
    assert spiral_masking(1, (3, 3), 6, None, CPU).context[0, 0] == 4

"""Stochastic depth whose draws do not depend on how a step's batch is divided among processes."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mapet.data.batches import BatchPart, sent


class StochasticDepth(DropPath):  # type: ignore[misc]
    """timm's ``DropPath``, drawn outside of the forward pass; see ``draw_depth``.

    Attributes:
        factors: ``(B,)``, what each image's branch is multiplied by: 0, or 1 / (share of branches that are kept).
    """

    factors: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Drop the branches ``(B, ...)`` of some images."""
        if self.factors is None or not self.training:
            return super().forward(x)  # type: ignore[no-any-return]
        return x * self.factors.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def use_drawn_depth(module: nn.Module) -> list[StochasticDepth]:
    """Let each ``DropPath`` inside of a module be drawn by ``draw_depth``, in place; return them."""
    found: list[Any] = [layer for layer in module.modules() if isinstance(layer, DropPath)]
    for layer in found:
        layer.__class__ = StochasticDepth
    return found


def draw_depth(layers: list[StochasticDepth], part: BatchPart, device: torch.device) -> None:
    """Draw the images whose branches are dropped in the next forward pass, that of a part of a batch."""
    if not layers:
        return
    kept = [1 - layer.drop_prob for layer in layers]
    drawn = [torch.empty(part.total).bernoulli_(share, generator=part.generator) / share for share in kept]
    for layer, factors in zip(layers, sent(torch.stack(drawn)[:, part.rows], device), strict=True):
        layer.factors = factors


def forget_depth(layers: list[StochasticDepth]) -> None:
    """Let the layers draw for themselves again."""
    for layer in layers:
        layer.factors = None

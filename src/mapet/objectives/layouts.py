"""Layouts: which rows go through the network and what each row may see.

Tokens are gathered into visiting order first, so a layout is one constant boolean matrix, the same for
every image, head and block: a function of the number of tokens ``N`` and of the context size ``c`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A constant attention pattern over the rows ``[content | slots | queries]``.

    Slots and queries are bare positions: mask vector + position of a target. Keys and values are the first ``K`` rows:
    queries are never keys, unless there is nothing else to be seen of the targets. Predictions are read from the last
    ``predicted`` rows.

    Attributes:
        mask: ``(R, K)`` boolean, true where row ``r`` may see key ``k``.
        content: how many of the rows are content: the first ``content`` tokens in visiting order.
        slots: how many are position slots, of all targets in visiting order, or none.
        predicted: ``S``, how many are queries: of the first ``S`` targets in visiting order.
    """

    mask: Tensor
    content: int
    slots: int
    predicted: int


def permuted_layout(tokens: int, context: int, *, slots: bool, predicted: int | None = None) -> Layout:
    """Two-stream attention: each target is predicted from the context and the targets before it.

    With ``slots``, every row sees each of the ``N`` positions exactly once, as content or as a bare
    position: MaPeT's auxiliary positional information (arXiv 2306.07346). Without, it is permuted image
    modelling as in XLNet.

    Args:
        tokens: ``N``, all tokens of an image, class and register tokens included.
        context: ``c``, how many tokens are given; the other ``T = N - c`` are targets.
        slots: whether positions of targets not yet visited can be seen.
        predicted: ``S``, how many targets are predicted, one by one: the first in visiting order. The others are never
            seen as content, which saves rows; their slots stay. None: all ``T``.
    """
    targets = tokens - context
    predicted = targets if predicted is None else predicted
    content = context + predicted
    row = torch.arange(content)[:, None]
    key = torch.arange(content)[None, :]
    target = torch.arange(predicted)[:, None]
    slot = torch.arange(targets)[None, :]

    content_sees_content = key <= row.clamp(min=context - 1)  # all of the context, then up to itself
    query_sees_content = key < context + target  # strictly before itself
    if not slots:
        return Layout(torch.cat([content_sees_content, query_sees_content]), content, 0, predicted)

    content_sees_slots = slot > row - context  # later targets, for the context all
    slot_sees_content = (key < context).expand(targets, content)
    slot_sees_slots = torch.ones(targets, targets, dtype=torch.bool)
    query_sees_slots = slot >= target  # itself and later targets
    mask = torch.cat(
        [
            torch.cat([content_sees_content, content_sees_slots], dim=1),
            torch.cat([slot_sees_content, slot_sees_slots], dim=1),
            torch.cat([query_sees_content, query_sees_slots], dim=1),
        ]
    )
    return Layout(mask, content, targets, predicted)


def masked_layout(tokens: int, context: int) -> Layout:
    """Masked image modelling: context and masked positions, all visible to each other (BEiT, 2106.08254)."""
    return Layout(torch.ones(tokens, tokens, dtype=torch.bool), context, 0, tokens - context)

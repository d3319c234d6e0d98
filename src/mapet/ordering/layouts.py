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

    Keys and values are the first ``K`` rows: queries are never keys. Predictions are read from the
    last ``targets`` rows.

    Attributes:
        mask: ``(R, K)`` boolean, true where row ``r`` may see key ``k``.
        content: how many of the rows are content: the first ``content`` tokens in visiting order.
        targets: ``T``, how many tokens are predicted: the last ``T`` of the visiting order.
    """

    mask: Tensor
    content: int
    targets: int

    @property
    def copies(self) -> int:
        """How often the ``T`` bare positions (mask vector + position) stand behind the content rows."""
        return (self.mask.shape[0] - self.content) // self.targets


def permuted_layout(tokens: int, context: int, *, slots: bool) -> Layout:
    """Two-stream attention: each target is predicted from the context and the targets before it.

    With ``slots``, every row sees each of the ``N`` positions exactly once, as content or as a bare
    position: MaPeT's auxiliary positional information (arXiv 2306.07346). Without, it is permuted image
    modelling as in XLNet.

    Args:
        tokens: ``N``, all tokens of an image, class and register tokens included.
        context: ``c``, how many tokens are given; the other ``T = N - c`` are predicted one by one.
        slots: whether positions of targets not yet visited can be seen.
    """
    targets = tokens - context
    row = torch.arange(tokens)[:, None]
    key = torch.arange(tokens)[None, :]
    target = torch.arange(targets)[:, None]
    slot = torch.arange(targets)[None, :]

    content_sees_content = key <= row.clamp(min=context - 1)  # all of the context, then up to itself
    query_sees_content = key < context + target  # strictly before itself
    if not slots:
        return Layout(torch.cat([content_sees_content, query_sees_content]), tokens, targets)

    content_sees_slots = slot > row - context  # later targets, for the context all
    slot_sees_content = (key < context).expand(targets, tokens)
    slot_sees_slots = torch.ones(targets, targets, dtype=torch.bool)
    query_sees_slots = slot >= target  # itself and later targets
    mask = torch.cat(
        [
            torch.cat([content_sees_content, content_sees_slots], dim=1),
            torch.cat([slot_sees_content, slot_sees_slots], dim=1),
            torch.cat([query_sees_content, query_sees_slots], dim=1),
        ]
    )
    return Layout(mask, tokens, targets)


def masked_layout(tokens: int, context: int) -> Layout:
    """Masked image modelling: context and masked positions, all visible to each other (BEiT, 2106.08254)."""
    return Layout(torch.ones(tokens, tokens, dtype=torch.bool), context, tokens - context)

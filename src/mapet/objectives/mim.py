"""MIM: masked image modelling as in BEiT (2106.08254)."""

from __future__ import annotations

from mapet.objectives.layout_objective import LayoutObjective
from mapet.objectives.layouts import Layout, masked_layout


class MIM(LayoutObjective):
    """Replace the target patches by the mask vector, let all rows see each other, predict at the masks.

    Targets are independent of each other given the context. BEiT's defaults: block-wise masks over 75 of
    196 patches; ``order="random"`` gives uniform masks.
    """

    default_order = "blockwise"
    target_share = 75 / 196

    def make_layout(self, tokens: int, context: int) -> Layout:
        """Context and masked positions, everything visible."""
        return masked_layout(tokens, context)

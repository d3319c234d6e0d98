"""PIM: permuted image modelling, XLNet's objective (1906.08237) on visual tokens."""

from __future__ import annotations

from mapet.objectives.layout_objective import LayoutObjective
from mapet.ordering import Layout, permuted_layout


class PIM(LayoutObjective):
    """MaPeT without position slots: a row knows nothing of the positions still to be visited.

    A baseline of the MaPeT paper (arXiv 2306.07346); order and share of targets are MaPeT's.
    """

    default_order = "random"
    target_share = 147 / 196

    def make_layout(self, tokens: int, context: int) -> Layout:
        """Permuted, without position slots."""
        return permuted_layout(tokens, context, slots=False)

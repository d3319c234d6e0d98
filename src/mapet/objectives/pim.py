"""PIM: permuted image modelling, XLNet's objective (1906.08237) on visual tokens."""

from __future__ import annotations

from mapet.objectives.permuted import PermutedObjective


class PIM(PermutedObjective):
    """MaPeT without position slots: a row knows nothing of the positions still to be visited.

    A baseline of the MaPeT paper (arXiv 2306.07346); order and share of targets are MaPeT's.
    """

    sees_slots = False

"""What permuted objectives have in common: targets predicted one by one, in visiting order."""

from __future__ import annotations

from typing import ClassVar

from timm.models.vision_transformer import VisionTransformer

from mapet.errors import MapetError
from mapet.objectives.base import check_counts
from mapet.objectives.layout_objective import LayoutObjective
from mapet.objectives.layouts import Layout, permuted_layout


class PermutedObjective(LayoutObjective):
    """Predict each target from the context and the targets before it.

    Args:
        backbone, vocab_size, context_tokens, order: see ``LayoutObjective``.
        targets_per_image: ``S``, how many targets are predicted: the first in visiting order, so in a random order a
            random choice. It saves the content and query rows of the others; their position slots, if the objective has
            such, stay. None: all.
    """

    default_order = "random"
    target_share = 147 / 196
    sees_slots: ClassVar[bool]

    def __init__(
        self,
        backbone: VisionTransformer,
        vocab_size: int,
        context_tokens: int | None = None,
        order: str | None = None,
        *,
        targets_per_image: int | None = None,
    ) -> None:
        if targets_per_image is not None:
            check_counts(targets_per_image=targets_per_image)
        self.targets_per_image = targets_per_image
        super().__init__(backbone, vocab_size, context_tokens, order)

    def make_layout(self, tokens: int, context: int) -> Layout:
        """Permuted, with or without position slots."""
        targets, wanted = tokens - context, self.targets_per_image
        if wanted is not None and wanted > targets:
            raise MapetError(f"targets_per_image is {wanted}, but an image has {targets} targets; take at most that")
        return permuted_layout(tokens, context, slots=self.sees_slots, predicted=wanted)

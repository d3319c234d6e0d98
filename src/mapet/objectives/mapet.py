"""MaPeT: masked and permuted pre-training (arXiv 2306.07346), and PIM, MIM and raster autoregression beside it.

All four send three groups of rows through the same weights of an ordinary ViT. ``t`` counts the targets in visiting
order:

======================== ========================== ======================================= =====================
rows                     input                      sees                                    found in
======================== ========================== ======================================= =====================
content of the context   patch + position           context, all slots                      all
content of target t      patch + position           context, content <= t, slots > t        MaPeT, PIM, Raster
slot of each target      mask vector + position     context, all slots                      MaPeT, MIM, Raster
query of target t        mask vector + position     context, content < t, slots >= t        MaPeT, PIM, Raster
======================== ========================== ======================================= =====================

Predictions are read from the queries; MIM has none and reads them from the slots. A row of MaPeT sees each position of
the image exactly once, as content or as a bare position (a slot), as after pre-training. PIM has no slots: its rows do
not know which positions are still to come.

Tokens are gathered into visiting order first, and positions travel with them. So who sees whom is one constant matrix,
the same for every image, head and block: a function of the numbers of context tokens and targets alone.
"""

from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.errors import MapetError
from mapet.models.attention import Layout, additive_mask, product_type
from mapet.objectives.base import Objective, check_counts, mask_vector, prediction_head
from mapet.objectives.masking import Mask
from mapet.objectives.patches import gather_rows
from mapet.objectives.targets import Target


def visible_keys(context: int, targets: int, predicted: int, *, slots: bool, queries: bool) -> Tensor:
    """Return who sees whom, the table above: ``(R, K)`` boolean, true where row ``r`` may see key ``k``.

    Rows are ``[content | slots | queries]``, keys are ``[content | slots]``: queries are never keys.

    Args:
        context: ``c``, context tokens, class and register tokens included.
        targets: ``T``.
        predicted: ``S``, how many targets have a query: the first in visiting order. The others are never content.
        slots: whether there are position slots.
        queries: whether targets are predicted one by one; without, they have no content either.
    """
    content = context + predicted if queries else context
    row, key = torch.arange(content)[:, None], torch.arange(content)[None, :]
    target, slot = torch.arange(predicted)[:, None], torch.arange(targets)[None, :]
    # Each pair is (visible content, visible slots). Context rows see the whole context; target rows also those before.
    of_content = key <= row.clamp(min=context - 1), slot > row - context
    of_slots = (key < context).expand(targets, content), (slot >= 0).expand(targets, targets)
    of_queries = key < context + target, slot >= target
    groups = [of_content] + [of_slots] * slots + [of_queries] * queries
    return torch.cat([torch.cat(group if slots else group[:1], dim=1) for group in groups])


class MaPeT(Objective):
    """Masked and permuted pre-training, section 3 of the paper.

    For a random order ``z`` of the tokens whose first ``c`` are the context, the loss is the cross-entropy

        mean over t > c of  -log p(id[z_t] | content z_1..z_{t-1}, positions z_t..z_N)

    of all predicted targets, see ``Ids.score``.

    - *Permuted*: a target is predicted from the context and all targets visited before it, so targets depend on each
      other, which masked image modelling ignores.
    - *Masked*: positions not yet visited are visible as mask vectors, which permuted image modelling lacks.

    A linear head on the query rows predicts the target. The defaults are the paper's: 147 of 196 patches (75 %) are
    targets, in random order, all predicted. After pre-training mask vector and head are dropped: a plain ViT remains.

    Args:
        backbone, target, mask_ratio, masking: see ``Objective``.
        targets_per_image: ``S``, how many targets are predicted, the first in visiting order. The others have a slot
            but no content row and no query. None: all targets are predicted.
    """

    default_masking = "random"
    default_mask_ratio = 147 / 196
    has_slots: ClassVar[bool] = True
    has_queries: ClassVar[bool] = True

    visible: Tensor

    def __init__(
        self,
        backbone: VisionTransformer,
        target: Target,
        mask_ratio: float | None = None,
        masking: str | None = None,
        *,
        targets_per_image: int | None = None,
    ) -> None:
        super().__init__(backbone, target, mask_ratio, masking)
        if targets_per_image is not None:
            check_counts(targets_per_image=targets_per_image)
            if targets_per_image > self.targets:
                raise MapetError(
                    f"targets_per_image is {targets_per_image}, but an image has {self.targets} targets; take less"
                )
            self.predicted = targets_per_image
        visible = visible_keys(
            self.context_tokens, self.targets, self.predicted, slots=self.has_slots, queries=self.has_queries
        )
        self.register_buffer("visible", visible, persistent=False)
        self.mask_token = mask_vector(backbone.embed_dim)
        self.head = prediction_head(backbone.embed_dim, target)

    @property
    def rows(self) -> dict[str, int]:
        """How many rows there are of each group, in their order."""
        slots, queries = self.targets * self.has_slots, self.predicted * self.has_queries
        return {"content": self.context_tokens + queries, "slots": slots, "queries": queries}

    def read_targets(self, images: Tensor, mask: Mask) -> Tensor:
        """Return the last ``S`` rows, the queries (of MIM: the slots), after all blocks; see ``Objective``."""
        x, (rows, keys) = self.embed(images, mask), self.visible.shape
        # Without queries all rows see each other.
        added = additive_mask(self.visible, product_type(x)) if self.has_queries else None
        layout = Layout(rows, keys, added)
        for block in self.backbone.blocks[:-1]:
            x = block(x, layout)
        # In the last block nothing else is needed.
        x = self.backbone.blocks[-1](x, layout.last(self.predicted))
        return self.backbone.fc_norm(self.backbone.norm(x))  # type: ignore[no-any-return]

    def embed(self, images: Tensor, mask: Mask) -> Tensor:
        """Return the rows ``[content | slots | queries]``, ``(B, R, D)``, in visiting order."""
        vit, rows = self.backbone, self.rows
        visited = self.with_prefix(torch.cat([mask.context, mask.target[:, : rows["queries"]]], dim=1))
        content = gather_rows(self.embed_tokens(images), visited)
        positions = vit.pos_embed[:, -self.patches :].expand(len(images), -1, -1)
        bare = vit.pos_drop(self.mask_token + gather_rows(positions, mask.target))
        return vit.norm_pre(  # type: ignore[no-any-return]
            torch.cat([content, bare[:, : rows["slots"]], bare[:, : rows["queries"]]], dim=1)
        )


class PIM(MaPeT):
    """Permuted image modelling, XLNet's objective (1906.08237) on image patches: MaPeT without slots."""

    has_slots = False


class Raster(MaPeT):
    """Autoregression row by row: MaPeT with one fixed order; nothing is permuted."""

    default_masking = "raster"


class MIM(MaPeT):
    """Masked image modelling as in BEiT (2106.08254): targets are mask vectors, all rows see each other.

    Targets do not depend on each other. BEiT's defaults: block-wise masks over 75 of 196 patches; ``masking="random"``
    gives uniform masks.
    """

    default_masking = "blockwise"
    default_mask_ratio = 75 / 196
    has_queries = False

    def __init__(
        self, backbone: VisionTransformer, target: Target, mask_ratio: float | None = None, masking: str | None = None
    ) -> None:
        super().__init__(backbone, target, mask_ratio, masking)

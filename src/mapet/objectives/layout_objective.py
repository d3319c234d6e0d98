"""One forward for every objective that is a layout: what differs is who sees whom, and the order."""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.objectives.base import Objective, mask_vector, token_head
from mapet.objectives.layouts import Layout
from mapet.objectives.patches import gather_rows


class Output(TypedDict):
    """What an objective returns: scalar ``loss`` and ``accuracy``, and ``logits`` ``(B, S, V)``."""

    loss: Tensor
    accuracy: Tensor
    logits: Tensor


class LayoutObjective(Objective):
    """Predict the visual token ids of target patches with an ordinary ViT under a constant layout.

    A subclass says how the layout is made (``make_layout``); see ``Objective`` for the rest and for the shapes.

    Args:
        backbone: a timm ``VisionTransformer`` with learned position embeddings. It is used, not copied.
        vocab_size: ``V``, the number of visual token ids.
        context_tokens: ``c``, prefix tokens included; None leaves ``target_share`` of the patches as targets.
        order: a name from ``mapet.ordering.ORDERS``; None takes the objective's own.

    Raises:
        MapetError: for a backbone that cannot take a layout, or a context that leaves no target.
    """

    needs_ids = True

    mask: Tensor

    def __init__(
        self, backbone: VisionTransformer, vocab_size: int, context_tokens: int | None = None, order: str | None = None
    ) -> None:
        super().__init__(backbone, context_tokens, order)
        self.vocab_size = vocab_size
        layout = self.make_layout(self.tokens, self.context_tokens)
        self.content, self.slots, self.predicted = layout.content, layout.slots, layout.predicted
        self.register_buffer("mask", layout.mask, persistent=False)
        self.mask_token = mask_vector(backbone.embed_dim)
        self.head = token_head(backbone.embed_dim, vocab_size)

    def make_layout(self, tokens: int, context: int) -> Layout:
        """Return the constant layout for ``N`` tokens of which ``c`` are context."""
        raise NotImplementedError

    def forward(self, images: Tensor, token_ids: Tensor, order: Tensor | None = None) -> Output:
        """Predict the ids of the targets.

        Args:
            images: ``(B, C, H, W)``, normalised as the backbone expects.
            token_ids: ``(B, P)`` int64 in ``[0, V)``, in raster order.
            order: ``(B, N)`` visiting orders; None draws them from the device's default generator.

        Returns:
            ``loss``: mean cross-entropy over the ``S`` targets that are predicted, in nats. ``accuracy``: share of them
            whose most likely id is right. ``logits``: ``(B, S, V)`` in visiting order.
        """
        self.check_ids(images, token_ids)
        if order is None:
            order = self.draw_order(len(images), images.device)
        target_patches = order[:, -self.targets :] - self.prefix

        x = self.embed(images, order, target_patches)
        for block in self.backbone.blocks[:-1]:
            x = block(x, attn_mask=self.mask)
        # The predicting rows are the last S; in the last block nothing else is needed.
        x = self.backbone.blocks[-1](x, attn_mask=self.mask[-self.predicted :])
        logits = self.head(self.backbone.fc_norm(self.backbone.norm(x)))

        target_ids = token_ids.gather(1, target_patches[:, : self.predicted])
        loss = F.cross_entropy(logits.flatten(0, 1), target_ids.flatten())
        accuracy = (logits.detach().argmax(dim=-1) == target_ids).float().mean()
        return {"loss": loss, "accuracy": accuracy, "logits": logits}

    def embed(self, images: Tensor, order: Tensor, target_patches: Tensor) -> Tensor:
        """Return the rows ``[content | slots | queries]``, ``(B, R, D)``, gathered into visiting order."""
        vit = self.backbone
        content = gather_rows(self.embed_tokens(images), order[:, : self.content])
        positions = vit.pos_embed[:, -self.patches :].expand(len(images), -1, -1)
        bare = vit.pos_drop(self.mask_token + gather_rows(positions, target_patches))
        return vit.norm_pre(torch.cat([content, bare[:, : self.slots], bare[:, : self.predicted]], dim=1))  # type: ignore[no-any-return]

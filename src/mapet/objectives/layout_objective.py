"""One forward for every objective that is a layout: what differs is who sees whom, and the order."""

from __future__ import annotations

from typing import ClassVar, TypedDict

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn

from mapet.errors import MapetError, nearest
from mapet.models import use_layouts
from mapet.ordering import ORDERS, Layout


class Output(TypedDict):
    """What an objective returns: scalar ``loss`` and ``accuracy``, and ``logits`` ``(B, T, V)``."""

    loss: Tensor
    accuracy: Tensor
    logits: Tensor


class LayoutObjective(nn.Module):
    """Predict the visual token ids of target patches with an ordinary ViT under a constant layout.

    A subclass says how the layout is made (``make_layout``), which order it visits (``default_order``) and
    which share of the patches it predicts (``target_share``).

    Shapes: ``B`` images, ``P`` patches, ``N`` tokens (``P`` and the prefix: class and register tokens),
    ``c`` context tokens, ``T = N - c`` targets, ``V`` token ids, ``D`` channels.

    Args:
        backbone: a timm ``VisionTransformer`` with learned position embeddings. It is used, not copied.
        vocab_size: ``V``, the number of visual token ids.
        context_tokens: ``c``, prefix tokens included; None leaves ``target_share`` of the patches as targets.
        order: a name from ``mapet.ordering.ORDERS``; None takes the objective's own.

    Raises:
        MapetError: for a backbone that cannot take a layout, or a context that leaves no target.
    """

    default_order: ClassVar[str]
    target_share: ClassVar[float]

    mask: Tensor

    def __init__(
        self,
        backbone: VisionTransformer,
        vocab_size: int,
        context_tokens: int | None = None,
        order: str | None = None,
    ) -> None:
        super().__init__()
        self.backbone = use_layouts(backbone)
        self.grid: tuple[int, int] = tuple(backbone.patch_embed.grid_size)
        self.prefix: int = backbone.num_prefix_tokens
        self.patches = self.grid[0] * self.grid[1]
        tokens = self.prefix + self.patches
        if context_tokens is None:
            context_tokens = tokens - max(1, round(self.target_share * self.patches))
        _check_sizes(vocab_size, context_tokens, tokens, self.prefix)
        self.vocab_size = vocab_size
        self.context_tokens = context_tokens
        self.order = order or self.default_order
        if self.order not in ORDERS:
            raise MapetError(
                f"unknown order {self.order!r}{nearest(self.order, ORDERS) or f'; choose from {sorted(ORDERS)}'}"
            )
        layout = self.make_layout(tokens, context_tokens)
        self.content, self.targets, self.copies = layout.content, layout.targets, layout.copies
        self.register_buffer("mask", layout.mask, persistent=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, backbone.embed_dim))
        self.head = nn.Linear(backbone.embed_dim, vocab_size)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def make_layout(self, tokens: int, context: int) -> Layout:
        """Return the constant layout for ``N`` tokens of which ``c`` are context."""
        raise NotImplementedError

    def draw_order(self, batch: int, device: torch.device, generator: Generator | None = None) -> Tensor:
        """Draw ``(B, N)`` visiting orders on ``device``; prefix tokens come first."""
        return ORDERS[self.order](batch, self.grid, self.prefix, self.targets, generator, device)

    def no_weight_decay(self) -> set[str]:
        """Parameters that optimisers should not shrink: position embeddings and the lone vectors."""
        inner = {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        return inner | {"mask_token", "backbone.reg_token"}

    def forward(self, images: Tensor, token_ids: Tensor, order: Tensor | None = None) -> Output:
        """Predict the ids of the targets.

        Args:
            images: ``(B, C, H, W)``, normalised as the backbone expects.
            token_ids: ``(B, P)`` int64 in ``[0, V)``, in raster order.
            order: ``(B, N)`` visiting orders; None draws them from the device's default generator.

        Returns:
            ``loss``: mean cross-entropy over all targets, in nats. ``accuracy``: share of targets whose
            most likely id is right. ``logits``: ``(B, T, V)`` in visiting order.
        """
        if token_ids.shape != (len(images), self.patches):
            raise MapetError(
                f"token_ids have shape {tuple(token_ids.shape)}, but {len(images)} images of "
                f"{self.grid[0]} x {self.grid[1]} patches need ({len(images)}, {self.patches})"
            )
        if order is None:
            order = self.draw_order(len(images), images.device)
        target_patches = order[:, -self.targets :] - self.prefix

        x = self.embed(images, order, target_patches)
        for block in self.backbone.blocks[:-1]:
            x = block(x, attn_mask=self.mask)
        # The predicting rows are the last T; in the last block nothing else is needed.
        x = self.backbone.blocks[-1](x, attn_mask=self.mask[-self.targets :])
        logits = self.head(self.backbone.fc_norm(self.backbone.norm(x)))

        target_ids = token_ids.gather(1, target_patches)
        loss = F.cross_entropy(logits.flatten(0, 1), target_ids.flatten())
        accuracy = (logits.detach().argmax(dim=-1) == target_ids).float().mean()
        return {"loss": loss, "accuracy": accuracy, "logits": logits}

    def embed(self, images: Tensor, order: Tensor, target_patches: Tensor) -> Tensor:
        """Return the rows ``[content | slots | queries]``, ``(B, R, D)``, gathered into visiting order."""
        vit = self.backbone
        tokens = vit._pos_embed(vit.patch_embed(images))
        content = gather_rows(tokens, order[:, : self.content])
        positions = vit.pos_embed[:, -self.patches :].expand(len(images), -1, -1)
        bare = vit.pos_drop(self.mask_token + gather_rows(positions, target_patches))
        return vit.norm_pre(torch.cat([content, *[bare] * self.copies], dim=1))  # type: ignore[no-any-return]


def gather_rows(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    """Pick rows ``index[b, m]`` of each ``x[b]``: ``(B, M, D)``."""
    return x_BND.gather(1, index_BM[:, :, None].expand(-1, -1, x_BND.shape[-1]))


def _check_sizes(vocab_size: int, context: int, tokens: int, prefix: int) -> None:
    if vocab_size < 2:
        raise MapetError(f"vocab_size is {vocab_size}; a tokenizer needs at least 2 ids to be predicted")
    if context >= tokens:
        raise MapetError(
            f"context_tokens is {context}, but the image gives {tokens} tokens, so no target is left to "
            f"predict; take at most {tokens - 1}"
        )
    if context < max(1, prefix):
        raise MapetError(
            f"context_tokens is {context}, but the {prefix} class and register tokens always belong to the "
            f"context; take at least {max(1, prefix)}"
        )

"""What every pre-training objective has: a backbone, target patches, and the order that chooses them."""

from __future__ import annotations

from typing import ClassVar, TypedDict

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn

from mapet.errors import MapetError, nearest
from mapet.models.attention import use_layouts
from mapet.objectives.masking import ORDERS


class PixelOutput(TypedDict):
    """What an objective on pixels returns: scalar ``loss``, and ``prediction`` ``(B, T, p * p * C)``."""

    loss: Tensor
    prediction: Tensor


class Objective(nn.Module):
    """Pre-train a plain ViT by predicting target patches of an image from its other tokens, the context.

    Which patches are targets is a visiting order, drawn for each image: its first ``c`` tokens are the context, its
    last ``T`` the targets. A subclass says which order and how many targets are its own, and whether it predicts
    visual token ids.

    ``forward(images, token_ids, order=None)``, or ``forward(images, order=None)`` where ``needs_ids`` is false, returns
    a dict of tensors. ``loss`` is minimised; everything in it without dimensions is recorded.

    Shapes: ``B`` images, ``P`` patches, ``N`` tokens (``P`` and the prefix: class and register tokens),
    ``c`` context tokens, ``T = N - c`` targets, ``V`` token ids, ``D`` channels of the backbone, ``d`` of a decoder.

    Args:
        backbone: a timm ``VisionTransformer`` with learned position embeddings. It is used, not copied.
        context_tokens: ``c``, prefix tokens included; None leaves the objective's own number of targets.
        order: a name from ``mapet.ordering.ORDERS``; None takes the objective's own.

    Attributes:
        default_order: of the objective.
        target_share: share of the patches that are targets.
        needs_ids: whether it predicts token ids; if not, it needs nothing but the images.
        cross_entropy: name of the output that is a mean cross-entropy over ids, in nats.

    Raises:
        MapetError: for a backbone that cannot be used, or a context that leaves no target.
    """

    default_order: ClassVar[str]
    target_share: ClassVar[float]
    needs_ids: ClassVar[bool]
    cross_entropy: ClassVar[str] = "loss"

    def __init__(
        self, backbone: VisionTransformer, context_tokens: int | None = None, order: str | None = None
    ) -> None:
        super().__init__()
        self.backbone = use_layouts(backbone)
        self.grid: tuple[int, int] = tuple(backbone.patch_embed.grid_size)
        self.patch_size: tuple[int, int] = tuple(backbone.patch_embed.patch_size)
        self.prefix: int = backbone.num_prefix_tokens
        self.patches = self.grid[0] * self.grid[1]
        self.tokens = self.prefix + self.patches
        self.context_tokens = self.tokens - self.default_targets() if context_tokens is None else context_tokens
        _check_context(self.context_tokens, self.tokens, self.prefix)
        self.targets = self.tokens - self.context_tokens
        self.order = order or self.default_order
        if self.order not in ORDERS:
            raise MapetError(
                f"unknown order {self.order!r}{nearest(self.order, ORDERS) or f'; choose from {sorted(ORDERS)}'}"
            )

    def default_targets(self) -> int:
        """Return ``T`` where nothing is said of the context."""
        return max(1, round(self.target_share * self.patches))

    def draw_order(self, batch: int, device: torch.device, generator: Generator | None = None) -> Tensor:
        """Draw ``(B, N)`` visiting orders on ``device``; prefix tokens come first."""
        return ORDERS[self.order](batch, self.grid, self.prefix, self.targets, generator, device)

    def no_weight_decay(self) -> set[str]:
        """Parameters that optimisers should not shrink: position embeddings and the lone vectors."""
        inner = {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        return inner | {"mask_token", "backbone.reg_token"}

    def embed_tokens(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` images to ``(B, N, D)``: patches and prefix tokens with their positions."""
        return self.backbone._pos_embed(self.backbone.patch_embed(images))  # type: ignore[no-any-return]

    def encode(self, tokens: Tensor) -> Tensor:
        """Map any ``(B, n, D)`` embedded tokens through blocks and last norm; they all see each other."""
        vit = self.backbone
        return vit.fc_norm(vit.norm(vit.blocks(vit.norm_pre(tokens))))  # type: ignore[no-any-return]

    def check_ids(self, images: Tensor, token_ids: Tensor) -> None:
        """Refuse ids that are not one for each patch."""
        if token_ids.shape != (len(images), self.patches):
            raise MapetError(
                f"token_ids have shape {tuple(token_ids.shape)}, but {len(images)} images of "
                f"{self.grid[0]} x {self.grid[1]} patches need ({len(images)}, {self.patches})"
            )


def token_head(width: int, vocab_size: int) -> nn.Linear:
    """Return a linear head for token ids, initialised as BEiT's."""
    if vocab_size < 2:
        raise MapetError(f"vocab_size is {vocab_size}; a tokenizer needs at least 2 ids to be predicted")
    head = nn.Linear(width, vocab_size)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def mask_vector(width: int) -> nn.Parameter:
    """Return the learned vector ``(1, 1, width)`` that stands where a patch is not to be seen."""
    vector = nn.Parameter(torch.empty(1, 1, width))
    nn.init.trunc_normal_(vector, std=0.02)
    return vector


def check_counts(**counts: int) -> None:
    """Refuse arguments that are not whole numbers of at least 1."""
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise MapetError(f"objective argument {name} is {value!r}; it must be a whole number of at least 1")


def _check_context(context: int, tokens: int, prefix: int) -> None:
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

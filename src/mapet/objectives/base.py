"""What every pre-training objective has: a backbone, a target, and masking that chooses the predicted patches."""

from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn

from mapet.errors import MapetError, nearest
from mapet.models.attention import apply_blocks, use_layouts
from mapet.objectives.masking import MASKINGS, Mask
from mapet.objectives.patches import gather_rows
from mapet.objectives.targets import Pixels, Target
from mapet.objectives.task import Output, Task


class Objective(Task):
    """Pre-train a plain ViT by predicting some patches of an image, the targets, from others, the context.

    A subclass defines ``read_targets`` and the linear layer ``head``, which together predict the targets.

    Shapes: ``B`` images, ``P`` patches, ``c`` context tokens (class and register tokens included), ``T`` targets, of
    which ``S`` are predicted, ``D`` channels of the backbone, ``V`` token ids.

    Args:
        backbone: a timm ``VisionTransformer`` with learned position embeddings. It is used, not copied.
        target: what is predicted of a patch.
        mask_ratio: share of the patches that are targets; None takes the objective's own.
        masking: how they are chosen, a name from ``MASKINGS``; None takes the objective's own.

    Attributes:
        head: linear layer from what ``read_targets`` returns to predictions.
        predicted: ``S``, how many targets are predicted, the first in visiting order.
        default_masking, default_mask_ratio: of the objective, as published.
        default_targets: what it predicts as published: ``ids`` or ``pixels``.
        target_loss: the entry of the output that the target's ``score`` calls ``loss``.

    Raises:
        MapetError: for a backbone that cannot be used, or a mask ratio that leaves no target or no context.
    """

    default_masking: ClassVar[str]
    default_mask_ratio: ClassVar[float]
    default_targets: ClassVar[str] = "ids"
    target_loss: ClassVar[str] = "loss"

    head: nn.Linear

    def __init__(
        self, backbone: VisionTransformer, target: Target, mask_ratio: float | None = None, masking: str | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.target = use_layouts(backbone), target
        self.grid: tuple[int, int] = tuple(backbone.patch_embed.grid_size)
        self.patches = self.grid[0] * self.grid[1]
        self.prefix: int = backbone.num_prefix_tokens
        self.mask_ratio = self.default_mask_ratio if mask_ratio is None else mask_ratio
        self.targets = self.predicted = self.count_targets()
        self.context_tokens = self.prefix + self.patches - self.targets
        if self.targets < 1 or self.context_tokens < 1:
            lacking = "target" if self.targets < 1 else "context"
            raise MapetError(
                f"mask_ratio {self.mask_ratio:g} of {self.patches} patches leaves no {lacking}; take "
                f"{1 / self.patches:.3g} to {1 - 1 / self.patches:.3g}"
            )
        self.masking = masking or self.default_masking
        if self.masking not in MASKINGS:
            hint = nearest(self.masking, MASKINGS) or f"; choose from {sorted(MASKINGS)}"
            raise MapetError(f"unknown masking {self.masking!r}{hint}")

    @classmethod
    def pixels(cls, backbone: VisionTransformer) -> Target:
        """Return the target of ``--targets pixels`` for this objective."""
        return Pixels.of(backbone)

    def count_targets(self) -> int:
        """Return ``T``."""
        return round(self.mask_ratio * self.patches)

    def draw_mask(self, batch: int, device: torch.device, generator: Generator | None = None) -> Mask:
        """Draw context and targets for a batch of images."""
        return MASKINGS[self.masking](batch, self.grid, self.targets, generator, device)

    def read_targets(self, images: Tensor, mask: Mask) -> Tensor:
        """Return what the head reads, one row for each predicted target in visiting order: ``(B, S, width)``."""
        raise NotImplementedError

    def forward(self, images: Tensor, given: Tensor | None = None, mask: Mask | None = None) -> Output:
        """Return the loss of a batch.

        Args:
            images: ``(B, C, H, W)``, normalised as the backbone expects.
            given: what the target needs besides the images (token ids, features), ``(B, P, ...)``.
            mask: which patches are context and targets; None draws it from the device's default generator.

        Returns:
            what ``Target.score`` returns.
        """
        mask = mask or self.draw_mask(len(images), images.device)
        return self.score(self.read_targets(images, mask), images, given, mask)

    def score(self, rows: Tensor, images: Tensor, given: Tensor | None, mask: Mask) -> Output:
        """Compare what is predicted from ``rows`` with the true values of the targets."""
        return self.target.score(rows, self.head, self.wanted(images, given, mask.target[:, : self.predicted]))

    def predict(self, images: Tensor, mask: Mask) -> Tensor:
        """Return the predictions ``(B, S, width)`` of the targets in visiting order: logits, pixels or features."""
        return self.head(self.read_targets(images, mask))  # type: ignore[no-any-return]

    def outcome(self) -> nn.Module:
        """Return the backbone: mask vectors, decoders and heads are dropped after pre-training."""
        network: nn.Module = self.backbone
        return network

    def no_weight_decay(self) -> set[str]:
        """Return position embeddings and lone vectors."""
        inner = {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        return inner | {"mask_token", "backbone.reg_token"}

    def embed_tokens(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` images to ``(B, prefix + P, D)``: class, register and patch tokens with positions."""
        return self.backbone._pos_embed(self.backbone.patch_embed(images))  # type: ignore[no-any-return]

    def with_prefix(self, patches: Tensor) -> Tensor:
        """Turn patch numbers ``(B, n)`` into token numbers ``(B, prefix + n)`` that begin with the prefix tokens."""
        first = torch.arange(self.prefix, device=patches.device).expand(len(patches), -1)
        return torch.cat([first, patches + self.prefix], dim=1)

    def wanted(self, images: Tensor, given: Tensor | None, patches: Tensor) -> Tensor:
        """Return the true values ``(B, S, ...)`` of the patches that are predicted, by their numbers ``(B, S)``.

        Raises:
            MapetError: if there is not one value for each patch.
        """
        values = self.target.values(images, given)
        if values.shape[:2] != (len(images), self.patches):
            raise MapetError(
                f"targets have shape {tuple(values.shape)}, but {len(images)} images of "
                f"{self.grid[0]} x {self.grid[1]} patches need ({len(images)}, {self.patches}, ...)"
            )
        return gather_rows(values, patches)

    def encode(self, tokens: Tensor) -> Tensor:
        """Map any ``(B, n, D)`` embedded tokens through blocks and last norm; they all see each other."""
        vit = self.backbone
        return vit.fc_norm(vit.norm(apply_blocks(vit.blocks, vit.norm_pre(tokens))))  # type: ignore[no-any-return]


def prediction_head(width: int, target: Target) -> nn.Linear:
    """Return a linear layer from ``width`` channels to a target, initialised as BEiT's head."""
    head = nn.Linear(width, target.width)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def mask_vector(width: int) -> nn.Parameter:
    """Return the learned vector ``(1, 1, width)`` that stands in for a hidden patch."""
    vector = nn.Parameter(torch.empty(1, 1, width))
    nn.init.trunc_normal_(vector, std=0.02)
    return vector


def check_counts(**counts: int) -> None:
    """Refuse arguments that are not whole numbers of at least 1."""
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise MapetError(f"objective argument {name} is {value!r}; it must be a whole number of at least 1")

"""What is predicted of a patch: token ids, pixels, or a teacher's features.

A target says how wide a prediction is, takes the true values of all patches from what the task is given, and scores
predictions. The values themselves (a tokenizer's ids, a teacher's features) are made outside, see ``mapet.targets``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError
from mapet.objectives.cross_entropy import linear_cross_entropy
from mapet.objectives.patches import patchify
from mapet.objectives.task import Output


class Target(Protocol):
    """Shapes: ``B`` images, ``P`` patches, ``S`` of them predicted."""

    @property
    def width(self) -> int:
        """Numbers that are predicted for a patch."""

    def values(self, images: Tensor, given: Tensor | None) -> Tensor:
        """Return the true values ``(B, P, ...)`` of all patches in raster order.

        Args:
            images: ``(B, C, H, W)``, normalised as the network sees them.
            given: what a target source made of the batch; None where the images are enough.
        """

    def score(self, rows: Tensor, head: nn.Linear, wanted: Tensor) -> Output:
        """Compare the predictions ``head(rows)`` with true values ``(B, S, ...)``; ``loss`` is among the entries.

        Args:
            rows: ``(B, S, D)``, what the head reads.
            head: gives ``width`` numbers.
            wanted: the true values.
        """


@dataclass(frozen=True)
class Ids:
    """Visual token ids in ``[0, V)``: cross-entropy in nats, and accuracy.

    Args:
        vocab_size: ``V``.
    """

    vocab_size: int

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise MapetError(f"vocab_size is {self.vocab_size}; a tokenizer needs at least 2 ids to be predicted")

    @property
    def width(self) -> int:
        """Logits of a patch."""
        return self.vocab_size

    def values(self, images: Tensor, given: Tensor | None) -> Tensor:
        """Return the given ids, ``(B, P)`` int64."""
        assert given is not None, "token ids are made by a tokenizer"
        return given

    def score(self, rows: Tensor, head: nn.Linear, wanted: Tensor) -> Output:
        """Return ``loss``, the mean cross-entropy in nats, and ``accuracy`` of the most likely id."""
        loss, accuracy = linear_cross_entropy(rows.flatten(0, 1), head.weight, head.bias, wanted.flatten())
        return {"loss": loss, "accuracy": accuracy}


@dataclass(frozen=True)
class Pixels:
    """The pixels of a patch, as the network sees them: after normalisation by the input's mean and deviation.

    Args:
        patch_size: rows and columns of a patch.
        channels: of the images.
        normalised: scale each patch to mean 0 and variance 1 (MAE, 2111.06377, section 4.1); a prediction of the
            patch's mean then has a squared error of 1.
        distance: mean squared (``l2``) or mean absolute (``l1``) error per pixel.
    """

    patch_size: tuple[int, int]
    channels: int
    normalised: bool = True
    distance: Literal["l1", "l2"] = "l2"

    def __post_init__(self) -> None:
        if self.normalised and self.width < 2:
            raise MapetError("patches of one pixel have no deviation to be normalised by; take a larger --patch-size")

    @classmethod
    def of(cls, backbone: VisionTransformer, normalised: bool = True, distance: Literal["l1", "l2"] = "l2") -> Pixels:
        """Return the pixels of a network's patches."""
        embed = backbone.patch_embed
        return cls(tuple(embed.patch_size), embed.proj.in_channels, normalised, distance)

    @property
    def width(self) -> int:
        """Pixels of a patch, all channels."""
        return math.prod(self.patch_size) * self.channels

    def values(self, images: Tensor, given: Tensor | None) -> Tensor:
        """Return ``(B, P, p * p * C)`` pixels, channels last."""
        return patchify(images, self.patch_size)

    def score(self, rows: Tensor, head: nn.Linear, wanted: Tensor) -> Output:
        """Return ``loss``, the mean error per pixel."""
        if self.normalised:
            variance, mean = torch.var_mean(wanted, dim=-1, keepdim=True)
            wanted = (wanted - mean) / (variance + 1e-6).sqrt()
        return {"loss": (F.mse_loss if self.distance == "l2" else F.l1_loss)(head(rows), wanted)}


@dataclass(frozen=True)
class Features:
    """Features of a frozen teacher, regressed.

    Args:
        width: ``d``, of the teacher's features.
        distance: ``cosine``: 1 - cosine similarity (EVA, 2211.07636); ``smooth_l1``: of features that are normalised
            without parameters over their ``d`` values first (data2vec, 2202.03555).
    """

    width: int
    distance: Literal["cosine", "smooth_l1"] = "cosine"

    def values(self, images: Tensor, given: Tensor | None) -> Tensor:
        """Return the given features, ``(B, P, d)``."""
        assert given is not None, "features are made by a teacher"
        return given

    def score(self, rows: Tensor, head: nn.Linear, wanted: Tensor) -> Output:
        """Return ``loss``, and ``cosine``: the mean cosine similarity of predicted and true features."""
        prediction, wanted = head(rows).float(), wanted.float()
        cosine = F.cosine_similarity(prediction, wanted, dim=-1).mean()
        loss = 1 - cosine
        if self.distance == "smooth_l1":
            loss = F.smooth_l1_loss(prediction, F.layer_norm(wanted, wanted.shape[-1:]))
        return {"loss": loss, "cosine": cosine.detach()}


# How a target is built from its width (V or d) and distance, by the name that ``--targets`` takes. Pixels are not here:
# each objective normalises them in its own way, see ``Objective.pixels``.
TARGETS: dict[str, Callable[[int, str], Target]] = {
    "ids": lambda width, distance: Ids(width),
    "features": lambda width, distance: Features(width, distance),  # type: ignore[arg-type]
}

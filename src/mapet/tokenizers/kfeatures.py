"""k-features: k-means over the feature map of a pre-trained network. With CLIP it is the paper's k-CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mapet.errors import MapetError
from mapet.tokenizers.base import Grid, KTokenizer
from mapet.tokenizers.teachers import build_teacher


class KFeatures(KTokenizer):
    """Ids are nearest centroids of a teacher's features.

    The teacher sees the student's view resized to ``teacher_size``; its map is resized to the student's
    grid where they differ. The teacher's weights are part of the tokenizer and saved with it.

    Args:
        teacher: a timm or torchvision model name.
        grid: rows and columns of the student's patches.
        vocab_size: ``V``.
        teacher_size: side of the teacher's input in pixels.
        stage: where to cut the teacher; see ``build_teacher``.
        weights: a local weights file; None takes the published weights.

    Raises:
        MapetError: if the teacher is unknown, cannot be loaded, or gives no map.
    """

    kind = "features"

    def __init__(
        self,
        teacher: str,
        grid: Grid,
        vocab_size: int,
        teacher_size: int,
        stage: str | int | None = None,
        weights: str | Path | None = None,
        *,
        pretrained: bool = True,
    ) -> None:
        network = build_teacher(teacher, stage, weights, pretrained=pretrained)
        try:
            with torch.no_grad():
                channels_out = network(torch.zeros(1, 3, teacher_size, teacher_size)).shape[1]
        except (AssertionError, RuntimeError) as error:
            raise MapetError(
                f"teacher {teacher!r} cannot read images of {teacher_size} x {teacher_size} pixels "
                f"({' '.join(str(error).split())}); choose another --teacher-size"
            ) from error
        super().__init__(grid, vocab_size, channels_out)
        self.teacher = network
        self.teacher_size = teacher_size

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments but for the weights, which are in the state dict."""
        return {
            "teacher": self.teacher.name,
            "grid": list(self.grid),
            "vocab_size": self.vocab_size,
            "teacher_size": self.teacher_size,
            "stage": self.teacher.stage,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build it without published weights: they come from the saved tokenizer."""
        return cls(**config, pretrained=False)

    def features(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` images to the teacher's ``(B, P, d)`` features on the student's grid."""
        if images.shape[-2:] != (self.teacher_size, self.teacher_size):
            size = (self.teacher_size, self.teacher_size)
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        feature_map = self.teacher(images)
        if feature_map.shape[-2:] != self.grid:
            feature_map = F.interpolate(feature_map, self.grid, mode="bilinear", antialias=True)
        return feature_map.flatten(2).transpose(1, 2).contiguous()  # type: ignore[no-any-return]

"""k-features: k-means over the feature map of a pre-trained network. With CLIP it is the paper's k-CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor

from mapet.tokenizers.base import Grid, KTokenizer, resized
from mapet.tokenizers.teachers import Teacher, build_teacher


class KFeatures(KTokenizer):
    """Ids are nearest centroids of a teacher's features.

    The teacher sees the view resized to ``teacher_size``; its map is resized to the student's grid where they
    differ. The teacher's weights are part of the tokenizer and saved with it.

    Args:
        teacher: frozen, see ``build_teacher``.
        grid: rows and columns of the student's patches.
        vocab_size: ``V``.
        teacher_size: side of the teacher's input in pixels.
        spherical: see ``KTokenizer``.

    Raises:
        MapetError: if the teacher gives no map, or cannot read images of that size.
    """

    kind = "features"

    def __init__(
        self, teacher: Teacher, grid: Grid, vocab_size: int, teacher_size: int, spherical: bool = False
    ) -> None:
        width = teacher.width(teacher_size)
        super().__init__(grid, vocab_size, teacher_size, teacher.channels, width, spherical)
        self.teacher = teacher
        self.origin = teacher.origin

    @classmethod
    def from_teacher(
        cls,
        name: str,
        grid: Grid,
        vocab_size: int,
        teacher_size: int,
        stage: str | int | None = None,
        weights: str | Path | None = None,
        spherical: bool = False,
    ) -> Self:
        """Build it around a pre-trained network by name; see ``build_teacher``."""
        return cls(build_teacher(name, stage, weights), grid, vocab_size, teacher_size, spherical)

    @property
    def config(self) -> dict[str, Any]:
        """Architecture of the teacher, and the other arguments; its weights are in the state dict."""
        return {
            "teacher": self.teacher.config,
            "grid": list(self.grid),
            "vocab_size": self.vocab_size,
            "teacher_size": self.input_size,
            "spherical": self.spherical,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build it without published weights: they come from the saved tokenizer."""
        return cls(**{**config, "teacher": Teacher.from_config(config["teacher"])})

    def patch_features(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` images to the teacher's ``(B, P, d)`` features on the student's grid."""
        return features_on_grid(self.teacher, images, self.input_size, self.grid)


def features_on_grid(teacher: Teacher, images: Tensor, size: int, grid: Grid) -> Tensor:
    """Return a teacher's features ``(B, P, d)`` of images resized to ``size``, its map resized to ``grid``."""
    feature_map: Tensor = teacher(resized(images, size))
    if feature_map.shape[-2:] != grid:
        feature_map = F.interpolate(feature_map, grid, mode="bilinear", antialias=True)
    return feature_map.flatten(2).transpose(1, 2).contiguous()

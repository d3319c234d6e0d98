"""k-features: k-means over the feature map of a pre-trained network. With CLIP it is the paper's k-CLIP."""

from collections.abc import Mapping
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor

from mapet.tokenizers.base import Grid, KTokenizer, resized
from mapet.tokenizers.teachers import Teacher


class KFeatures(KTokenizer):
    """A tokenizer whose ids are the nearest centroids of a teacher's features.

    Images are resized to ``teacher_size``, and the teacher's feature map is resized to the student's grid. The
    teacher's weights are part of the tokenizer and are saved with it.

    Args:
        teacher: frozen network, see ``build_teacher``.
        grid: rows and columns of the student's patches.
        vocab_size: ``V``.
        teacher_size: side of the teacher's input in pixels.
        spherical: see ``KTokenizer``.

    Raises:
        MapetError: if the teacher returns no feature map for images of that size.
    """

    kind = "features"

    def __init__(
        self, teacher: Teacher, grid: Grid, vocab_size: int, teacher_size: int, spherical: bool = False
    ) -> None:
        super().__init__(grid, vocab_size, teacher_size, teacher.channels, teacher.width(teacher_size), spherical)
        self.teacher, self.origin = teacher, teacher.origin
        sizes = {"grid": list(self.grid), "vocab_size": vocab_size, "teacher_size": teacher_size}
        self.config = {**sizes, "teacher": teacher.config, "spherical": spherical}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the tokenizer with a teacher of random weights; the weights are to be loaded from a state dict."""
        return cls(**{**config, "teacher": Teacher.from_config(config["teacher"])})

    def patch_features(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` images to the teacher's ``(B, P, d)`` features on the student's grid."""
        return features_on_grid(self.teacher, images, self.input_size, self.grid)


def features_on_grid(teacher: Teacher, images: Tensor, size: int, grid: Grid) -> Tensor:
    """Return a teacher's features ``(B, P, d)`` of images resized to ``size``; its map is resized to ``grid``."""
    feature_map: Tensor = teacher(resized(images, size))
    if feature_map.shape[-2:] != grid:
        feature_map = F.interpolate(feature_map, grid, mode="bilinear", antialias=True)
    return feature_map.flatten(2).transpose(1, 2).contiguous()

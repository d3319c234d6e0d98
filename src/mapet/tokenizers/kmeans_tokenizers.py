"""Tokenizers fitted by k-means: over the pixels of patches, or over the features of a pre-trained network."""

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mapet.errors import MapetError
from mapet.tokenizers.base import Grid, Tokenizer, full_precision
from mapet.tokenizers.kmeans import fit_centroids, nearest_centroid
from mapet.tokenizers.teachers import Teacher

# Added to a patch's variance, so that sensor noise in flat patches is not scaled to full contrast: a tenth of the full
# range, the regulariser of Coates & Ng, "Learning feature representations with k-means" (2012), scaled from [0, 255] to
# [0, 1] and rounded up.
CONTRAST_FLOOR = 0.01


class KTokenizer(Tokenizer):
    """A tokenizer whose ids are the nearest centroids of patch features, by L2 distance.

    A subclass defines ``patch_features``. The buffer ``centroids`` ``(V, d)`` is NaN until ``fit``.

    Args:
        grid, vocab_size, input_size, channels: see ``Tokenizer``.
        width: ``d``, numbers in a feature vector.
        spherical: scale feature vectors to length 1, so that only directions are compared.
    """

    centroids: Tensor

    def __init__(
        self, grid: Grid, vocab_size: int, input_size: int, channels: int, width: int, spherical: bool = False
    ) -> None:
        super().__init__(grid, vocab_size, input_size, channels)
        self.spherical = spherical
        self.register_buffer("centroids", torch.full((vocab_size, width), float("nan")))

    def patch_features(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` images in [0, 1] to ``(B, P, d)`` float32 features in raster order."""
        raise NotImplementedError

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the features that are clustered, ``(B, P, d)`` float32 in raster order."""
        with full_precision(images.device):
            features = self.patch_features(images.float())
        return F.normalize(features, dim=-1) if self.spherical else features

    def assign(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids of the nearest centroids, and squared L2 distances."""
        return nearest_centroid(self.features(images), self.centroids)

    def fit(self, points: Tensor, seed: int, **options: Any) -> Self:
        """Fit the centroids in place to ``(n, d)`` points of ``features``; see ``fit_centroids``."""
        where = self.centroids.device
        found = fit_centroids(points, self.vocab_size, seed, spherical=self.spherical, device=where, **options)
        self.centroids.copy_(found)
        return self


class KPixels(KTokenizer):
    """A tokenizer whose ids are the nearest centroids of patch pixels. It needs no download and is the default.

    Args:
        image_size: side of the square images in pixels.
        patch_size: side of a patch in pixels.
        channels: channels of the images.
        vocab_size: ``V``.
        contrast: normalise each patch to mean 0 and variance 1, so that ids depend on structure but not on brightness.
        spherical: see ``KTokenizer``.

    Raises:
        MapetError: if the image size is not a multiple of the patch size.
    """

    kind = "pixels"

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        channels: int,
        vocab_size: int,
        contrast: bool = True,
        spherical: bool = False,
    ) -> None:
        if image_size % patch_size:
            raise MapetError(f"image size {image_size} is not divisible by the patch size {patch_size}")
        side = image_size // patch_size
        super().__init__((side, side), vocab_size, image_size, channels, channels * patch_size**2, spherical)
        self.patch_size, self.contrast = patch_size, contrast
        sizes = {"image_size": image_size, "patch_size": patch_size, "channels": channels, "vocab_size": vocab_size}
        self.config = {**sizes, "contrast": contrast, "spherical": spherical}

    def patch_features(self, images: Tensor) -> Tensor:
        """Cut ``(B, C, H, W)`` images into ``(B, P, C * patch * patch)`` pixels."""
        expected = (self.channels, self.input_size, self.input_size)
        if images.shape[1:] != expected:
            raise MapetError(f"images have shape {tuple(images.shape[1:])}, but this tokenizer reads {expected}")
        patches = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        if self.contrast:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
            patches = (patches - mean) * torch.rsqrt(variance + CONTRAST_FLOOR)
        return patches


class KFeatures(KTokenizer):
    """A tokenizer whose ids are the nearest centroids of a teacher's features. With CLIP it is the paper's k-CLIP.

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
        return self.teacher.on_grid(images, self.input_size, self.grid)

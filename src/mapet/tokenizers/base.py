"""What every visual tokenizer is, and the k-means tokenizers' common part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import rgb_to_grayscale

from mapet.tokenizers.kmeans import fit_centroids, nearest_centroid

Grid = tuple[int, int]


class Tokenizer(nn.Module):
    """What turns images into prediction targets: one id in ``[0, vocab_size)`` per patch.

    A subclass gives ``kind``, ``assign`` and ``config``, and is entered in ``TOKENIZERS``. Its weights are its
    state dict.

    Args:
        grid: rows and columns of patches; ``P`` is their product.
        vocab_size: ``V``, how many ids there are.
        input_size: side in pixels of the square view that is tokenized best; others are resized to it.
        channels: of the views, 1 or 3.

    Attributes:
        origin: where the weights came from and their SHA-256, for the record; does not touch the ids.
    """

    kind: ClassVar[str]

    def __init__(self, grid: Grid, vocab_size: int, input_size: int, channels: int = 3) -> None:
        super().__init__()
        self.grid: Grid = (int(grid[0]), int(grid[1]))
        self.vocab_size, self.input_size, self.channels = vocab_size, input_size, channels
        self.origin: dict[str, str] = {}

    def assign(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map float32 ``(B, C, H, W)`` images in [0, 1] to ``(B, P)`` int64 ids, and to how far each patch is from
        its code, ``(B, P)``: smaller is nearer; what the distance is, is the tokenizer's own affair.
        """
        raise NotImplementedError

    @property
    def config(self) -> dict[str, Any]:
        """What ``from_config`` needs, JSON-able."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(chain(self.parameters(), self.buffers())).device

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build it with weights that are then loaded from a state dict."""
        return cls(**config)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` images in [0, 1] to ``(B, P)`` int64 ids in raster order."""
        return self.encode_with_distance(images)[0]

    @torch.no_grad()
    def encode_with_distance(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids of ``encode`` and, as ``(B, P)``, how far each patch is from its code."""
        with full_precision(images.device):
            return self.assign(images.float())

    @property
    def content_hash(self) -> str:
        """SHA-256 of everything that decides the ids: two tokenizers with one hash give the same ids."""
        return hash_content([self.kind, self.config], self)


def hash_content(config: Any, module: nn.Module) -> str:
    """Return the SHA-256 of a JSON-able configuration and a module's tensors."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in float32: ids depend neither on the precision that the student trains in, nor on a GPU's TF32."""
    cudnn = torch.backends.cudnn
    # flags() sets all of them, by default to off: what is not meant is handed on.
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    with torch.autocast(device.type, enabled=False), cudnn.flags(**kept, allow_tf32=False):
        yield


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Turn ``(B, 1, H, W)`` or ``(B, 3, H, W)`` images into such of ``channels`` channels, where they differ."""
    if images.shape[1] == channels:
        return images
    return rgb_to_grayscale(images, num_output_channels=channels)  # type: ignore[no-any-return]


def resized(images: Tensor, size: int) -> Tensor:
    """Resize ``(B, C, H, W)`` images in [0, 1] to ``size`` pixels square, bicubic, where they differ."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


class KTokenizer(Tokenizer):
    """Ids are nearest centroids of per-patch features, by L2 distance.

    A subclass gives ``patch_features`` and ``config``. Centroids live in the buffer ``centroids`` ``(V, d)``; before
    they are fitted they are NaN.

    Args:
        grid, vocab_size, input_size, channels: see ``Tokenizer``.
        width: ``d``, of the features.
        spherical: compare directions only: features are scaled to length 1 first.
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
        """Return what is clustered and compared, ``(B, P, d)`` float32 in raster order."""
        with full_precision(images.device):
            features = self.patch_features(images.float())
        return F.normalize(features, dim=-1) if self.spherical else features

    def assign(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return nearest centroids and squared distances; unit vectors are compared by direction all the same."""
        return nearest_centroid(self.features(images), self.centroids)

    def fit(self, points: Tensor, seed: int, **options: Any) -> Self:
        """Fit the centroids to ``(n, d)`` points out of ``features``, in place; see ``fit_centroids``."""
        self.centroids.copy_(fit_centroids(points, self.vocab_size, seed, spherical=self.spherical, **options))
        return self

"""The protocol of visual tokenizers, and the k-means tokenizers' common part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from mapet.tokenizers.kmeans import fit_centroids, nearest_centroid

Grid = tuple[int, int]


class Tokenizer(Protocol):
    """What turns images into prediction targets: one id in ``[0, vocab_size)`` per patch.

    Attributes:
        vocab_size: ``V``, how many ids there are.
        grid: rows and columns of patches; ``P`` is their product.
    """

    vocab_size: int
    grid: Grid

    def encode(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` images in [0, 1] to ``(B, P)`` int64 ids in raster order."""

    @property
    def content_hash(self) -> str:
        """SHA-256 of everything that decides the ids: two tokenizers with one hash give the same ids."""


class KTokenizer(nn.Module):
    """Ids are nearest centroids of per-patch features, by L2 distance.

    A subclass gives ``features`` and ``config``. Fitted centroids live in the buffer ``centroids``
    ``(V, d)``; before ``fit`` they are NaN.
    """

    kind: str
    centroids: Tensor

    def __init__(self, grid: Grid, vocab_size: int, channels_out: int) -> None:
        super().__init__()
        self.grid = (int(grid[0]), int(grid[1]))
        self.vocab_size = vocab_size
        self.register_buffer("centroids", torch.full((vocab_size, channels_out), float("nan")))

    def features(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` images in [0, 1] to ``(B, P, d)`` float32 features in raster order."""
        raise NotImplementedError

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build an unfitted tokenizer whose weights are then loaded from a state dict."""
        return cls(**config)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` images in [0, 1] to ``(B, P)`` int64 ids in raster order."""
        # Ids must not depend on the precision that the student happens to train in.
        with torch.autocast(images.device.type, enabled=False):
            return nearest_centroid(self.features(images.float()), self.centroids)

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], *, points_per_image: int, seed: int) -> Self:
        """Fit the centroids by k-means, in place.

        Args:
            batches: image batches ``(B, C, H, W)`` in [0, 1]; the features sampled from them are held in
                memory, twice while they are joined: ``2 * images * points_per_image * d * 4`` bytes.
            points_per_image: how many patches of each image are sampled, without replacement.
            seed: seeds the sampling and the k-means.

        Raises:
            MapetError: if there are fewer points than centroids, or a feature is not finite.
        """
        generator = torch.Generator().manual_seed(seed)
        device = self.centroids.device
        points = []
        for images in batches:
            features_BPD = self.features(images.to(device)).cpu()
            noise = torch.rand(features_BPD.shape[:2], generator=generator)
            chosen = noise.argsort(dim=1)[:, :points_per_image]
            points.append(features_BPD.gather(1, chosen[:, :, None].expand(-1, -1, features_BPD.shape[-1])))
        sample = torch.cat(points).flatten(0, 1)
        self.centroids.copy_(fit_centroids(sample, self.vocab_size, seed))
        return self

    @property
    def content_hash(self) -> str:
        """SHA-256 over kind, configuration and tensors."""
        digest = hashlib.sha256(json.dumps([self.kind, self.config], sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

"""k-means: fitted with faiss, applied in torch on whatever device the images are on."""

from __future__ import annotations

import faiss
import numpy as np
import torch
from torch import Tensor

from mapet.errors import MapetError

ITERATIONS = 20  # as upstream
MAX_POINTS_PER_CENTROID = 512  # as upstream: more are subsampled by faiss
_MAX_DISTANCES = 1 << 26  # elements of one distance matrix: 256 MiB in float32


def fit_centroids(points: Tensor, count: int, seed: int) -> Tensor:
    """Return ``(count, d)`` float32 centroids of ``(n, d)`` points.

    Raises:
        MapetError: if there are fewer points than centroids, or a point is not finite.
    """
    if len(points) < count:
        raise MapetError(
            f"a codebook of {count} ids needs at least as many patches, but only {len(points)} were sampled; "
            "take a smaller --vocab-size or more images"
        )
    if not bool(points.isfinite().all()):
        raise MapetError(
            "the features to be clustered contain NaN or infinity; check the teacher's weights and the images"
        )
    data = np.ascontiguousarray(points.float().numpy())
    kmeans = faiss.Kmeans(
        data.shape[1],
        count,
        niter=ITERATIONS,
        seed=seed & 0x7FFFFFFF,
        max_points_per_centroid=MAX_POINTS_PER_CENTROID,
        min_points_per_centroid=1,  # small sets are the user's choice, refused only when impossible
    )
    kmeans.train(data)
    return torch.from_numpy(np.array(kmeans.centroids))


def nearest_centroid(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the nearest centroid (L2) for each of ``(..., d)`` points, int64."""
    flat = points.reshape(-1, points.shape[-1])
    # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2), and |x|^2 does not change which centroid is nearest.
    half_norms = centroids.square().sum(dim=1) / 2
    rows = max(1, _MAX_DISTANCES // len(centroids))
    ids = [torch.addmm(half_norms, chunk, centroids.T, alpha=-1).argmin(dim=1) for chunk in flat.split(rows)]
    return torch.cat(ids).reshape(points.shape[:-1])

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from mapet import MapetError
from mapet.tokenizers.kmeans import fit_centroids, nearest_centroid


def clustered(count: int = 4000, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, width, generator=generator) * 3
    return centres[torch.randint(0, 40, (count,), generator=generator)] + torch.randn(count, width, generator=generator)


def test_nearest_centroid_equals_faiss() -> None:
    points, centroids = clustered(), clustered(300)
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(centroids.numpy())
    _, expected = index.search(points.numpy(), 1)
    assert np.array_equal(nearest_centroid(points.reshape(40, 100, 12), centroids)[0].flatten().numpy(), expected[:, 0])


def test_inertia_is_scikit_learns() -> None:
    from sklearn.cluster import KMeans

    points = torch.randn(4000, 12, generator=torch.Generator().manual_seed(0))
    ours = torch.cdist(points, fit_centroids(points, 32, seed=0)).min(1).values.square().sum().item()
    theirs = KMeans(32, init="random", n_init=1, max_iter=20, random_state=0).fit(points.numpy()).inertia_
    assert ours == pytest.approx(theirs, rel=0.01)


def test_same_seed_same_centroids() -> None:
    points = clustered()
    assert torch.equal(fit_centroids(points, 16, seed=3), fit_centroids(points, 16, seed=3))
    assert not torch.equal(fit_centroids(points, 16, seed=3), fit_centroids(points, 16, seed=4))


def test_bad_points_are_refused() -> None:
    with pytest.raises(MapetError, match=r"codebook of 50 ids .* only 40 were sampled"):
        fit_centroids(torch.randn(40, 3), 50, 0)
    points = torch.randn(40, 3)
    points[7, 1] = float("nan")
    with pytest.raises(MapetError, match="NaN"):
        fit_centroids(points, 4, 0)

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from mapet import MapetError
from mapet.tokenizers.kmeans import all_cores, fit_centroids, nearest_centroid


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


def inertia(points: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(nearest_centroid(points, centroids)[1].double().sum())


def test_inertia_is_faiss_own() -> None:
    """Upstream's call, of faiss alone: 20 iterations, 5 restarts."""
    for spherical in (False, True):
        points = clustered(20_000, 24)
        if spherical:
            points = torch.nn.functional.normalize(points, dim=1)
        theirs = faiss.Kmeans(24, 200, niter=20, nredo=5, spherical=spherical, max_points_per_centroid=512, seed=1)
        theirs.train(points.numpy())
        ours = fit_centroids(points, 200, seed=1, iterations=20, restarts=5, spherical=spherical)
        expected = inertia(points, torch.from_numpy(theirs.centroids))
        assert inertia(points, ours) == pytest.approx(expected, rel=0.01)


def test_distances_are_squared_l2() -> None:
    points, centroids = clustered(500), clustered(30)
    ids, distances = nearest_centroid(points, centroids)
    expected = torch.cdist(points, centroids).square().min(1)
    assert torch.equal(ids, expected.indices)
    assert torch.allclose(distances, expected.values, rtol=1e-4, atol=1e-3)


def test_restarts_keep_the_best() -> None:
    points = clustered()
    single = [inertia(points, fit_centroids(points, 40, seed=seed)) for seed in (7, 8, 9)]
    assert inertia(points, fit_centroids(points, 40, seed=7, restarts=3)) == pytest.approx(min(single))
    assert max(single) > 1.001 * min(single)


def test_spherical_centroids_have_length_one() -> None:
    points = torch.nn.functional.normalize(clustered(), dim=1)
    centroids = fit_centroids(points, 40, seed=0, spherical=True)
    assert torch.allclose(centroids.norm(dim=1), torch.ones(40), atol=1e-5)
    shown = []
    fit_centroids(points, 40, seed=0, spherical=True, progress=lambda done, total, distance: shown.append(distance))
    assert shown[-1] == pytest.approx(inertia(points, centroids) / len(points), rel=0.02)


def test_no_centroid_is_left_dead() -> None:
    """Most points are one and the same, as flat background is: most initial centroids coincide."""
    points = torch.cat([torch.zeros(5000, 4), clustered(200, 4)])
    centroids = fit_centroids(points, 64, seed=0)
    assert len(nearest_centroid(points, centroids)[0].unique()) == 64
    without = faiss.Kmeans(4, 64, niter=20, seed=0, max_points_per_centroid=10_000)
    without.train(points.numpy())
    assert len(nearest_centroid(points, torch.from_numpy(without.centroids))[0].unique()) < 64


def test_fewer_different_points_than_centroids_are_all_used() -> None:
    points = torch.arange(5).float()[:, None].expand(-1, 3).repeat(20, 1).contiguous()
    ids, distances = nearest_centroid(points, fit_centroids(points, 8, seed=0))
    assert len(ids.unique()) == 5
    assert float(distances.max()) == pytest.approx(0, abs=1e-5)


def test_progress_is_told_iteration_by_iteration() -> None:
    told: list[tuple[int, int]] = []
    fit_centroids(
        clustered(), 16, 0, iterations=3, restarts=2, progress=lambda done, total, _: told.append((done, total))
    )
    assert told == [(done, 6) for done in range(1, 7)]


def test_points_are_neither_copied_nor_changed() -> None:
    points = clustered()
    before = points.clone()
    fit_centroids(points, 16, seed=0)
    assert torch.equal(points, before)


def test_threads_are_given_back() -> None:
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    with all_cores():
        pass
    assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == before


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

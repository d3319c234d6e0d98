import os

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mapet import MapetError
from mapet.tokenizers.kmeans import all_cores, fit_centroids, nearest_centroid


def clustered(count: int = 4000, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, width, generator=generator) * 3
    return centres[torch.randint(0, 40, (count,), generator=generator)] + torch.randn(count, width, generator=generator)


def inertia(points: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(nearest_centroid(points, centroids)[1].double().sum())


def test_nearest_centroids_and_squared_distances() -> None:
    points, centroids = clustered(500), clustered(300)
    ids, distances = nearest_centroid(points.reshape(5, 100, 12), centroids)
    expected = torch.cdist(points, centroids).square().min(1)
    assert torch.equal(ids.flatten(), expected.indices)
    assert torch.allclose(distances.flatten(), expected.values, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("spherical", [False, True])
def test_inertia_is_that_of_upstreams_call_of_faiss(spherical: bool) -> None:
    points = clustered(20_000, 24)
    points = F.normalize(points, dim=1) if spherical else points
    theirs = faiss.Kmeans(24, 200, niter=20, nredo=5, spherical=spherical, max_points_per_centroid=512, seed=1)
    theirs.train(points.numpy())
    ours = fit_centroids(points, 200, seed=1, iterations=20, restarts=5, spherical=spherical)
    assert inertia(points, ours) == pytest.approx(inertia(points, torch.from_numpy(theirs.centroids)), rel=0.01)


@pytest.mark.parametrize("spherical", [False, True])
def test_iterations_are_those_of_faiss(spherical: bool) -> None:
    points = F.normalize(clustered(70_000, 24), dim=1) if spherical else clustered(70_000, 24)  # two chunks
    first = points[np.sort(np.random.default_rng(3).choice(len(points), 50, replace=False))]
    theirs = faiss.Kmeans(24, 50, niter=3, spherical=spherical, max_points_per_centroid=len(points))
    theirs.train(points.numpy(), init_centroids=first.numpy())
    ours = fit_centroids(points, 50, seed=3, iterations=3, spherical=spherical)
    assert torch.allclose(ours, torch.from_numpy(theirs.centroids), atol=1e-4)


def test_the_best_restart_is_kept() -> None:
    points = clustered()
    single = [inertia(points, fit_centroids(points, 40, seed=seed)) for seed in (7, 8, 9)]
    assert inertia(points, fit_centroids(points, 40, seed=7, restarts=3)) == pytest.approx(min(single))
    assert max(single) > 1.001 * min(single)


def test_spherical_centroids_and_progress() -> None:
    points, shown = F.normalize(clustered(), dim=1), []
    before = points.clone()
    centroids = fit_centroids(
        points, 40, 0, iterations=10, restarts=2, spherical=True, progress=lambda *values: shown.append(values)
    )
    assert torch.allclose(centroids.norm(dim=1), torch.ones(40), atol=1e-5)
    assert [values[:2] for values in shown] == [(done, 20) for done in range(1, 21)]
    assert min(shown[9][2], shown[19][2]) == pytest.approx(inertia(points, centroids) / len(points), rel=0.02)
    assert torch.equal(points, before)


def test_no_centroid_is_dead_even_if_most_points_are_equal() -> None:
    points = torch.cat([torch.zeros(5000, 4), clustered(200, 4)])
    assert len(nearest_centroid(points, fit_centroids(points, 64, seed=0))[0].unique()) == 64
    without = faiss.Kmeans(4, 64, niter=20, seed=0, max_points_per_centroid=10_000)
    without.train(points.numpy())
    assert len(nearest_centroid(points, torch.from_numpy(without.centroids))[0].unique()) < 64
    few = torch.arange(5).float()[:, None].expand(-1, 3).repeat(20, 1).contiguous()
    assert len(nearest_centroid(few, fit_centroids(few, 8, seed=0))[0].unique()) == 5


def test_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with all_cores():
            assert torch.get_num_threads() == len(os.sched_getaffinity(0))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_points_that_are_not_finite_are_refused() -> None:
    points = torch.randn(40, 3)
    points[7, 1] = float("nan")
    with pytest.raises(MapetError, match="NaN"):
        fit_centroids(points, 4, 0)

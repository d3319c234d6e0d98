"""k-means: centroids are fitted with faiss; the nearest centroid is found with torch, on the device of the images."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from mapet.errors import MapetError

Array = np.ndarray[Any, np.dtype[np.float32]]
# Called after each iteration with the number of iterations done, the number of all, and the mean squared distance.
Progress = Callable[[int, int, float], None]

# Elements of one matrix of distances: 16 MiB stay in a CPU's cache, 256 MiB keep a GPU busy.
_MAX_DISTANCES, _MAX_DISTANCES_GPU = 1 << 22, 1 << 26
_REPAIRS = 10


def fit_centroids(
    points: Tensor,
    count: int,
    seed: int,
    *,
    iterations: int = 20,
    restarts: int = 1,
    spherical: bool = False,
    progress: Progress = lambda done, total, inertia: None,
) -> Tensor:
    """Return ``(count, d)`` float32 centroids of ``(n, d)`` float32 points: the best of several runs of k-means.

    The points are neither copied nor changed. If a cluster becomes empty during the iterations, faiss splits a large
    cluster. Centroids of clusters that are empty after the last iteration are moved to the points that are farthest
    from any centroid.

    Args:
        points: at least ``count`` points on the CPU; all are used.
        count: number of centroids.
        seed: seed of the initial centroids, which are drawn from the points.
        iterations: iterations of Lloyd's algorithm; upstream uses 20.
        restarts: runs from different initial centroids; the run of least inertia is kept; upstream uses 5.
        spherical: scale the centroids to length 1; the points must have length 1.
        progress: see ``Progress``.

    Raises:
        MapetError: if a point is not finite.
    """
    assert len(points) >= count
    if not all(bool(chunk.isfinite().all()) for chunk in points.split(65536)):
        raise MapetError(
            "the features to be clustered contain NaN or infinity; check the teacher's weights and the images"
        )
    data = points.numpy()
    best, least = np.empty(0, np.float32), float("inf")
    for restart in range(restarts):
        chosen = np.random.default_rng(seed + restart).choice(len(data), count, replace=False)
        centroids, inertia = data[np.sort(chosen)], float("inf")
        for iteration in range(iterations):
            centroids, inertia = _iterate(data, centroids, spherical)
            progress(restart * iterations + iteration + 1, restarts * iterations, inertia / len(data))
        if restart == 0 or inertia < least:
            best, least = centroids, inertia
    return torch.from_numpy(_repair_dead(data, best))


def _iterate(data: Array, centroids: Array, spherical: bool) -> tuple[Array, float]:
    """Run one iteration of faiss, so that progress can be shown after each.

    Returns:
        the centroids after the iteration, and the sum of squared distances before it.
    """
    kmeans = faiss.Kmeans(
        data.shape[1],
        len(centroids),
        niter=1,
        spherical=spherical,
        gpu=hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0,  # faiss-cpu does not have the function
        min_points_per_centroid=1,  # no warning about small samples
        max_points_per_centroid=len(data),  # no subsampling
    )
    objective = float(kmeans.train(data, init_centroids=centroids))
    # On unit vectors faiss maximises the inner product: |x - c|^2 = 2 - 2 x c.
    inertia = 2 * len(data) - 2 * objective if spherical else objective
    return np.array(kmeans.centroids, np.float32).reshape(centroids.shape), inertia


def _repair_dead(data: Array, centroids: Array) -> Array:
    """Move centroids that are nearest to no point onto the points that are farthest from their centroids."""
    for _ in range(_REPAIRS):
        distances, ids = (found[:, 0] for found in faiss.knn(data, centroids, 1))
        dead = np.flatnonzero(np.bincount(ids, minlength=len(centroids)) == 0)
        # There may be fewer different points than centroids: points at distance 0 are not taken.
        farthest = np.argsort(-distances, kind="stable")[: len(dead)]
        farthest = farthest[distances[farthest] > 0]
        if not len(dead) or not len(farthest):
            break
        centroids[dead[: len(farthest)]] = data[farthest]
    return centroids


@contextmanager
def all_cores() -> Iterator[None]:
    """Let faiss use all cores of the machine: launchers restrict each process to one core.

    The setting is restored afterwards. torch may share it, and the rounding of a run must not depend on which process
    fitted the tokenizer.
    """
    before = faiss.omp_get_max_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    faiss.omp_set_num_threads(cores)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def nearest_centroid(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index (int64) and the squared L2 distance of the centroid nearest to each of ``(..., d)`` points."""
    flat = points.reshape(-1, points.shape[-1])
    # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2), and |x|^2 does not change which centroid is nearest.
    half_norms = centroids.square().sum(dim=1) / 2
    rows = max(1, (_MAX_DISTANCES if points.is_cpu else _MAX_DISTANCES_GPU) // len(centroids))
    best = [torch.addmm(half_norms, chunk, centroids.T, alpha=-1).min(dim=1) for chunk in flat.split(rows)]
    ids = torch.cat([part.indices for part in best])
    distances = flat.square().sum(dim=1) + 2 * torch.cat([part.values for part in best])
    return ids.reshape(points.shape[:-1]), distances.clamp(min=0).reshape(points.shape[:-1])

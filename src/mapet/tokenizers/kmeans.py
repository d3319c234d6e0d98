"""k-means by Lloyd's algorithm in torch, on the CPU or a GPU."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mapet.errors import MapetError

# Called after each iteration with the number of iterations done, the number of all, and the mean squared distance.
Progress = Callable[[int, int, float], None]

# Elements of one matrix of distances: 16 MiB stay in a CPU's cache, 256 MiB keep a GPU busy.
_MAX_DISTANCES, _MAX_DISTANCES_GPU = 1 << 22, 1 << 26
_CHUNK = 1 << 16  # points that are moved to the device at once
_REPAIRS = 10


def fit_centroids(
    points: Tensor,
    count: int,
    seed: int,
    *,
    iterations: int = 20,
    restarts: int = 1,
    spherical: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, total, inertia: None,
) -> Tensor:
    """Return ``(count, d)`` float32 centroids of ``(n, d)`` float32 points: the best of several runs of k-means.

    A cluster that becomes empty gets the point that is farthest from its centroid, as in scikit-learn. On a GPU the
    order of the sums is not fixed, so two fits may differ in the last bits.

    Args:
        points: at least ``count`` points on the CPU; all are used, and none is changed.
        count: number of centroids.
        seed: seed of the initial centroids, which are drawn from the points.
        iterations: iterations of Lloyd's algorithm; upstream uses 20.
        restarts: runs from different initial centroids; the run of least inertia is kept; upstream uses 5.
        spherical: scale the centroids to length 1; the points must have length 1.
        device: where distances and means are computed; the points are moved there in parts.
        progress: see ``Progress``.

    Raises:
        MapetError: if a point is not finite.
    """
    assert len(points) >= count
    if not all(bool(chunk.isfinite().all()) for chunk in points.split(_CHUNK)):
        raise MapetError(
            "the features to be clustered contain NaN or infinity; check the teacher's weights and the images"
        )
    best, least = torch.empty(0), float("inf")
    for restart in range(restarts):
        chosen = np.random.default_rng(seed + restart).choice(len(points), count, replace=False)
        centroids, inertia = points[np.sort(chosen)].to(device), float("inf")
        for iteration in range(iterations):
            ids, distances = _assign(points, centroids)
            inertia = float(distances.sum(dtype=torch.float64))
            empty, farthest = _refill(ids, distances, count)
            ids[farthest] = empty
            centroids = _means(points, ids, centroids)
            if spherical:
                centroids = F.normalize(centroids, dim=1)
            progress(restart * iterations + iteration + 1, restarts * iterations, inertia / len(points))
        if restart == 0 or inertia < least:
            best, least = centroids, inertia
    for _ in range(_REPAIRS):  # the last means may have left a cluster empty
        empty, farthest = _refill(*_assign(points, best), count)
        if not len(empty):
            break
        best[empty] = points[farthest].to(device)
    return best.cpu()


def _assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``nearest_centroid`` returns, on the CPU."""
    parts = [nearest_centroid(chunk.to(centroids.device), centroids) for chunk in points.split(_CHUNK)]
    return torch.cat([ids.cpu() for ids, _ in parts]), torch.cat([distances.cpu() for _, distances in parts])


def _means(points: Tensor, ids: Tensor, centroids: Tensor) -> Tensor:
    """Return the mean of the points of each cluster; a cluster without points keeps its centroid."""
    sums = torch.zeros_like(centroids)
    for chunk, chunk_ids in zip(points.split(_CHUNK), ids.split(_CHUNK), strict=True):
        sums.index_add_(0, chunk_ids.to(sums.device), chunk.to(sums.device))
    counts = torch.bincount(ids, minlength=len(centroids)).to(sums.device)[:, None]
    return torch.where(counts > 0, sums / counts.clamp(min=1), centroids)


def _refill(ids: Tensor, distances: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of empty clusters, and as many points: those farthest from their centroids.

    There may be fewer different points than clusters: points at distance 0 are not taken.
    """
    empty = (torch.bincount(ids, minlength=count) == 0).nonzero()[:, 0]
    distance, farthest = distances.topk(len(empty))
    farthest = farthest[distance > 0]
    return empty[: len(farthest)], farthest


@contextmanager
def all_cores() -> Iterator[None]:
    """Let torch use all cores of the machine: launchers restrict each process to one core.

    The setting is restored afterwards: the rounding of a run must not depend on which process fitted the tokenizer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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

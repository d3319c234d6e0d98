"""k-means: fitted with faiss, applied in torch on whatever device the images are on."""

from __future__ import annotations

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
# Called after each iteration with those done, those to come in all, and the mean squared distance.
Progress = Callable[[int, int, float], None]

_MAX_DISTANCES = 1 << 26  # elements of one distance matrix: 256 MiB in float32
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

    The points are neither copied nor changed. faiss splits a large cluster whenever one is empty during the
    iterations; what is empty after the last one is moved to the points that are farthest from any centroid.

    Args:
        points: on the CPU; all are used.
        count: of centroids.
        seed: of the initial centroids, which are points.
        iterations: of Lloyd's algorithm; upstream takes 20.
        restarts: runs from other initial centroids, of which the one of least inertia is kept; upstream takes 5.
        spherical: keep the centroids at length 1; the points must be.
        progress: see ``Progress``.

    Raises:
        MapetError: if there are fewer points than centroids, or a point is not finite.
    """
    if len(points) < count:
        raise MapetError(
            f"a codebook of {count} ids needs at least as many patches, but only {len(points)} were sampled; "
            "take a smaller --vocab-size or more images"
        )
    if not all(bool(chunk.isfinite().all()) for chunk in points.split(65536)):
        raise MapetError(
            "the features to be clustered contain NaN or infinity; check the teacher's weights and the images"
        )
    data = points.numpy()
    if len(data) == count:
        return points.clone()
    best, least = np.empty(0, np.float32), float("inf")
    for restart in range(restarts):
        centroids, inertia = _random_points(data, count, seed + restart), float("inf")
        for iteration in range(iterations):
            centroids, inertia = _iterate(data, centroids, spherical)
            progress(restart * iterations + iteration + 1, restarts * iterations, inertia / len(data))
        if restart == 0 or inertia < least:
            best, least = centroids, inertia
    return torch.from_numpy(_repair_dead(data, best))


def _random_points(data: Array, count: int, seed: int) -> Array:
    chosen = np.random.default_rng(seed).choice(len(data), count, replace=False)
    return data[np.sort(chosen)]


def _iterate(data: Array, centroids: Array, spherical: bool) -> tuple[Array, float]:
    """One of faiss's iterations: the centroids after it, the sum of squared distances before it.

    One at a time, so that there is something to be seen of the hours that many may take.
    """
    kmeans = faiss.Kmeans(
        data.shape[1],
        len(centroids),
        niter=1,
        spherical=spherical,
        gpu=_gpus() > 0,
        min_points_per_centroid=1,  # small sets are the user's choice, refused only when impossible
        max_points_per_centroid=len(data),  # the sample is as large as it is meant to be
    )
    objective = float(kmeans.train(data, init_centroids=centroids))
    # On unit vectors faiss maximises the inner product: |x - c|^2 = 2 - 2 x c.
    inertia = 2 * len(data) - 2 * objective if spherical else objective
    return np.array(kmeans.centroids, np.float32).reshape(centroids.shape), inertia


def _repair_dead(data: Array, centroids: Array) -> Array:
    """Move centroids that no point is nearest to, onto the points that are farthest from theirs."""
    for _ in range(_REPAIRS):
        flat = faiss.IndexFlatL2(data.shape[1])
        index = faiss.index_cpu_to_all_gpus(flat) if _gpus() else flat
        index.add(centroids)
        distances, ids = index.search(data, 1)
        distances, ids = np.ravel(distances), np.ravel(ids)
        dead = np.flatnonzero(np.bincount(ids, minlength=len(centroids)) == 0)
        # Points that lie on their centroid gain nothing: then there are fewer different points than centroids.
        farthest = np.argsort(-distances, kind="stable")[: len(dead)]
        farthest = farthest[distances[farthest] > 0]
        if not len(dead) or not len(farthest):
            break
        centroids[dead[: len(farthest)]] = data[farthest]
    return centroids


def _gpus() -> int:
    return faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0  # the CPU build does not have it


@contextmanager
def all_cores() -> Iterator[None]:
    """Give faiss this machine's cores: launchers restrict each process to one, and the others wait meanwhile.

    Restored afterwards: torch may share the setting, and the rounding of a run would depend on whether it was this
    process that fitted the tokenizer.
    """
    before = faiss.omp_get_max_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    faiss.omp_set_num_threads(cores)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def nearest_centroid(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return index, int64, and squared L2 distance of the centroid nearest to each of ``(..., d)`` points."""
    flat = points.reshape(-1, points.shape[-1])
    # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2), and |x|^2 does not change which centroid is nearest.
    half_norms = centroids.square().sum(dim=1) / 2
    rows = max(1, _MAX_DISTANCES // len(centroids))
    best = [torch.addmm(half_norms, chunk, centroids.T, alpha=-1).min(dim=1) for chunk in flat.split(rows)]
    ids = torch.cat([part.indices for part in best])
    distances = flat.square().sum(dim=1) + 2 * torch.cat([part.values for part in best])
    return ids.reshape(points.shape[:-1]), distances.clamp(min=0).reshape(points.shape[:-1])

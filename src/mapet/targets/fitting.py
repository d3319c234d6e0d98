"""Fitting a codebook by k-means: patches sampled in one pass by all processes, clustered on the main one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, cycle, islice

import torch
from accelerate.utils import broadcast, gather
from rich.console import Console
from torch import Tensor

from mapet.config.keys import KMeansKeys
from mapet.data.batches import DamageTally, ViewDataset, load_batches
from mapet.data.seeds import Stream, fold_seed
from mapet.engine.processes import join_processes, on_main
from mapet.errors import MapetError
from mapet.report.progress import Meter
from mapet.tokenizers.base import KTokenizer
from mapet.tokenizers.kmeans import all_cores

logger = logging.getLogger(__name__)

# Patches sampled for each centroid if it is not said: faiss's own default (upstream takes 512); fewer where fitting
# would take more than so many operations, about ten minutes on ten cores, but not fewer than faiss's own least.
MOST_SAMPLED, LEAST_SAMPLED, FIT_OPERATIONS = 256, 39, 1e14
FIT_EPOCH = -1  # the views that are sampled are none of those that are trained on


@dataclass(frozen=True)
class SamplePlan:
    """How many images are sampled, and how many patches of each."""

    images: int
    patches_per_image: int

    @property
    def points(self) -> int:
        """Patches in all."""
        return self.images * self.patches_per_image


def plan_sample(config: KMeansKeys, vocab_size: int, width: int, patches: int, images: int) -> SamplePlan:
    """Decide how large the sample is.

    Args:
        config: what the user asked for.
        vocab_size: ``V``.
        width: ``d``, of the features.
        patches: of an image.
        images: of the data set.

    Raises:
        MapetError: if there are fewer patches than centroids, or the memory allowed holds fewer.
    """
    per_centroid = config.points_per_centroid
    if per_centroid is None:
        tries = config.kmeans_iterations * config.kmeans_restarts
        affordable = FIT_OPERATIONS / (2 * tries * vocab_size**2 * width)
        per_centroid = min(MOST_SAMPLED, max(LEAST_SAMPLED, int(affordable)))
    held = int(config.sample_gib * 2**30 / (4 * width))
    if held < vocab_size:
        raise MapetError(
            f"{config.sample_gib:g} GiB hold {held} patches of {width} numbers, fewer than the {vocab_size} ids of the "
            "codebook; raise --sample-gib or take a smaller --vocab-size"
        )
    wanted = min(per_centroid * vocab_size, held)
    # From many images a few patches each: neighbouring patches are alike. From at most all images.
    per_image = min(patches, max(math.ceil(patches / 4), math.ceil(wanted / images)))
    plan = SamplePlan(min(images, math.ceil(wanted / per_image), max(1, held // per_image)), per_image)
    if plan.points < vocab_size:
        raise MapetError(
            f"a codebook of {vocab_size} ids needs at least as many patches, but {plan.images} images give only "
            f"{plan.points}; take a smaller --vocab-size or more images"
        )
    return plan


def fit_codebook(
    tokenizer: KTokenizer,
    config: KMeansKeys,
    dataset: ViewDataset,
    tally: DamageTally,
    *,
    seed: int,
    batch_size: int,
    workers: int,
    console: Console,
) -> None:
    """Fit a tokenizer's centroids in place, on every process alike.

    The main process holds the sample, ``4 * points * d`` bytes and at most ``sample_gib``; beside it there is a
    batch and its features, whatever the number of images.

    Raises:
        MapetError: if there are too few patches, or a feature is not finite.
    """
    patches = tokenizer.grid[0] * tokenizer.grid[1]
    width = tokenizer.centroids.shape[1]
    plan = plan_sample(config, tokenizer.vocab_size, width, patches, len(dataset.images))
    logger.info(
        "fitting %d ids to %d patches of %d images: %d numbers each, %.2f GiB",
        tokenizer.vocab_size,
        plan.points,
        plan.images,
        width,
        4 * plan.points * width / 2**30,
    )
    world = join_processes()
    if not world.is_main_process:
        console = Console(quiet=True)
    began = time.perf_counter()
    sample = torch.empty(plan.points, width) if world.is_main_process else None
    with Meter(console, "sampling patches", plan.images) as meter:
        filled = 0
        for points in _sampled(tokenizer, plan, dataset, tally, seed, batch_size, workers):
            if sample is not None:
                part = points[: plan.points - filled]
                sample[filled : filled + len(part)] = part
                filled += len(part)
                meter.show(filled // plan.patches_per_image)
    sampled = time.perf_counter()

    def cluster() -> None:
        assert sample is not None
        with all_cores(), Meter(console, "k-means", config.kmeans_iterations * config.kmeans_restarts) as meter:
            tokenizer.fit(
                sample,
                seed,
                iterations=config.kmeans_iterations,
                restarts=config.kmeans_restarts,
                progress=lambda done, total, inertia: meter.show(done, f"mean squared distance {inertia:.4g}"),
            )

    on_main(cluster)
    broadcast(tokenizer.centroids)
    logger.info("fitted: sampling %.1f s, k-means %.1f s", sampled - began, time.perf_counter() - sampled)


def _sampled(
    tokenizer: KTokenizer,
    plan: SamplePlan,
    dataset: ViewDataset,
    tally: DamageTally,
    seed: int,
    batch_size: int,
    workers: int,
) -> Iterator[Tensor]:
    """Yield sampled features ``(n, d)`` on the CPU: the same, in the same order, whatever the number of processes.

    At the end come some that are there twice, so that all processes do the same number of equal batches.
    """
    rank, world = join_processes().process_index, join_processes().num_processes
    generator = torch.Generator().manual_seed(fold_seed(seed, Stream.SAMPLE))
    chosen = torch.randperm(len(dataset.images), generator=generator)[: plan.images].tolist()
    batch_size = min(batch_size, len(chosen))
    rounds = math.ceil(len(chosen) / (batch_size * world))
    filled_up = list(islice(chain(chosen, cycle(chosen)), rounds * world * batch_size))
    numbers = range(rank, rounds * world, world)
    keys = [[(FIT_EPOCH, i) for i in filled_up[n * batch_size : (n + 1) * batch_size]] for n in numbers]
    for number, batch in zip(numbers, load_batches(dataset, keys, workers), strict=True):
        tally.add(batch["damaged"])
        features_BPD = tokenizer.features(batch["tokenizer_images"].to(tokenizer.device))
        generator.manual_seed(fold_seed(seed, Stream.SAMPLE, number))
        noise = torch.rand(features_BPD.shape[:2], generator=generator)
        picked = noise.argsort(dim=1)[:, : plan.patches_per_image].to(features_BPD.device)
        points = features_BPD.gather(1, picked[:, :, None].expand(-1, -1, features_BPD.shape[-1]))
        yield gather(points).flatten(0, 1).cpu()

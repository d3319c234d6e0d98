"""Fit a codebook by k-means: all processes sample patches, the main process clusters them."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from accelerate.utils import broadcast, gather
from rich.console import Console
from torch import Tensor

from mapet.config.keys import KMeansKeys
from mapet.data.batches import DamageTally, ViewDataset, load_batches
from mapet.data.seeds import Stream, fold_seed
from mapet.engine.parallel import join_processes, on_main
from mapet.errors import MapetError
from mapet.report.progress import Meter
from mapet.tokenizers.kmeans import all_cores
from mapet.tokenizers.kmeans_tokenizers import KTokenizer

logger = logging.getLogger(__name__)

# Default number of patches sampled per centroid: faiss's own default (upstream takes 512), or fewer if k-means would
# take more than 1e14 operations (about ten minutes on ten cores), but not fewer than faiss's own minimum.
MOST_SAMPLED, LEAST_SAMPLED, FIT_OPERATIONS = 256, 39, 1e14
FIT_EPOCH = -1  # no training epoch: patches are sampled from other views


@dataclass(frozen=True)
class SamplePlan:
    """The number of sampled images, and of patches sampled from each."""

    images: int
    patches_per_image: int

    @property
    def points(self) -> int:
        """Number of sampled patches."""
        return self.images * self.patches_per_image


def plan_sample(config: KMeansKeys, vocab_size: int, width: int, patches: int, images: int) -> SamplePlan:
    """Return the size of the sample.

    Args:
        config: what the user asked for.
        vocab_size: ``V``.
        width: ``d``, width of the features.
        patches: number of patches of an image.
        images: number of images in the data set.

    Raises:
        MapetError: if the images have fewer patches than there are centroids, or ``sample_gib`` is too small for them.
    """
    per_centroid = config.points_per_centroid
    if per_centroid is None:
        tries = config.kmeans_iterations * config.kmeans_restarts
        affordable = FIT_OPERATIONS / (2 * tries * vocab_size**2 * width)
        per_centroid = min(MOST_SAMPLED, max(LEAST_SAMPLED, int(affordable)))
    in_memory = int(config.sample_gib * 2**30 / (4 * width))
    wanted = min(per_centroid * vocab_size, in_memory)
    # A quarter of the patches of many images is better than all patches of few images: neighbouring patches are alike.
    per_image = min(patches, max(math.ceil(patches / 4), math.ceil(wanted / images)))
    plan = SamplePlan(min(images, math.ceil(wanted / per_image), in_memory // per_image), per_image)
    if plan.points < vocab_size:
        raise MapetError(
            f"a codebook of {vocab_size} ids needs at least as many patches, but only {plan.points} patches of "
            f"{width} numbers can be sampled from {images} images in {config.sample_gib:g} GiB; take a smaller "
            "--vocab-size, more images or a larger --sample-gib"
        )
    return plan


def fit_codebook(
    tokenizer: KTokenizer,
    config: KMeansKeys,
    dataset: ViewDataset,
    tally: DamageTally,
    *,
    batch_size: int,
    workers: int,
    console: Console,
) -> None:
    """Fit a tokenizer's centroids in place; all processes call it and get the same centroids.

    The seed of the dataset's views also decides which patches are sampled and where k-means begins. The sample takes
    ``4 * points * d`` bytes, at most ``sample_gib``, in the memory of the main process. Besides it, one batch and its
    features are in memory, whatever the number of images.

    Raises:
        MapetError: if there are too few patches, or a feature is not finite.
    """
    vocab_size, width = tokenizer.centroids.shape
    plan = plan_sample(config, vocab_size, width, math.prod(tokenizer.grid), len(dataset.images))
    gib = 4 * plan.points * width / 2**30
    logger.info("fitting %d ids to %d patches of %d images, %.2f GiB", vocab_size, plan.points, plan.images, gib)
    is_main = join_processes().is_main_process
    console = console if is_main else Console(quiet=True)
    sample, filled = torch.empty(plan.points if is_main else 0, width), 0
    with Meter(console, "sampling patches", plan.images) as meter:
        for points in _sampled(tokenizer, plan, dataset, tally, batch_size, workers):
            part = points[: len(sample) - filled]
            sample[filled : filled + len(part)] = part
            filled += len(part)
            meter.show(filled // plan.patches_per_image)

    def cluster() -> None:
        with all_cores(), Meter(console, "k-means", config.kmeans_iterations * config.kmeans_restarts) as meter:
            tokenizer.fit(
                sample,
                dataset.draws.seed,
                iterations=config.kmeans_iterations,
                restarts=config.kmeans_restarts,
                progress=lambda done, total, inertia: meter.show(done, f"mean squared distance {inertia:.4g}"),
            )

    on_main(cluster)
    broadcast(tokenizer.centroids)


def _sampled(
    tokenizer: KTokenizer, plan: SamplePlan, dataset: ViewDataset, tally: DamageTally, batch_size: int, workers: int
) -> Iterator[Tensor]:
    """Yield sampled features ``(n, d)`` on the CPU, in an order that does not depend on the number of processes.

    Some features are repeated at the end, so that all processes compute the same number of equal batches.
    """
    rank, world, seed = join_processes().process_index, join_processes().num_processes, dataset.draws.seed
    generator = torch.Generator().manual_seed(fold_seed(seed, Stream.SAMPLE))
    chosen = torch.randperm(len(dataset.images), generator=generator)[: plan.images].tolist()
    batch_size = min(batch_size, len(chosen))
    rounds = math.ceil(len(chosen) / (batch_size * world))
    filled_up = list(islice(cycle(chosen), rounds * world * batch_size))
    numbers = range(rank, rounds * world, world)
    keys = [[(FIT_EPOCH, i) for i in filled_up[n * batch_size : (n + 1) * batch_size]] for n in numbers]
    for number, batch in zip(numbers, load_batches(dataset, keys, workers, tokenizer.device), strict=True):
        tally.add(batch["damaged"])
        features = tokenizer.features(batch["tokenizer_images"])
        generator.manual_seed(fold_seed(seed, Stream.SAMPLE, number))
        noise = torch.rand(features.shape[:2], generator=generator)
        picked = noise.argsort(dim=1)[:, : plan.patches_per_image].to(features.device)
        points = features.gather(1, picked[:, :, None].expand(-1, -1, features.shape[-1]))
        yield gather(points).flatten(0, 1).cpu()

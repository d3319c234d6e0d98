"""The baseline of a run: what a model reaches that ignores the images. A run that learns is better."""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mapet.engine.files import replace_file
from mapet.report.progress import Baseline

logger = logging.getLogger(__name__)

BASELINE_IMAGES = 2048


def measure_baseline(values: Iterable[Tensor], vocab_size: int | None, loss_key: str, file: Path) -> Baseline:
    """Return the baseline of token ids or features, measured once per run and saved in ``file``.

    Args:
        values: target values ``(B, P, ...)`` of some images.
        vocab_size: number of ids; None for features.
        loss_key: the entry of a run's records that is compared with the entropy of the ids.
        file: JSON file.
    """
    try:
        return Baseline(**json.loads(file.read_text()))
    except FileNotFoundError:
        pass
    except (ValueError, TypeError, RecursionError):
        logger.warning("%s is damaged, so the baseline is measured again", file)
    baseline = _of_features(values) if vocab_size is None else _of_ids(values, vocab_size, loss_key)
    replace_file(file, json.dumps(asdict(baseline), indent=1) + "\n")
    return baseline


def _of_ids(values: Iterable[Tensor], vocab_size: int, loss_key: str) -> Baseline:
    """Predict the overall frequencies of the ids: the loss is their entropy, the guess the most frequent id."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for ids in values:
        counts += torch.bincount(ids.flatten().cpu(), minlength=vocab_size)
    share = counts / counts.sum()
    entropy = float(torch.special.entr(share.double()).sum())
    used, top = int((counts > 0).sum()), 100 * float(share.max())
    logger.info("tokens: %d of %d ids used, unigram entropy %.3f nats, top id %.1f%%", used, vocab_size, entropy, top)
    return Baseline("accuracy", float(share.max()), entropy, loss_key)


def _of_features(values: Iterable[Tensor]) -> Baseline:
    """Predict the mean direction: no other constant prediction has a higher mean cosine similarity."""
    total, count = torch.zeros(()), 0
    for features in values:
        directions = F.normalize(features.flatten(0, 1).double(), dim=-1)
        total, count = total + directions.sum(0).cpu(), count + len(directions)
    level = float(total.norm() / count)
    logger.info("features: the mean direction has a cosine similarity of %.3f", level)
    return Baseline("cosine", level)

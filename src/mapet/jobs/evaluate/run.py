"""What a model is worth: its features by k-NN and probes, its classifier as it is."""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from mapet.config.base import make_config
from mapet.config.keys import InferenceKeys
from mapet.data.batches import DamageTally
from mapet.data.labelled import open_labelled, open_test
from mapet.data.sources import ImageSet
from mapet.engine.files import claimed_folder, replace_folder
from mapet.engine.processes import count_workers, one_device
from mapet.engine.runfolder import explain_disk_errors
from mapet.engine.training import check_out
from mapet.errors import MapetError
from mapet.inference.models import OpenModel, open_model
from mapet.inference.tokens import read_tokens
from mapet.jobs.evaluate.config import AttentiveConfig, ClassifyConfig, KNNConfig, LinearConfig
from mapet.jobs.evaluate.results import write_results
from mapet.jobs.evaluate.seen import count_seen
from mapet.probes.attentive import MOST_PASSES, fit_attentive
from mapet.probes.classifier import score_classifier
from mapet.probes.features import Features, extract_features
from mapet.probes.heads import ProbeResult, Training, evaluate_probe, grid
from mapet.probes.knn import evaluate_knn
from mapet.probes.linear import fit_linear
from mapet.probes.metrics import Scores, per_class
from mapet.report.progress import Meter

logger = logging.getLogger(__name__)

Results = dict[str, Any]
# Features of training and test images, by what they depend on.
Memo = dict[tuple[Any, ...], tuple[Features, Features]]


@dataclass(frozen=True)
class Measurement:
    """What every evaluation works with: a model on its device, where progress is shown, and features there are."""

    config: InferenceKeys
    opened: OpenModel
    console: Console
    memo: Memo

    def stream_over(self, images: ImageSet) -> dict[str, Any]:
        """Return how ``images`` are put through the network: the arguments that ``inference.stream`` names."""
        return {
            "device": self.opened.device,
            "batch_size": self.config.batch_size,
            "workers": count_workers(self.config.workers, images, self.opened.device),
            "precision": self.config.precision,
            "tally": DamageTally(images, self.config.max_damaged),
        }

    def extract(self, kind: str, folder: Path | None = None) -> tuple[Features, Features]:
        """Return features of a kind of the training and the test images; with a folder they are kept there."""
        depends_on = kind, *(getattr(self.config, key) for key in InferenceKeys.model_fields)
        if depends_on in self.memo:
            return self.memo[depends_on]

        def choose(images: Tensor) -> Tensor:
            return read_tokens(self.opened.network, images).choose(kind)

        found = []
        parts = open_labelled(self.config.data, self.config.seed)
        for part, images, least in zip(("training", "test"), parts, (2, 1), strict=True):
            with Meter(self.console, f"features of {part} images", len(images)) as meter:
                features = extract_features(
                    choose,
                    images,
                    self.opened.view,
                    self.opened.channels,
                    **self.stream_over(images),
                    least_classes=least,
                    file=folder / part if folder else None,
                    show=meter.show,
                )
            found.append(features)
        train, test = found
        if folder is None:
            self.memo[depends_on] = train, test
        return train, test


def knn(config: KNNConfig, job: Measurement) -> Results:
    """Classify by the nearest neighbours."""
    train, test = job.extract(config.features)
    result = evaluate_knn(train, test, config.k, config.temperature, config.seed)
    return {
        **_described([result.scores], train, test),
        "features": config.features,
        "k": result.k,
        "temperature": config.temperature,
        "sweep": [{"k": k, "held_out": held, "test": result.test[k]} for k, held in result.held_out.items()],
    }


def linear(config: LinearConfig, job: Measurement) -> Results:
    """Train linear heads."""
    train, test = job.extract(config.features)
    return {"features": config.features, **_probe(fit_linear, config, job, train, test)}


def attentive(config: AttentiveConfig, job: Measurement) -> Results:
    """Train heads that attend to the patches."""
    try:
        temporary = tempfile.TemporaryDirectory(prefix="mapet-")
    except OSError as error:
        raise MapetError(
            f"no temporary folder can be made for the features ({error.strerror}); set TMPDIR to a disk with room"
        ) from error
    with temporary as folder:
        train, test = job.extract("patches", Path(folder))
        return _probe(fit_attentive, config, job, train, test, MOST_PASSES)


def classify(config: ClassifyConfig, job: Measurement) -> Results:
    """Measure the model's own classifier, by the protocol of fine-tuning: a bicubic resize, then a crop."""
    images = open_test(config.data, job.opened.require_classes(), f"model {config.model!r}")
    view = replace(job.opened.view, interpolation="bicubic")
    seen = None if config.reinit else count_seen(config.model, images)
    if seen:
        logger.warning(
            "%d of the %d images measured are among those that %s was trained on, so this says little of new images; "
            "its results.json has the accuracy on those that were kept apart",
            seen,
            len(images),
            config.model,
        )
    with Meter(job.console, "images", len(images)) as meter:
        scores = score_classifier(
            job.opened.network, images, view, job.opened.channels, **job.stream_over(images), show=meter.show
        )
    found = {**summarise([scores]), "test_images": int(scores.confusion.sum()), "crop_pct": view.crop_pct}
    return found if seen is None else {**found, "images_trained_on": seen}


# What is done with a model, by name: the configuration, and the work.
KINDS: dict[str, tuple[type[InferenceKeys], Callable[[Any, Measurement], Results]]] = {
    "knn": (KNNConfig, knn),
    "linear": (LinearConfig, linear),
    "attentive": (AttentiveConfig, attentive),
    "classify": (ClassifyConfig, classify),
}


def evaluate(
    kind: str,
    values: Mapping[str, Any],
    out: str | Path | None = None,
    *,
    console: Console | None = None,
    memo: Memo | None = None,
) -> Results:
    """Measure a model on labelled images.

    Args:
        kind: one of ``KINDS``.
        values: configuration by key, see the kind's class; ``model`` and ``data`` are needed.
        out: a new folder for ``results.json``, ``results.md`` and ``confusion.csv``; None to write nothing.
        console: where progress is shown; None for standard error.
        memo: keeps features from one call for others on the same model and images.

    Returns:
        what ``results.json`` holds: ``accuracy`` in 0..1 (the mean over seeds, from ``least`` to ``greatest``),
        ``top5``, ``per_class``, ``confusion`` (rows: true classes; summed over seeds), and how they came about.

    Raises:
        MapetError: for input that cannot work; nothing is written.
    """
    config_class, work = KINDS[kind]
    config = make_config(config_class, dict(values))
    device = one_device(config.precision)
    with ExitStack() as held:
        if out is not None:
            check_out(config.data, out)
            held.enter_context(claimed_folder(Path(out)))
        opened = open_model(
            config.model,
            classifier=kind == "classify",
            image_size=config.image_size,
            crop_pct=config.crop_pct,
            reinit=config.reinit,
            seed=config.seed,
        )
        opened.network.to(device)
        found = work(config, Measurement(config, opened, console or Console(stderr=True), {} if memo is None else memo))
        results = {
            "kind": kind,
            "model": config.model,
            "data": config.data,
            "reinit": config.reinit,
            "seed": config.seed,
            "image_size": list(opened.view.size),
            **found,
        }
        if out is not None:
            with explain_disk_errors(Path(out)):
                replace_folder(Path(out), partial(write_results, results))
    return results


def _probe(
    fit: Any,
    config: LinearConfig | AttentiveConfig,
    job: Measurement,
    train: Features,
    test: Features,
    most_passes: int | None = None,
) -> Results:
    settings = grid(config.lr, config.weight_decay)
    probes: list[ProbeResult] = []
    for seed in range(config.seed, config.seed + config.seeds):
        training = Training(seed, job.opened.device, config.steps, config.probe_batch, most_passes)
        steps, number = training.steps_for(len(train)), seed - config.seed + 1
        with Meter(job.console, f"probe, seed {number} of {config.seeds}", 2 * steps) as meter:

            def show(done: int, steps: int = steps, meter: Meter = meter) -> None:
                choosing = f"choosing among {len(settings)} settings"
                meter.show(done, choosing if done <= steps else "training the best again, on all training images")

            probes.append(evaluate_probe(fit, train, test, settings, replace(training, show=show)))
    runs = [
        {
            "seed": config.seed + number,
            "accuracy": probe.scores.accuracy,
            "lr": probe.setting.lr,
            "weight_decay": probe.setting.weight_decay,
            "held_out": probe.held_out[probe.setting],
        }
        for number, probe in enumerate(probes)
    ]
    means = {setting: statistics.mean(probe.held_out[setting] for probe in probes) for setting in settings}
    sweep = [{"lr": s.lr, "weight_decay": s.weight_decay, "held_out": mean} for s, mean in means.items()]
    return {**_described([probe.scores for probe in probes], train, test), "runs": runs, "sweep": sweep}


def _described(scores: Sequence[Scores], train: Features, test: Features) -> Results:
    return {**summarise(scores), "train_images": len(train), "test_images": len(test)}


def summarise(scores: Sequence[Scores]) -> Results:
    """Put what several seeds scored into one, JSON-able; see ``evaluate`` for the keys."""
    confusion = np.sum([one.confusion for one in scores], axis=0)
    accuracies = [one.accuracy for one in scores]
    tops = [one.top5 for one in scores if one.top5 is not None]
    return {
        "accuracy": statistics.mean(accuracies),
        **({"least": min(accuracies), "greatest": max(accuracies)} if len(scores) > 1 else {}),
        "top5": statistics.mean(tops) if tops else None,
        "per_class": per_class(confusion, scores[0].classes),
        "confusion": confusion.tolist(),
    }

"""The evaluations of a model: k-NN, linear probe, attentive probe, its own classifier."""

import logging
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from mapet.config.base import settle
from mapet.config.keys import InferenceKeys
from mapet.data.labelled import open_labelled, open_test
from mapet.engine.files import claimed_folder, replace_folder
from mapet.engine.runfolder import check_out, explain_disk_errors
from mapet.inference.from_config import open_on_device, stream_options
from mapet.inference.models import OpenModel
from mapet.inference.tokens import read_tokens
from mapet.jobs.evaluate.config import EVALUATIONS, AttentiveConfig, ClassifyConfig, KNNConfig, LinearConfig
from mapet.jobs.evaluate.results import write_results
from mapet.jobs.evaluate.seen import count_seen
from mapet.probes.attentive import MOST_PASSES, fit_attentive
from mapet.probes.classifier import score_classifier
from mapet.probes.features import Features, extract_features
from mapet.probes.heads import Fit, Training, evaluate_probe, grid
from mapet.probes.knn import evaluate_knn
from mapet.probes.linear import fit_linear
from mapet.probes.metrics import Scores, summarise
from mapet.report.progress import Meter

logger = logging.getLogger(__name__)

Results = dict[str, Any]
# Features of the training and the test images, by the configuration values that they depend on.
Memo = dict[tuple[Any, ...], tuple[Features, Features]]


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
        kind: a name in ``EVALUATIONS``.
        values: keys of the configuration; ``model`` and ``data`` are required.
        out: a new folder for ``results.json``, ``results.md`` and ``confusion.csv``; None: nothing is written.
        console: shows the progress; None: standard error.
        memo: keeps pooled features for further calls with the same model and images.

    Returns:
        the content of ``results.json``: ``accuracy`` in 0..1 (the mean over the seeds; ``least`` and ``greatest`` are
        the extremes), ``top5``, ``per_class``, ``confusion`` (rows: true classes; the sum over the seeds), and the
        settings that gave them.

    Raises:
        MapetError: if the input is wrong; nothing is written.
    """
    config = settle(EVALUATIONS[kind][0], values)
    if out is not None:
        check_out(config.data, out)
    with nullcontext() if out is None else claimed_folder(Path(out)):
        opened = open_on_device(config, classifier=kind == "classify")
        measure, console = MEASURES[kind], console or Console(stderr=True)
        results = {
            "kind": kind,
            **{key: getattr(config, key) for key in ("model", "data", "reinit", "seed")},
            "image_size": list(opened.view.size),
            **measure(config, opened, console, {} if memo is None else memo),
        }
        if out is not None:
            with explain_disk_errors(Path(out)):
                replace_folder(Path(out), partial(write_results, results))
    return results


def _measure_knn(config: KNNConfig, opened: OpenModel, console: Console, memo: Memo) -> Results:
    train, test = _pooled_features(config, opened, console, memo)
    result = evaluate_knn(train, test, config.k, config.temperature, config.seed)
    return {
        **_summarise_probe([result.scores], train, test),
        "features": config.features,
        "k": result.k,
        "temperature": config.temperature,
        "sweep": [{"k": k, "held_out": held, "test": result.test[k]} for k, held in result.held_out.items()],
    }


def _measure_linear(config: LinearConfig, opened: OpenModel, console: Console, memo: Memo) -> Results:
    train, test = _pooled_features(config, opened, console, memo)
    return {"features": config.features, **_train_probe(fit_linear, config, train, test, opened, console)}


def _measure_attentive(config: AttentiveConfig, opened: OpenModel, console: Console, memo: Memo) -> Results:
    with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
        train, test = _extract("patches", config, opened, console, Path(folder))
        return _train_probe(fit_attentive, config, train, test, opened, console, MOST_PASSES)


def _measure_classifier(config: ClassifyConfig, opened: OpenModel, console: Console, memo: Memo) -> Results:
    images = open_test(config.data, opened.require_classes(), f"model {config.model!r}")
    view = replace(opened.view, interpolation="bicubic")  # as in fine-tuning
    seen = None if config.reinit else count_seen(config.model, images)
    if seen:
        logger.warning(
            "%d of the %d images measured are among those that %s was trained on, so the accuracy says little about "
            "new images; results.json of the run has the accuracy on images that were held out",
            seen,
            len(images),
            config.model,
        )
    with Meter(console, "images", len(images)) as meter:
        options = stream_options(config, opened, images)
        scores = score_classifier(opened.network, images, view, opened.channels, show=meter.show, **options)
    found = {**summarise([scores]), "test_images": int(scores.confusion.sum()), "crop_pct": view.crop_pct}
    return found if seen is None else {**found, "images_trained_on": seen}


MEASURES: dict[str, Callable[[Any, OpenModel, Console, Memo], Results]] = {
    "knn": _measure_knn,
    "linear": _measure_linear,
    "attentive": _measure_attentive,
    "classify": _measure_classifier,
}


def _pooled_features(
    config: KNNConfig | LinearConfig, opened: OpenModel, console: Console, memo: Memo
) -> tuple[Features, Features]:
    """Return the features of the training and the test images, ``(n, D)``, from the memo if they are there."""
    key = (config.features, *(getattr(config, name) for name in InferenceKeys.model_fields))
    if key not in memo:
        memo[key] = _extract(config.features, config, opened, console)
    return memo[key]


def _extract(
    features: str, config: InferenceKeys, opened: OpenModel, console: Console, folder: Path | None = None
) -> tuple[Features, Features]:
    """Compute the features of the training and the test images; with a folder they are stored in it."""

    def network(images: Tensor) -> Tensor:
        return read_tokens(opened.network, images).choose(features)

    found = []
    for part, images in zip(("training", "test"), open_labelled(config.data, config.seed), strict=True):
        options = {**stream_options(config, opened, images), "file": folder / part if folder else None}
        with Meter(console, f"features of {part} images", len(images)) as meter:
            found.append(extract_features(network, images, opened.view, opened.channels, show=meter.show, **options))
    return found[0], found[1]


def _train_probe(
    fit: Fit,
    config: LinearConfig | AttentiveConfig,
    train: Features,
    test: Features,
    opened: OpenModel,
    console: Console,
    most_passes: int | None = None,
) -> Results:
    """Evaluate a probe with each seed."""
    settings, probes, runs = grid(config.lr, config.weight_decay), [], []
    for number in range(config.seeds):
        training = Training(config.seed + number, opened.device, config.steps, config.probe_batch, most_passes)
        what = f"probe, seed {number + 1} of {config.seeds} (choose a setting, then train with it)"
        with Meter(console, what, 2 * training.steps_for(len(train))) as meter:
            probe = evaluate_probe(fit, train, test, settings, replace(training, show=meter.show))
        probes.append(probe)
        runs.append(
            {
                "seed": training.seed,
                "accuracy": probe.scores.accuracy,
                **asdict(probe.setting),
                "held_out": probe.held_out[probe.setting],
            }
        )
    sweep = [
        {**asdict(setting), "held_out": statistics.mean(probe.held_out[setting] for probe in probes)}
        for setting in settings
    ]
    return {**_summarise_probe([probe.scores for probe in probes], train, test), "runs": runs, "sweep": sweep}


def _summarise_probe(scores: Sequence[Scores], train: Features, test: Features) -> Results:
    return {**summarise(scores), "train_images": len(train), "test_images": len(test)}

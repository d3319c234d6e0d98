"""The evaluations of a model: k-NN, linear probe, attentive probe, its own classifier."""

import logging
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from mapet.config.base import read_recipe, settle
from mapet.config.keys import InferenceKeys
from mapet.data.open import labels_to_use, open_labelled, open_test
from mapet.data.sources import ImageSet
from mapet.engine.files import claimed_folder, replace_folder
from mapet.engine.runfolder import check_out, run_of
from mapet.errors import MapetError
from mapet.inference.models import OpenModel, open_on_device
from mapet.inference.streaming import stream_options
from mapet.inference.tokens import read_tokens
from mapet.jobs.evaluate.config import EVALUATIONS, AttentiveConfig, ClassifyConfig, KNNConfig, LinearConfig
from mapet.jobs.evaluate.results import write_results
from mapet.probes.fits import fit_attentive, fit_linear
from mapet.probes.heads import Fit, Training, default_steps, evaluate_probe, grid
from mapet.probes.knn import evaluate_knn
from mapet.probes.labelled import Features, extract_features, score_classifier, summarise
from mapet.report.progress import Meter

logger = logging.getLogger(__name__)

Results = dict[str, Any]
Parts = tuple[Features, Features]  # training and test images


def evaluate(
    kind: str, values: Mapping[str, Any], out: str | Path | None = None, *, console: Console | None = None
) -> Results:
    """Measure a model on labelled images.

    Args:
        kind: a name in ``EVALUATIONS``.
        values: keys of the configuration; ``model`` and ``data`` are required.
        out: a new folder for ``results.json``, ``results.md`` and ``confusion.csv``; None: nothing is written.
        console: shows the progress; None: standard error.

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
        results = {
            "kind": kind,
            **{key: getattr(config, key) for key in ("model", "data", "reinit", "seed")},
            "image_size": list(opened.view.size),
            **MEASURES[kind](config, opened, console or Console(stderr=True)),
        }
        if out is not None:
            replace_folder(Path(out), partial(write_results, results))
    return results


def _measure_knn(config: KNNConfig, opened: OpenModel, console: Console) -> Results:
    train, test = _extract(config.features, config, opened, console)
    scores, k, sweep = evaluate_knn(train, test, config.k, config.temperature, config.seed)
    return {
        **summarise([scores]),
        "train_images": len(train),
        "test_images": len(test),
        "features": config.features,
        "k": k,
        "temperature": config.temperature,
        "sweep": sweep,
    }


def _measure_linear(config: LinearConfig, opened: OpenModel, console: Console) -> Results:
    parts = _extract(config.features, config, opened, console)
    return {"features": config.features, **_train_probe(fit_linear, config, parts, opened, console)}


def _measure_attentive(config: AttentiveConfig, opened: OpenModel, console: Console) -> Results:
    with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
        parts = _extract("patches", config, opened, console, Path(folder))
        return _train_probe(fit_attentive, config, parts, opened, console)


def _measure_classifier(config: ClassifyConfig, opened: OpenModel, console: Console) -> Results:
    images = open_test(config.data, opened.require_classes(), f"model {config.model!r}")
    view = replace(opened.view, interpolation="bicubic")  # as in fine-tuning
    seen = None if config.reinit else _count_seen(config.model, images)
    if seen:
        logger.warning(
            f"{seen} of the {len(images)} images measured are among those that {config.model} was trained on, so the "
            "accuracy says little about new images; results.json of the run has the accuracy on images that were held "
            "out"
        )
    with Meter(console, "images", len(images)) as meter:
        options = stream_options(config, opened, images)
        scores = score_classifier(opened.network, images, view, opened.reading, show=meter.show, **options)
    found = {**summarise([scores]), "test_images": int(scores.confusion.sum()), "crop_pct": view.crop_pct}
    return found if seen is None else {**found, "images_trained_on": seen}


MEASURES: dict[str, Callable[[Any, OpenModel, Console], Results]] = {
    "knn": _measure_knn,
    "linear": _measure_linear,
    "attentive": _measure_attentive,
    "classify": _measure_classifier,
}


def _extract(
    features: str, config: InferenceKeys, opened: OpenModel, console: Console, folder: Path | None = None
) -> Parts:
    """Compute the features of the training and the test images; with a folder they are stored in it."""

    def network(images: Tensor) -> Tensor:
        return read_tokens(opened.network, images).choose(features)

    found = []
    for part, images in zip(("training", "test"), open_labelled(config.data, config.seed), strict=True):
        options = {**stream_options(config, opened, images), "file": folder / part if folder else None}
        with Meter(console, f"features of {part} images", len(images)) as meter:
            found.append(extract_features(network, images, opened.view, opened.reading, show=meter.show, **options))
    return found[0], found[1]


def _train_probe(
    fit: Fit, config: LinearConfig | AttentiveConfig, parts: Parts, opened: OpenModel, console: Console
) -> Results:
    """Evaluate a probe with each seed."""
    settings, probes, runs = grid(config.lr, config.weight_decay), [], []
    train, test = parts
    steps = config.steps or default_steps(len(train), config.probe_batch, config.most_passes)
    for number in range(config.seeds):
        what = f"probe, seed {number + 1} of {config.seeds} (choose a setting, then train with it)"
        with Meter(console, what, 2 * steps) as meter:
            training = Training(config.seed + number, opened.device, steps, config.probe_batch, meter.show)
            probe = evaluate_probe(fit, train, test, settings, training)
        probes.append(probe)
        run = {"seed": training.seed, "accuracy": probe.scores.accuracy, **asdict(probe.setting)}
        runs.append({**run, "held_out": probe.held_out[probe.setting]})
    held_out = [statistics.mean(probe.held_out[setting] for probe in probes) for setting in settings]
    return {
        **summarise([probe.scores for probe in probes]),
        "train_images": len(train),
        "test_images": len(test),
        "runs": runs,
        "sweep": [{**asdict(setting), "held_out": held} for setting, held in zip(settings, held_out, strict=True)],
    }


def _count_seen(model: str, images: ImageSet) -> int | None:
    """Count the files of ``images`` that a fine-tuned run was trained on; None if that cannot be determined.

    Args:
        model: see ``engine.runfolder.run_of``.
        images: the evaluated images.
    """
    run = run_of(model)
    if run is None:
        return None
    try:
        config = read_recipe(run.config)
        choice = config["label_share"], config["labels_per_class"], config["seed"]
        seen = labels_to_use(open_labelled(config["data"], config["seed"])[0], *choice)
    except (MapetError, KeyError, TypeError):  # a run of another command, a changed config, or missing images
        return None
    return len(_files(images) & _files(seen))


def _files(images: ImageSet) -> set[Path]:
    """Return the real paths of the image files; two names of one folder give the same paths."""
    real = cache(Path.resolve)
    paths = (images.path(index) for index in range(len(images)))
    return {real(path.parent) / path.name for path in paths if path is not None}

"""A trained model applied to images: their features or their classes, in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mapet import __version__
from mapet.config.base import make_config
from mapet.config.keys import InferenceKeys
from mapet.data.batches import DamageTally
from mapet.data.open import open_images
from mapet.data.sources import ImageSet
from mapet.engine.files import new_file
from mapet.engine.processes import count_workers, one_device
from mapet.engine.runfolder import explain_disk_errors
from mapet.errors import MapetError
from mapet.inference.models import OpenModel, open_model
from mapet.inference.streaming import stream
from mapet.inference.tokens import Tokens, read_tokens
from mapet.jobs.infer.config import EmbedConfig, PredictConfig
from mapet.jobs.infer.tables import TABLES, Columns, CSVRows, Rows, check_table
from mapet.report.progress import Meter

Output = TypeVar("Output")


@dataclass(frozen=True)
class InferenceResult:
    """What came of a pass: images written, images left out because they are damaged, seconds it took."""

    images: int
    damaged: int
    seconds: float

    def describe(self) -> str:
        """Put it into words."""
        left_out = f", {self.damaged} damaged left out" if self.damaged else ""
        return f"{self.images} images{left_out} in {self.seconds:.1f} s ({self.images / self.seconds:.0f} images/s)"


def embed_images(values: Mapping[str, Any], out: str | Path, *, console: Console | None = None) -> InferenceResult:
    """Write features of images to a Parquet file, in the images' order.

    The columns are ``key`` (the image's path relative to the data) and one for each kind of feature, a
    ``fixed_size_list`` of ``D`` numbers, of ``P * D`` for patches (in raster order). The schema's metadata say under
    ``mapet``, as JSON, what made them.

    Args:
        values: configuration by key, see ``EmbedConfig``; ``model`` and ``data`` are needed.
        out: a file that is not there yet.
        console: where progress is shown; None for standard error.

    Raises:
        MapetError: for input that cannot work; nothing is left under ``out``.
    """
    config = make_config(EmbedConfig, dict(values))
    device = one_device(config.precision)
    with _new_table(out, (".parquet",)) as open_rows:
        images, opened = open_images(config.data), _open(config, device, classifier=False)
        read = partial(read_tokens, opened.network)
        with torch.no_grad():
            # Before the work: are there such features, and of what shape?
            tokens = read(torch.zeros(1, opened.channels, *opened.view.size, device=device))
            _features(config, tokens)
        about = {**_about(config, opened), "features": list(config.features), "grid": list(tokens.grid or ()) or None}
        return _write_rows(
            open_rows(about), config, opened, images, read, partial(_features, config), "embedding", console
        )


def predict_images(
    values: Mapping[str, Any], out: str | Path | TextIO, *, console: Console | None = None
) -> InferenceResult:
    """Write the classes of images to a table, in the images' order.

    The columns are ``key`` (the image's path relative to the data), ``label`` and ``probability``, and of further
    classes ``label_2``, ``probability_2`` and so on.

    Args:
        values: configuration by key, see ``PredictConfig``; ``model`` and ``data`` are needed.
        out: a .csv, .jsonl or .parquet file that is not there yet, or an open text file for CSV.
        console: where progress is shown; None for standard error.

    Raises:
        MapetError: for input that cannot work; nothing is left under ``out``.
    """
    config = make_config(PredictConfig, dict(values))
    device = one_device(config.precision)
    with _new_table(out, TABLES) as open_rows:
        images, opened = open_images(config.data), _open(config, device, classifier=True)
        classes = [encodable(name) for name in opened.require_classes()]
        if config.top > len(classes):
            raise MapetError(
                f"top is {config.top}, but model {config.model!r} has {len(classes)} classes; take {len(classes)} or "
                "less"
            )
        rows, best = open_rows(_about(config, opened)), partial(_best, classes, config.top)
        return _write_rows(rows, config, opened, images, opened.network, best, "predicting", console)


@contextmanager
def _new_table(out: str | Path | TextIO, kinds: Collection[str]) -> Iterator[Callable[[Mapping[str, Any]], Rows]]:
    """Hold a file that is to be made, and give what opens it when it is known what its rows are made by."""
    if not isinstance(out, str | Path):
        yield lambda about: CSVRows(out)
        return
    kind, file = check_table(out, kinds), Path(out)
    with explain_disk_errors(file.parent), new_file(file) as fresh, ExitStack() as opened:
        yield lambda about: opened.enter_context(closing(TABLES[kind](fresh, about)))


def _open(config: InferenceKeys, device: torch.device, *, classifier: bool) -> OpenModel:
    opened = open_model(
        config.model,
        classifier=classifier,
        image_size=config.image_size,
        crop_pct=config.crop_pct,
        reinit=config.reinit,
        seed=config.seed,
    )
    opened.network.to(device)
    return opened


def _about(config: InferenceKeys, opened: OpenModel) -> dict[str, Any]:
    """Say what makes the rows of a file."""
    view = opened.view
    return {
        "version": __version__,
        "model": config.model,
        "weights_sha256": opened.weights_hash,
        "image_size": list(view.size),
        "channels": opened.channels,
        "mean": list(view.mean),
        "std": list(view.std),
        "crop_pct": view.crop_pct,
        "interpolation": view.interpolation,
        "squash": view.squash,
        "precision": config.precision,
    }


def _write_rows(
    rows: Rows,
    config: InferenceKeys,
    opened: OpenModel,
    images: ImageSet,
    network: Callable[[Tensor], Output],
    columns: Callable[[Output], Columns],
    what: str,
    console: Console | None,
) -> InferenceResult:
    """Run a network over all images; write a key and the columns of its output for each that can be read."""
    tally, began, written = DamageTally(images, config.max_damaged), time.monotonic(), 0
    batches = stream(
        network,
        images,
        opened.view,
        opened.channels,
        device=opened.device,
        batch_size=config.batch_size,
        workers=count_workers(config.workers, images, opened.device),
        precision=config.precision,
        tally=tally,
    )
    with Meter(console or Console(stderr=True), what, len(images)) as meter:
        for index, output in batches:
            keys = [encodable(images.keys[i]) for i in index.tolist()]
            rows.write({"key": keys, **_finite(columns(output), keys)})
            written += len(keys)
            meter.show(int(index[-1]) + 1, f"{written / (time.monotonic() - began):.0f} images/s")
    return InferenceResult(written, len(tally.indices), time.monotonic() - began)


def _features(config: EmbedConfig, tokens: Tokens) -> Columns:
    dtype = getattr(torch, config.dtype)
    return {kind: tokens.choose(kind).flatten(1).to(dtype).cpu().numpy() for kind in config.features}


def _best(classes: list[str], top: int, logits: Tensor) -> Columns:
    probabilities, labels = logits.float().softmax(dim=-1).topk(top)
    columns: dict[str, Any] = {}
    for rank in range(top):
        suffix = f"_{rank + 1}" if rank else ""
        columns[f"label{suffix}"] = [classes[label] for label in labels[:, rank].tolist()]
        columns[f"probability{suffix}"] = [round(p, 6) for p in probabilities[:, rank].tolist()]
    return columns


def _finite(columns: Columns, keys: list[str]) -> Columns:
    """Refuse what an overflow in half precision makes of features and probabilities."""
    for name, values in columns.items():
        if not name.startswith("label"):
            finite = np.isfinite(np.asarray(values)).reshape(len(keys), -1).all(axis=1)
            if not finite.all():
                raise MapetError(
                    f"{name!r} of image {keys[int(finite.argmin())]!r} is not finite; take --precision no, and "
                    "--dtype float32 for features"
                )
    return columns


def encodable(text: str) -> str:
    r"""Write as ``\udcff`` what no encoding holds: the bytes of file names that are not valid Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()

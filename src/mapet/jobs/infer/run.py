"""Features or predicted classes of images, written to a file."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from torch import Tensor

from mapet import __version__
from mapet.config.base import settle
from mapet.config.keys import InferenceKeys
from mapet.data.open import open_images
from mapet.errors import MapetError
from mapet.inference.models import OpenModel, open_on_device
from mapet.inference.streaming import check_finite, stream, stream_options
from mapet.inference.tokens import Tokens, read_tokens
from mapet.jobs.infer.config import EmbedConfig, PredictConfig
from mapet.jobs.infer.tables import Columns, WriteTable, new_table
from mapet.report.progress import Meter


@dataclass(frozen=True)
class InferenceResult:
    """Number of images written, number of damaged images left out, and duration in seconds."""

    images: int
    damaged: int
    seconds: float

    def describe(self) -> str:
        """Return the result in words."""
        left_out = f", {self.damaged} damaged left out" if self.damaged else ""
        return f"{self.images} images{left_out} in {self.seconds:.1f} s ({self.images / self.seconds:.0f} images/s)"


def embed_images(values: Mapping[str, Any], out: str | Path, *, console: Console | None = None) -> InferenceResult:
    """Write features of images to a Parquet file, in the order of the images.

    The columns are ``key`` (the path of the image relative to the data) and one for each kind of feature: a
    ``fixed_size_list`` of ``D`` numbers, or of ``P * D`` for patches (in raster order). The metadata of the schema
    describe the model and its input as JSON, under ``mapet``.

    Args:
        values: keys of ``EmbedConfig``; ``model`` and ``data`` are required.
        out: a file that does not exist.
        console: shows the progress; None: standard error.

    Raises:
        MapetError: if the input is wrong; no file is left.
    """
    config = settle(EmbedConfig, values)
    with new_table(out, (".parquet",)) as write:
        opened = open_on_device(config, classifier=False)
        read = partial(read_tokens, opened.network)
        with torch.no_grad():
            tokens = read(torch.zeros(1, opened.reading.channels, *opened.view.size, device=opened.device))
        for kind in config.features:
            tokens.choose(kind)  # refuses features that the network does not have, before the work
        about = {"features": list(config.features), "grid": list(tokens.grid or ()) or None}

        def features(tokens: Tokens, keys: list[str]) -> Columns:
            columns: dict[str, Any] = {}
            for kind in config.features:
                values = tokens.choose(kind).flatten(1).to(getattr(torch, config.dtype))
                check_finite(values, keys, f"the {kind} feature")
                columns[kind] = values.cpu().numpy()
            return columns

        return _write_rows(write, config, opened, read, features, console, about)


def predict_images(
    values: Mapping[str, Any], out: str | Path | TextIO, *, console: Console | None = None
) -> InferenceResult:
    """Write the predicted classes of images to a table, in the order of the images.

    The columns are ``key`` (the path of the image relative to the data), ``label`` and ``probability`` of the most
    probable class, then ``label_2``, ``probability_2`` and so on for further classes.

    Args:
        values: keys of ``PredictConfig``; ``model`` and ``data`` are required.
        out: a .csv, .jsonl or .parquet file that does not exist, or an open text file for CSV.
        console: shows the progress; None: standard error.

    Raises:
        MapetError: if the input is wrong; no file is left.
    """
    config = settle(PredictConfig, values)
    with new_table(out) as write:
        opened = open_on_device(config, classifier=True)
        classes = [encodable(name) for name in opened.require_classes()]
        if config.top > len(classes):
            raise MapetError(
                f"top is {config.top}, but model {config.model!r} has {len(classes)} classes; pass --top "
                f"{len(classes)} or less"
            )

        def predictions(logits: Tensor, keys: list[str]) -> Columns:
            probabilities, labels = logits.float().softmax(dim=-1).topk(config.top)
            check_finite(probabilities, keys, "the probability")
            columns: dict[str, Any] = {}
            for rank in range(config.top):
                suffix = f"_{rank + 1}" if rank else ""
                columns[f"label{suffix}"] = [encodable(classes[label]) for label in labels[:, rank].tolist()]
                columns[f"probability{suffix}"] = [round(p, 6) for p in probabilities[:, rank].tolist()]
            return columns

        return _write_rows(write, config, opened, opened.network, predictions, console)


def _write_rows(
    write: WriteTable,
    config: InferenceKeys,
    opened: OpenModel,
    network: Callable[[Tensor], Any],
    columns: Callable[[Any, list[str]], Columns],
    console: Console | None,
    about: Mapping[str, Any] | None = None,
) -> InferenceResult:
    """Run a network over all images, and write the key of each image and the columns of its output."""
    images, view, began, written = open_images(config.data), opened.view, time.monotonic(), 0
    options = stream_options(config, opened, images)

    def batches() -> Iterator[Columns]:
        nonlocal written
        for indices, output in stream(network, images, view, opened.reading, **options):
            keys = [encodable(images.key(index)) for index in indices.tolist()]
            yield {"key": keys, **columns(output, keys)}
            written += len(keys)
            meter.show(int(indices[-1]) + 1, f"{written / (time.monotonic() - began):.0f} images/s")

    made_by = {
        "version": __version__,
        "model": config.model,
        "weights_sha256": opened.weights_hash,
        "image_size": list(view.size),
        "channels": opened.reading.channels,
        "value_range": opened.reading.value_range,
        **{key: getattr(view, key) for key in ("mean", "std", "crop_pct", "interpolation", "squash")},
        "precision": config.precision,
        **(about or {}),
    }
    with Meter(console or Console(stderr=True), "images", len(images)) as meter:
        write(batches(), made_by)
    return InferenceResult(written, len(options["tally"].indices), time.monotonic() - began)


def encodable(text: str) -> str:
    r"""Escape bytes of names that are not valid Unicode (``\udcff``), and carriage returns, which end CSV rows."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\r", r"\r")

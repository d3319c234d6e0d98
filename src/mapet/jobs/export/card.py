"""The model card of an export, which the Hugging Face hub shows: written from the record of the run."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from mapet import __version__
from mapet.engine.lineage import AVERAGED, LAST_RECORDS, RunRecord, read_run, strip_paths
from mapet.inference.models import OpenModel
from mapet.jobs.export.config import TimmExportConfig

TEMPLATE = Path(__file__).with_name("card.md")


def model_card(opened: OpenModel, config: TimmExportConfig, name: str) -> str:
    """Return a model card, Markdown with YAML front matter.

    Args:
        opened: the model.
        config: of the export. The record of the model's run is shown unless its weights are random.
        name: of the exported folder.
    """
    run = None if config.reinit else read_run(config.model)
    runs = [] if run is None else list(_with_origins(run))
    task = "image-classification" if opened.classes else "image-feature-extraction"
    tags = ["timm", task, *(["mapet"] if run else [])]
    card = ModelCard.from_template(
        ModelCardData(license=config.license, library_name="timm", pipeline_tag=task, tags=tags),
        template_path=str(TEMPLATE),
        name=name,
        facts=[
            *_model_facts(opened, "random parameters" if config.reinit else "parameters"),
            *(_run_facts(run, runs) if run else [("exported from", strip_paths(opened.name))]),
            ("exported by", f"mapet {__version__}, torch {torch.__version__}, timm {timm.__version__}"),
        ],
        opened=opened,
        runs=runs,
        results=run and run.results,
        to_yaml=_to_yaml,
    )
    return f"{card}\n"


def _model_facts(opened: OpenModel, parameters: str) -> Iterator[tuple[str, str]]:
    network: Any = opened.network
    count = sum(parameter.numel() for parameter in network.parameters())
    yield "network", f"{network.pretrained_cfg['architecture']} with {count:,} {parameters}"
    (rows, columns), channels = opened.view.size, opened.reading.channels
    colour = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (opened.view.mean, opened.view.std))
    yield "input", f"{rows} x {columns} pixels, {colour}; mean {mean}, std {std}"
    if opened.reading.value_range is not None:
        low, high = opened.reading.value_range
        yield "images with more than 8 bits", f"values from {low:g} to {high:g} become 0 to 1"
    if opened.classes:
        more = ", ..." if len(opened.classes) > 20 else ""
        yield "output", f"logits of {len(opened.classes)} classes: {', '.join(opened.classes[:20])}{more}"
    else:
        yield "output", f"{getattr(network, 'head_hidden_size', network.num_features)} features"


def _with_origins(run: RunRecord) -> Iterator[Mapping[str, Any]]:
    """Yield the record of a run, then those of the runs that its weights come from, the latest first."""
    record: Mapping[str, Any] = asdict(run)
    while record:
        yield record
        record = record["origin"]


def _run_facts(run: RunRecord, runs: list[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for record in runs:
        yield f"before that, {record['run']}" if "run" in record else "trained on", _describe(record)
    for key, value in run.metrics.items():
        averaged = f", mean of the last {LAST_RECORDS} logged steps" if key in AVERAGED else ""
        yield f"{key}{averaged}", f"{value:.4g}"
    if run.baseline.get("entropy") is not None:
        yield "loss without looking at the image", f"{run.baseline['entropy']:.4g}"
    if "metric" in run.baseline:
        yield f"{run.baseline['metric']} without looking at the image", f"{run.baseline['level']:.4g}"


def _describe(record: Mapping[str, Any]) -> str:
    """Return the images, the method and the length of a run in words."""
    config, images, last = record["config"], record["images"], record["last"]
    parts = [str(config.get("data", "unknown images"))]
    if images is not None:
        parts.append(f"{images:,} images")
    parts += [f"{key} {config[key]}" for key in ("objective", "tokenizer") if config.get(key) is not None]
    if last:
        parts.append(f"{last['step'] + 1:,} steps")
    if last.get("epoch") is not None:
        parts.append(f"{last['epoch']:.4g} epochs")
    return ", ".join(parts)


def _to_yaml(values: Mapping[str, Any]) -> str:
    given = {key: value for key, value in values.items() if value is not None}
    return yaml.safe_dump(given, sort_keys=False).strip()

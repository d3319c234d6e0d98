"""The model card of an export: what the Hugging Face hub shows, written from what the run says of itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from mapet import __version__
from mapet.config.base import read_recipe
from mapet.engine.checkpoint import read_state
from mapet.engine.runfolder import RunFolder, run_of
from mapet.errors import MapetError
from mapet.inference.models import OpenModel
from mapet.jobs.export.inputs import output_name

logger = logging.getLogger(__name__)

# Of a record of metrics.jsonl: how the run went, not what came of it.
BOOKKEEPING = frozenset({"step", "epoch", "images", "lr", "grad_norm", "images_per_s", "data_wait", "damaged"})
LAST_RECORDS = 100
AVERAGED = {
    key: f"{key}, mean of the last {LAST_RECORDS} logged steps"
    for key in ("loss", "accuracy", "cross_entropy", "alignment")
}
BLIND = {"unigram_entropy": "loss without looking at the image", "chance": "accuracy without looking at the image"}
CITATION = """@article{baraldi2025mapet,
  title   = {Learning to Mask and Permute Visual Tokens for Vision Transformer Pre-Training},
  author  = {Baraldi, Lorenzo and Amoroso, Roberto and Cornia, Marcella and Baraldi, Lorenzo and Pilzer, Andrea and
             Cucchiara, Rita},
  journal = {Computer Vision and Image Understanding},
  year    = {2025},
  doi     = {10.1016/j.cviu.2025.104294},
  note    = {arXiv:2306.07346}
}"""


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says of its run, whatever was trained; places on somebody's disk are left out.

    Attributes:
        config: the resolved configuration.
        images: size of the data set; None where no checkpoint says it.
        last: the last record of metrics.jsonl; empty without one.
        metrics: loss, its parts and accuracy averaged over the last 100 records, others as they were last.
        baseline: what can be had without looking at the images; empty if not measured.
        results: of an evaluation; empty if there was none.
        origin: of the run that this one began with, the same, and its name as ``run``; empty if it began with none.
    """

    config: Mapping[str, Any]
    images: int | None
    last: Mapping[str, Any]
    metrics: Mapping[str, float]
    baseline: Mapping[str, Any]
    results: Mapping[str, Any]
    origin: Mapping[str, Any]


def read_run(source: str | Path) -> RunRecord | None:
    """Read what a run says of itself; None if ``source`` is not a run folder.

    Raises:
        MapetError: if its configuration cannot be read.
    """
    folder = RunFolder(source)
    if not folder.config.is_file():
        return None
    try:
        images = read_state(folder.checkpoint).made_from.images
    except MapetError:  # the checkpoint may have been removed to save space
        images = None
    records = list(folder.metric_lines())
    return RunRecord(
        _without_places(read_recipe(folder.config)),
        images,
        records[-1] if records else {},
        _last_metrics(records),
        _read_mapping(folder.baseline),
        _without_places(_read_mapping(folder.results)),
        _read_mapping(folder.origin),
    )


def read_origin(model: str | Path) -> dict[str, Any] | None:
    """Return what a model's run says of itself, JSON-able, to be kept by a run that begins with it.

    Args:
        model: see ``engine.run_of``; None is returned if it is of no run.

    Raises:
        MapetError: if its configuration cannot be read.
    """
    run = run_of(model)
    record = None if run is None else read_run(run.root)
    return None if run is None or record is None else {"run": run.root.resolve().name, **asdict(record)}


def model_card(opened: OpenModel, run: RunRecord | None, name: str, license: str, *, untrained: bool = False) -> str:
    """Return a model card, Markdown with YAML front matter.

    Args:
        opened: the model.
        run: that it comes from; None if it was not trained here, or its weights are not the run's.
        name: of the exported folder.
        license: of the weights, as the hub names it.
        untrained: its weights are random.
    """
    task = "image-classification" if opened.classes else "image-feature-extraction"
    data = ModelCardData(
        license=license, library_name="timm", pipeline_tag=task, tags=["timm", task, *(["mapet"] if run else [])]
    )
    parts = [
        f"# {_cell(name)}",
        _summary(opened, run, untrained),
        "\n".join(["| | |", "|---|---|", *(f"| {what} | {_cell(value)} |" for what, value in _facts(opened, run))]),
        f"## Usage\n\n{_fenced('python', _snippet(opened))}",
    ]
    if license == "unknown":
        parts.append("## Licence\n\nNo licence has been chosen. Name one under `license:` at the top of this file.")
    if run is not None:
        parts.append(f"## Configuration\n\n{_fenced('yaml', _yaml(_said(run.config)))}")
        origin = run.origin
        while origin:
            parts.append(
                f"## Configuration of the run {_cell(origin['run'])}, which came before\n\n"
                f"{_fenced('yaml', _yaml(_said(origin['config'])))}"
            )
            origin = origin["origin"]
        if run.results:
            parts.append(f"## Results\n\n{_fenced('yaml', _yaml(run.results))}")
        parts.append(f"## Citation\n\nmapet implements the pre-training of\n\n{_fenced('bibtex', CITATION)}")
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _summary(opened: OpenModel, run: RunRecord | None, untrained: bool) -> str:
    network: Any = opened.network
    architecture = network.pretrained_cfg.get("architecture", type(network).__name__)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    what = f"`{architecture}` with {parameters:,} {'random ' if untrained else ''}parameters"
    if run is None:
        return f"{what}, exported from `{_without_places(opened.name)}`."
    data = _cell(str(run.config.get("data", "images that its configuration does not name")))
    if "objective" in run.config:
        return (
            f"{what}, pre-trained by the objective `{run.config['objective']}` on the images of {data}, without labels."
        )
    return f"{what}, trained on the images of {data}{_after(run.origin)}."


def _after(origin: Mapping[str, Any]) -> str:
    """Say what came before a run."""
    if not origin:
        return ""
    config = origin["config"]
    how = f" by the objective `{config['objective']}`" if "objective" in config else ""
    return f" after `{_cell(origin['run'])}`, which was trained{how} on the images of {_cell(str(config['data']))}"


def _facts(opened: OpenModel, run: RunRecord | None) -> list[tuple[str, str]]:
    view, network = opened.view, opened.network
    rows, columns = view.size
    channels = "grey" if opened.channels == 1 else "RGB"
    facts = [("input", f"{rows} x {columns} pixels, {channels}; mean {_list(view.mean)}, std {_list(view.std)}")]
    if opened.classes:
        shown = ", ".join(opened.classes[:20]) + (", ..." if len(opened.classes) > 20 else "")
        facts.append(("output", f"logits of {len(opened.classes)} classes: {shown}"))
    else:
        facts.append(("output", f"{getattr(network, 'head_hidden_size', network.num_features)} features"))
    if run is not None:
        config = run.config
        images = "" if run.images is None else f", {run.images:,} images"
        facts.append(("trained on", f"{config.get('data', '?')}{images}"))
        facts += [(key, str(config[key])) for key in ("model", "objective", "tokenizer") if config.get(key) is not None]
        if run.last:
            facts.append(("length", _length(run.last)))
        facts += _facts_before(run.origin)
        facts += [(AVERAGED.get(key, key), f"{value:.4g}") for key, value in run.metrics.items()]
        blind = {what: run.baseline.get(key) for key, what in BLIND.items()}
        facts += [(what, f"{value:.4g}") for what, value in blind.items() if isinstance(value, int | float)]
    facts.append(("exported by", f"mapet {__version__}, torch {torch.__version__}, timm {timm.__version__}"))
    return facts


def _facts_before(origin: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what led to the weights that a run began with, the latest first."""
    if not origin:
        return []
    config, images = origin["config"], origin["images"]
    parts = [f"the images of {config['data']}" + ("" if images is None else f" ({images:,})")]
    parts += [f"{key} {config[key]}" for key in ("objective", "tokenizer") if config.get(key) is not None]
    parts += [_length(origin["last"])] if origin["last"] else []
    return [(f"before that, {origin['run']}", ", ".join(parts)), *_facts_before(origin["origin"])]


def _length(last: Mapping[str, Any]) -> str:
    """Say how long a run was by the last record of its metrics."""
    epoch = last.get("epoch")
    return f"{last['step'] + 1:,} steps" + (f", {epoch:.4g} epochs" if isinstance(epoch, int | float) else "")


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _snippet(opened: OpenModel) -> str:
    mode = "L" if opened.channels == 1 else "RGB"
    name = output_name(opened)
    shown = 'print(model.pretrained_cfg["label_names"][logits.argmax()])' if opened.classes else "print(features.shape)"
    return f"""import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()  # this folder; from the hub: "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = transform(Image.open("image.jpg").convert("{mode}"))
with torch.no_grad():
    {name} = model(image[None])
{shown}"""


def _last_metrics(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return what was measured at the end; a single batch's loss and accuracy are noise."""
    last: dict[str, float] = {}
    for record in records:
        last |= {
            key: value for key, value in record.items() if key not in BOOKKEEPING and isinstance(value, int | float)
        }
    for key in AVERAGED.keys() & last.keys():
        values = [record[key] for record in records[-LAST_RECORDS:] if isinstance(record.get(key), int | float)]
        last[key] = sum(values) / len(values) if values else last[key]
    return last


def _read_mapping(file: Path) -> dict[str, Any]:
    """Return a JSON object from a file that need not be there."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("left %s out of the model card: it cannot be read (%s)", file, error)
        return {}
    return found if isinstance(found, dict) else {"results": found}


def _without_places(value: Any) -> Any:
    """Return a value with each path in it cut to its last part: the rest is nobody else's business."""
    if isinstance(value, Mapping):
        return {_without_places(key): _without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(item) for item in value]
    if not isinstance(value, str) or value.startswith("hf-hub:"):
        return value
    if "://" in value:
        address = urlsplit(value)
        return f"{address.scheme}://{address.hostname}{address.path}"  # without passwords and signatures
    parts = PurePosixPath(value.replace("\\", "/")).parts
    # A run's name says more than that of the folder in it.
    return parts[-2] if len(parts) > 1 and parts[-1] == "exported" else parts[-1] if parts else value


def _cell(text: str) -> str:
    """Return text that stays inside a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _list(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False)


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"

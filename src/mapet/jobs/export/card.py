"""The model card of an export, which the Hugging Face hub shows: written from the record of the run."""

from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from mapet import __version__
from mapet.engine.lineage import AVERAGED, LAST_RECORDS, RunRecord, strip_paths
from mapet.inference.models import OpenModel
from mapet.jobs.export.program import output_name

CITATION = """@article{baraldi2025mapet,
  title   = {Learning to Mask and Permute Visual Tokens for Vision Transformer Pre-Training},
  author  = {Baraldi, Lorenzo and Amoroso, Roberto and Cornia, Marcella and Baraldi, Lorenzo and Pilzer, Andrea and
             Cucchiara, Rita},
  journal = {Computer Vision and Image Understanding},
  year    = {2025},
  doi     = {10.1016/j.cviu.2025.104294},
  note    = {arXiv:2306.07346}
}"""


def model_card(opened: OpenModel, run: RunRecord | None, name: str, license: str, *, untrained: bool = False) -> str:
    """Return a model card, Markdown with YAML front matter.

    Args:
        opened: the model.
        run: the record of its run; None if it was not trained here, or its weights are not the run's.
        name: of the exported folder.
        license: of the weights, as the hub names it.
        untrained: whether its weights are random.
    """
    task = "image-classification" if opened.classes else "image-feature-extraction"
    tags = ["timm", task, *(["mapet"] if run else [])]
    data = ModelCardData(license=license, library_name="timm", pipeline_tag=task, tags=tags)
    facts = [
        *_model_facts(opened, untrained),
        *(_run_facts(run) if run else [("exported from", strip_paths(opened.name))]),
    ]
    facts.append(("exported by", f"mapet {__version__}, torch {torch.__version__}, timm {timm.__version__}"))
    sections = [
        f"# {_one_line(name)}",
        "\n".join(f"- {what}: {_one_line(value)}" for what, value in facts),
        f"## Usage\n\n{_fenced('python', _snippet(opened))}",
    ]
    if license == "unknown":
        sections.append("## Licence\n\nNo licence has been chosen. Name one under `license:` at the top of this file.")
    if run is not None:
        sections.append(f"## Configuration\n\n{_yaml(run.config)}")
        for origin in _origins(run.origin):
            sections.append(
                f"## Configuration of the run before, {_one_line(origin['run'])}\n\n{_yaml(origin['config'])}"
            )
        if run.results:
            sections.append(f"## Results\n\n{_yaml(run.results)}")
        sections.append(f"## Citation\n\nmapet implements the pre-training of\n\n{_fenced('bibtex', CITATION)}")
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _model_facts(opened: OpenModel, untrained: bool) -> Iterator[tuple[str, str]]:
    network: Any = opened.network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    architecture = network.pretrained_cfg.get("architecture", type(network).__name__)
    yield "network", f"{architecture} with {parameters:,} {'random ' if untrained else ''}parameters"
    (rows, columns), colour = opened.view.size, "grey" if opened.channels == 1 else "RGB"
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (opened.view.mean, opened.view.std))
    yield "input", f"{rows} x {columns} pixels, {colour}; mean {mean}, std {std}"
    if opened.classes:
        more = ", ..." if len(opened.classes) > 20 else ""
        yield "output", f"logits of {len(opened.classes)} classes: {', '.join(opened.classes[:20])}{more}"
    else:
        yield "output", f"{getattr(network, 'head_hidden_size', network.num_features)} features"


def _run_facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    yield "trained on", _training_data(run.config, run.images)
    for key in ("model", "objective", "tokenizer"):
        if run.config.get(key) is not None:
            yield key, str(run.config[key])
    if run.last:
        yield "length", _length(run.last)
    for origin in _origins(run.origin):
        yield f"before that, {origin['run']}", _describe_origin(origin)
    for key, value in run.metrics.items():
        averaged = f", mean of the last {LAST_RECORDS} logged steps" if key in AVERAGED else ""
        yield f"{key}{averaged}", f"{value:.4g}"
    if run.baseline.get("entropy") is not None:
        yield "loss without looking at the image", f"{run.baseline['entropy']:.4g}"
    if "metric" in run.baseline:
        yield f"{run.baseline['metric']} without looking at the image", f"{run.baseline['level']:.4g}"


def _origins(origin: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the records of the runs that a run's weights come from, the latest first."""
    while origin:
        yield origin
        origin = origin["origin"]


def _describe_origin(origin: Mapping[str, Any]) -> str:
    config = origin["config"]
    parts = [_training_data(config, origin["images"])]
    parts += [f"{key} {config[key]}" for key in ("objective", "tokenizer") if config.get(key) is not None]
    parts += [_length(origin["last"])] if origin["last"] else []
    return ", ".join(parts)


def _training_data(config: Mapping[str, Any], images: int | None) -> str:
    return f"{config.get('data', 'unknown images')}" + ("" if images is None else f", {images:,} images")


def _length(last: Mapping[str, Any]) -> str:
    """Return the length of a run by the last record of its metrics."""
    epochs = "" if last.get("epoch") is None else f", {last['epoch']:.4g} epochs"
    return f"{last['step'] + 1:,} steps{epochs}"


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


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _yaml(values: Mapping[str, Any]) -> str:
    given = {key: value for key, value in values.items() if value is not None}
    return _fenced("yaml", yaml.safe_dump(given, sort_keys=False))


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"

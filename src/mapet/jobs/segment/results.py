"""Metrics of a segmentation, and its results as a table, files and a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor, nn

from mapet.jobs.segment.data import IGNORED
from mapet.report.figures import as_picture, class_colours, save_figure
from mapet.report.tables import Table, percent

Example = tuple[Tensor, Tensor, Tensor]  # image (C, H, W) in [0, 1], true and predicted class ids (H, W)


class Confusion:
    """Counts of pixels by true and predicted class, and the metrics that follow from them.

    Attributes:
        counts: ``(K, K)`` int64; rows are true classes.
    """

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.long)

    def add(self, truth: Tensor, prediction: Tensor) -> None:
        """Count the pixels of an image that have a class; both arguments are ``(H, W)`` int64."""
        known, classes = truth != IGNORED, len(self.counts)
        pairs = truth[known] * classes + prediction[known]
        self.counts += torch.bincount(pairs, minlength=classes**2).unflatten(0, (classes, classes))

    @property
    def pixel_accuracy(self) -> float:
        """Share in 0..1 of the pixels whose class is predicted."""
        return float(self.counts.diagonal().sum() / self.counts.sum())

    @property
    def iou_per_class(self) -> list[float | None]:
        """Intersection over union of each class in 0..1; None for a class that is neither true nor predicted."""
        intersections = self.counts.diagonal()
        unions = self.counts.sum(0) + self.counts.sum(1) - intersections
        return [float(i) / float(u) if u else None for i, u in zip(intersections, unions, strict=True)]

    @property
    def miou(self) -> float:
        """Mean of the intersections over unions, without the classes where it is None."""
        known = [value for value in self.iou_per_class if value is not None]
        return sum(known) / len(known)


def segmentation_table(result: Mapping[str, Any]) -> Table:
    """Return mIoU and pixel accuracy from the results of ``segment``, beside the trivial prediction."""
    heads = len(result["runs"])
    name = "1 head" if heads == 1 else f"mean of {heads} heads"
    means = [_with_spread(result[key], result[f"{key}_std"]) for key in ("miou", "pixel_accuracy")]
    trivial = [percent(result[key]) for key in ("majority_miou", "majority_accuracy")]
    weights = "random weights of " if result["reinit"] else ""
    return Table(
        ("", "mIoU", "pixel accuracy"),
        [(name, *means), ("most frequent class everywhere", *trivial)],
        title=f"{result['head']} head on {weights}{result['model']}, {result['data']}",
    )


def _with_spread(mean: float, spread: float | None) -> str:
    return percent(mean) if spread is None else f"{100 * mean:.1f} ± {percent(spread)}"


def write_results(result: dict[str, Any], head: nn.Module, examples: Sequence[Example], folder: Path) -> None:
    """Write ``results.json``, ``results.md``, ``head.safetensors`` and ``predictions.png`` into a folder."""
    (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "results.md").write_text(_markdown(result))
    tensors = {key: value.contiguous().cpu() for key, value in head.state_dict().items()}
    metadata = {key: str(result[key]) for key in ("head", "model", "classes", "image_size")}
    save_file(tensors, folder / "head.safetensors", metadata=metadata)
    _plot(examples, result["classes"], folder / "predictions.png")


def _markdown(result: Mapping[str, Any]) -> str:
    """Return the means, the settings, and the metric of each class."""
    first_value = 1 if result["reduce_zero_label"] else 0
    per_class = [(str(value), percent(iou)) for value, iou in enumerate(result["iou_per_class"], first_value)]
    class_table = Table(("value in masks", "IoU"), per_class, "Classes (-: neither in a test mask nor predicted)")
    settings = (
        f"{result['train_images']} training and {result['test_images']} test images, {result['classes']} classes; "
        f"{result['steps']} steps of {result['batch_size']} crops of {' x '.join(map(str, result['image_size']))} "
        f"pixels; mode {result['mode']}; {result['images_per_second']:.1f} test images a second.\n"
    )
    return "\n".join([segmentation_table(result).to_markdown(), settings, class_table.to_markdown()])


def _plot(examples: Sequence[Example], classes: int, path: Path) -> None:
    """Draw images above their true and their predicted classes, one colour per class; no class is black."""
    figure = Figure(figsize=(2.2 * len(examples), 6.4), layout="constrained")
    panels = figure.subplots(3, len(examples), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    colours = class_colours(classes).with_extremes(under="black")
    for column, (image, *maps) in enumerate(examples):
        panels[0][column].imshow(as_picture(image).numpy(), cmap="gray", vmin=0, vmax=1)
        for panel, ids in zip(panels[1:, column], maps, strict=True):
            panel.imshow(ids.numpy(), cmap=colours, vmin=-0.5, vmax=classes - 0.5, interpolation="nearest")
    for panel, name in zip(panels[:, 0], ("image", "truth", "prediction"), strict=True):
        panel.set_ylabel(name)
    save_figure(figure, path)

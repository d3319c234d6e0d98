"""What a person looks at of a segmentation: a table, a page of Markdown, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from mapet.report.figures import class_colours, save_figure


def segmentation_table(result: Mapping[str, Any]) -> Table:
    """Put the results of ``evaluate_segmentation`` into a table for the terminal."""
    table = Table(title=_title(result))
    table.add_column("")
    for name in ("mIoU", "pixel accuracy"):
        table.add_column(name, justify="right")
    for cells in _rows(result):
        table.add_row(*cells)
    return table


def segmentation_markdown(result: Mapping[str, Any]) -> str:
    """Put the results of ``evaluate_segmentation`` into Markdown: the figures, then those of each class."""
    lines = [f"# {_title(result)}", "", "| | mIoU | pixel accuracy |", "|---|---|---|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in _rows(result)]
    first = 1 if result["reduce_zero_label"] else 0
    lines += [
        "",
        f"{result['train_images']} training and {result['test_images']} test images, {result['classes']} classes; "
        f"{result['steps']} steps of {result['batch_size']} crops of "
        f"{result['image_size'][0]} x {result['image_size'][1]} pixels; mode {result['mode']}; "
        f"{result['images_per_second']:.1f} test images a second.",
        "",
        "| value in masks | IoU |",
        "|---|---|",
    ]
    lines += [
        f"| {number} | {'in no test image, nor predicted' if iou is None else f'{100 * iou:.1f}'} |"
        for number, iou in enumerate(result["iou_per_class"], first)
    ]
    return "\n".join(lines) + "\n"


def _title(result: Mapping[str, Any]) -> str:
    weights = "random weights of " if result["reinit"] else ""
    return f"{result['head']} head on {weights}{result['model']}, {result['data']}"


def _rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    count = len(result["runs"])
    whose = "1 head" if count == 1 else f"mean of {count} heads"
    return [
        (whose, *(_percent(result[key], result[f"{key}_std"]) for key in ("miou", "pixel_accuracy"))),
        ("most frequent class everywhere", _percent(result["majority_miou"]), _percent(result["majority_accuracy"])),
    ]


def _percent(value: float, spread: float | None = None) -> str:
    return f"{100 * value:.1f} %" if spread is None else f"{100 * value:.1f} ± {100 * spread:.1f} %"


def plot_segmentation(examples: Sequence[tuple[Tensor, Tensor, Tensor]], classes: int, path: Path) -> None:
    """Draw images above their true and their predicted classes, one colour a class; pixels of no class are black.

    Args:
        examples: ``(C, H, W)`` images in [0, 1] with truth and prediction, ``(H, W)``.
        classes: how many there are.
        path: of the PNG.
    """
    figure = Figure(figsize=(2.2 * len(examples), 6.4), layout="constrained")
    panels = figure.subplots(3, len(examples), squeeze=False)
    colours = class_colours(classes).with_extremes(under="black")
    for column, (image, *maps) in enumerate(examples):
        panels[0][column].imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        for panel, shown in zip(panels[1:, column], maps, strict=True):
            panel.imshow(shown.numpy(), cmap=colours, vmin=-0.5, vmax=classes - 0.5, interpolation="nearest")
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    for panel, name in zip(panels[:, 0], ("image", "truth", "prediction"), strict=True):
        panel.set_ylabel(name)
    save_figure(figure, path)

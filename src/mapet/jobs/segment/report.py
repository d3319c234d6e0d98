"""Results of a segmentation as a table, a page of Markdown and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from mapet.report.figures import class_colours, save_figure
from mapet.report.tables import Table, percent


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


def segmentation_markdown(result: Mapping[str, Any]) -> str:
    """Return the results of ``segment`` as Markdown: the means, the settings, and each class."""
    first_value = 1 if result["reduce_zero_label"] else 0
    per_class = [(str(value), percent(iou)) for value, iou in enumerate(result["iou_per_class"], first_value)]
    class_table = Table(("value in masks", "IoU"), per_class, "Classes (-: neither in a test mask nor predicted)")
    settings = (
        f"{result['train_images']} training and {result['test_images']} test images, {result['classes']} classes; "
        f"{result['steps']} steps of {result['batch_size']} crops of {' x '.join(map(str, result['image_size']))} "
        f"pixels; mode {result['mode']}; {result['images_per_second']:.1f} test images a second.\n"
    )
    return "\n".join([segmentation_table(result).to_markdown(), settings, class_table.to_markdown()])


def plot_segmentation(examples: Sequence[tuple[Tensor, Tensor, Tensor]], classes: int, path: Path) -> None:
    """Draw images above their true and their predicted classes, one colour per class; no class is black.

    Args:
        examples: ``(C, H, W)`` images in [0, 1] with true and predicted class ids, ``(H, W)``.
        classes: number of classes.
        path: of the PNG.
    """
    figure = Figure(figsize=(2.2 * len(examples), 6.4), layout="constrained")
    panels = figure.subplots(3, len(examples), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    colours = class_colours(classes).with_extremes(under="black")
    for column, (image, *maps) in enumerate(examples):
        panels[0][column].imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        for panel, ids in zip(panels[1:, column], maps, strict=True):
            panel.imshow(ids.numpy(), cmap=colours, vmin=-0.5, vmax=classes - 0.5, interpolation="nearest")
    for panel, name in zip(panels[:, 0], ("image", "truth", "prediction"), strict=True):
        panel.set_ylabel(name)
    save_figure(figure, path)

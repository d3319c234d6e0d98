"""Figures of a run, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from mapet.objectives.base import Objective
from mapet.report.progress import Baseline

INK, FAINT, ACCENT, SECOND = "#222222", "#bbbbbb", "#1f6f8b", "#d1662b"
NO_TICKS: dict[str, Any] = {"xticks": [], "yticks": []}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=130, bbox_inches="tight")


def class_colours(count: int) -> ListedColormap:
    """Return a colour for each of ``count`` ids or classes."""
    # Shuffled: neighbouring ids are unrelated, and their colours must differ.
    shuffle = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
    return ListedColormap(colormaps["turbo"](np.linspace(0, 1, count))[shuffle])


def plot_curve(records: Sequence[dict[str, Any]], baseline: Baseline | None, path: Path) -> None:
    """Plot the loss over the steps, and accuracy or cosine beside the baseline where there is one."""
    steps = np.array([record["step"] + 1 for record in records])
    shown: list[tuple[str, str, float | None, str]] = [("loss", "loss", None, "")]
    if baseline is not None and baseline.entropy is not None:
        shown = [
            (baseline.loss_key, "loss (nats per token)", baseline.entropy, "unigram entropy"),
            ("accuracy", "token accuracy", baseline.level, "chance: most frequent id"),
        ]
    elif baseline is not None:
        shown.append((baseline.metric, "cosine to the teacher", baseline.level, "mean direction"))
    figure = Figure(figsize=(4.5 * len(shown), 3.2), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, (key, title, level, label) in zip(panels, shown, strict=True):
        values = np.array([record.get(key) for record in records], dtype=float)
        panel.plot(steps, values, color=FAINT, linewidth=0.8, label="per step")
        window = max(1, len(values) // 50)
        if window > 1:
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            panel.plot(steps[window - 1 :], smooth, color=ACCENT, linewidth=1.8, label=f"mean of {window} steps")
        if level is not None:
            panel.axhline(level, color=SECOND, linestyle="--", linewidth=1.2, label=label)
        panel.set(xlabel="optimiser step", ylabel=title)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_tokens(views: Tensor, ids: Tensor, grid: tuple[int, int], vocab_size: int, path: Path) -> None:
    """Plot images above the maps of their token ids, one colour per id.

    Args:
        views: ``(B, C, H, W)`` in [0, 1].
        ids: ``(B, P)``.
        grid: rows and columns of patches.
        vocab_size: ``V``.
        path: PNG file to write.
    """
    figure = Figure(figsize=(1.6 * len(views), 3.6), layout="constrained")
    panels = figure.subplots(2, len(views), squeeze=False, subplot_kw=NO_TICKS)
    colours = class_colours(vocab_size)
    for above, below, view, row in zip(*panels, views, ids, strict=True):
        above.imshow(as_picture(view).numpy(), cmap="gray", vmin=0, vmax=1)
        token_map = row.reshape(grid).numpy()
        below.imshow(token_map, cmap=colours, vmin=0, vmax=vocab_size - 1, interpolation="nearest")
        _write_numbers(below, token_map, 8)
    panels[0][0].set_ylabel("images")
    panels[1][0].set_ylabel("token ids")
    save_figure(figure, path)


def as_picture(image: Tensor) -> Tensor:
    """Return a ``(C, H, W)`` image as matplotlib shows it: RGB, or grey, which is the mean of other channels."""
    return image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)


def plot_layout(objective: Objective, path: Path) -> None:
    """Plot a mask: the targets are numbered in their order; other patches are white."""
    mask = objective.draw_mask(1, torch.device("cpu"), torch.Generator().manual_seed(0))
    place = torch.full((objective.patches,), torch.nan)
    place[mask.target[0]] = torch.arange(1.0, objective.targets + 1)
    order = place.reshape(objective.grid).numpy()
    figure = Figure(figsize=(4.75, 5), layout="constrained")
    panel = figure.subplots(subplot_kw=NO_TICKS)
    panel.imshow(order, cmap="viridis", interpolation="nearest")
    _write_numbers(panel, order, 16)
    count = mask.context.shape[1]
    panel.set_title(f"a mask: {count} context patches (white), {objective.targets} targets in order", fontsize=9)
    save_figure(figure, path)


def _write_numbers(panel: Any, numbers: np.ndarray, most: int) -> None:
    """Write each number into its patch, unless a row or column has more than ``most`` patches; NaN is left out."""
    box = {"facecolor": "black", "alpha": 0.45, "linewidth": 0, "pad": 0.8}
    for (row, column), number in np.ndenumerate(numbers):
        if max(numbers.shape) <= most and not np.isnan(number):
            panel.text(column, row, f"{number:.0f}", ha="center", va="center", fontsize=6, color="white", bbox=box)

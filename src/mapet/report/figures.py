"""Figures of a run, as PNG files."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from mapet.objectives.base import Objective
from mapet.objectives.mapet import MaPeT
from mapet.report.progress import Baseline

INK, FAINT, ACCENT, SECOND = "#222222", "#bbbbbb", "#1f6f8b", "#d1662b"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    # The Agg canvas draws without a display and without matplotlib's global state.
    FigureCanvasAgg(figure)
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
        panel.set_xlabel("optimiser step")
        panel.set_ylabel(title)
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
    count = len(views)
    figure = Figure(figsize=(1.6 * count, 3.6), layout="constrained")
    panels = figure.subplots(2, count, squeeze=False)
    colours = class_colours(vocab_size)
    for column in range(count):
        panels[0][column].imshow(views[column].permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        token_map = ids[column].reshape(grid).numpy()
        panels[1][column].imshow(token_map, cmap=colours, vmin=0, vmax=vocab_size - 1, interpolation="nearest")
        if max(grid) <= 8:
            box = {"facecolor": "black", "alpha": 0.45, "linewidth": 0, "pad": 0.8}
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6, "color": "white", "bbox": box}
            for (y, x), token in np.ndenumerate(token_map):
                panels[1][column].text(x, y, str(token), **style)
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    panels[0][0].set_ylabel("images")
    panels[1][0].set_ylabel("token ids")
    save_figure(figure, path)


def plot_layout(objective: Objective, path: Path) -> None:
    """Plot a mask over the patches, and for MaPeT and its variants which tokens attend to which."""
    mask = objective.draw_mask(1, torch.device("cpu"), torch.Generator().manual_seed(0))
    place = torch.full((objective.patches,), torch.nan)  # NaN is drawn white: context, or neither context nor target
    place[mask.target[0]] = torch.arange(1.0, objective.targets + 1)
    panels = 2 if isinstance(objective, MaPeT) else 1
    figure = Figure(figsize=(4.75 * panels, 5), layout="constrained")
    left, *rest = figure.subplots(1, panels, squeeze=False)[0]
    shown = place.reshape(objective.grid).numpy()
    left.imshow(shown, cmap="viridis", interpolation="nearest")
    count = mask.context.shape[1]
    left.set_title(f"a mask: {count} context patches (white), {objective.targets} targets in order", fontsize=9)
    if max(objective.grid) <= 16:
        for (row, column), number in np.ndenumerate(shown):
            text, colour = ("c", INK) if np.isnan(number) else (f"{number:.0f}", "white")
            left.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    left.set_xticks([])
    left.set_yticks([])
    if isinstance(objective, MaPeT):
        _plot_visible(objective, rest[0])
    save_figure(figure, path)


def _plot_visible(objective: MaPeT, panel: Any) -> None:
    visible = objective.visible.cpu().numpy()
    panel.imshow(visible, cmap=ListedColormap(["white", ACCENT]), aspect="auto", interpolation="nearest")
    panel.set_title(f"{type(objective).__name__}: row may attend to key (coloured)", fontsize=9)
    groups = {name: count for name, count in objective.rows.items() if count}
    edges = [0, *accumulate(groups.values())]
    for edge in edges[1:-1]:
        panel.axhline(edge - 0.5, color=INK, linewidth=0.8)
        if edge < visible.shape[1]:
            panel.axvline(edge - 0.5, color=INK, linewidth=0.8)
    middles = {name: (a + b) / 2 for name, (a, b) in zip(groups, pairwise(edges), strict=True)}
    panel.set_yticks(list(middles.values()), list(middles), rotation=90, va="center")
    keys = {name: middle for name, middle in middles.items() if middle < visible.shape[1]}
    panel.set_xticks(list(keys.values()), list(keys))
    panel.set_xlabel("keys")
    panel.set_ylabel("rows")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mapet.objectives.registry import OBJECTIVES, build_objective
from mapet.objectives.targets import Ids
from mapet.report.figures import plot_curve, plot_layout, plot_tokens
from mapet.report.progress import Baseline


def picture(path: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > 150
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    return pixels


@pytest.mark.parametrize("name", OBJECTIVES)
def test_plot_layout(name: str, tiny_vit: Callable[..., Any], tmp_path: Path) -> None:
    plot_layout(build_objective(name, tiny_vit(), Ids(9)), tmp_path / "layout.png")
    picture(tmp_path / "layout.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_token_maps_have_a_colour_per_id(channels: int, tmp_path: Path) -> None:
    views = torch.rand(3, channels, 28, 28)
    same, mixed = torch.zeros(3, 16, dtype=torch.long), torch.arange(48).reshape(3, 16)
    for name, ids in (("same", same), ("mixed", mixed)):
        plot_tokens(views, ids, (4, 4), 48, tmp_path / f"{name}.png")
    colours = [len(np.unique(picture(tmp_path / f"{n}.png").reshape(-1, 3), axis=0)) for n in ("same", "mixed")]
    assert colours[1] > colours[0]


@pytest.mark.parametrize("steps", [1, 2, 300])
def test_plot_curve(steps: int, tmp_path: Path) -> None:
    records = [{"step": step, "loss": 4 / (1 + step), "accuracy": 0.1, "cosine": 0.2} for step in range(steps)]
    widths = []
    for baseline in (None, Baseline("accuracy", 0.2, 3.0), Baseline("cosine", 0.3)):
        plot_curve(records, baseline, tmp_path / "curve.png")
        widths.append(picture(tmp_path / "curve.png").shape[1])
    assert widths[0] < min(widths[1:]), "without a baseline there is only the panel of the loss"

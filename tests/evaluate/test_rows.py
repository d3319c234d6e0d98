from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mapet.data import PlainView, few_per_class, open_labelled
from mapet.evaluate import FinetuneRecipe, finetune_row, probe_evaluator, probe_row

VIEW = PlainView((28, 28), (0.13,), (0.31,))


def test_a_row_of_raw_pixels_and_of_a_network_that_keeps_its_mode(tiny_vit: Callable[..., Any]) -> None:
    parts = [few_per_class(part, count, seed=0) for part, count in zip(open_labelled("mnist"), (500, 200), strict=True)]
    pixels = probe_row(nn.Flatten(), *parts, VIEW, channels=1)
    assert 0.8 < pixels["knn"] < 1
    assert 0.75 < pixels["linear"] < 1
    objective = nn.Module()
    objective.backbone = tiny_vit(channels=1, drop_path=0.5).train()
    evaluator = probe_evaluator(*parts, VIEW, channels=1)
    found, again = dict(evaluator(objective)), dict(evaluator(objective))
    assert found == again, "stochastic depth must be off"
    assert set(found) == {"eval_knn", "eval_linear"}
    assert objective.backbone.training
    assert 0.1 < found["eval_knn"] < pixels["knn"]


def test_fewer_images_than_neighbours() -> None:
    train, test = (few_per_class(part, 6, seed=0) for part in open_labelled("mnist"))
    row = probe_row(nn.Flatten(), train, test, VIEW, channels=1)
    assert all(0 <= accuracy <= 1 for accuracy in row.values())


def test_finetuning_learns_and_leaves_the_backbone_alone(tiny_vit: Callable[..., Any]) -> None:
    train, test = open_labelled("mnist")
    backbone = tiny_vit(channels=1)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    recipe = FinetuneRecipe(steps=150, batch_size=32, lr=3e-3)
    part = few_per_class(test, 200, seed=1)
    row, again = (finetune_row(backbone, train, part, VIEW, recipe, (20, 400), channels=1, seed=0) for _ in range(2))
    assert row == again
    assert row["finetune_400"] > row["finetune_20"] > 0.1
    assert row["finetune_400"] > 0.3
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())

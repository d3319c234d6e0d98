from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mapet.models.export import export_network


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 2}, {"class_token": False}, {"layer_scale": 0.1}])
def test_timm_loads_the_identical_features(
    changes: dict[str, Any], tiny_vit: Callable[..., Any], tmp_path: Path
) -> None:
    backbone = tiny_vit(drop_path=0.3, **changes).eval()
    export_network(backbone, tmp_path, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(3, 3, 28, 28)
    assert torch.equal(loaded(images), backbone(images))
    assert torch.equal(loaded.forward_features(images), backbone.forward_features(images))
    assert loaded.train()(images).equal(loaded.eval()(images)), "stochastic depth must not be exported"
    config = timm.data.resolve_model_data_config(loaded)
    assert (tuple(config["mean"]), tuple(config["std"])) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (config["input_size"], config["interpolation"], config["crop_pct"]) == ((3, 28, 28), "bicubic", 1.0)


def test_a_classifier_keeps_its_classes_and_resizing(tmp_path: Path) -> None:
    network = timm.create_model("dla46_c", num_classes=3).eval()
    settings: dict[str, Any] = {"crop_pct": 0.9, "interpolation": "bilinear", "license": "mit", "tag": "mine"}
    export_network(network, tmp_path, (0.5,) * 3, (0.2,) * 3, classes=("crack", "dent", "whole"), **settings)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), network(images))
    assert loaded.pretrained_cfg["label_names"] == ["crack", "dent", "whole"]
    assert (loaded.pretrained_cfg["license"], loaded.pretrained_cfg["tag"]) == ("mit", "mine")
    config = timm.data.resolve_model_data_config(loaded)
    assert (config["crop_pct"], config["interpolation"]) == (0.9, "bilinear")

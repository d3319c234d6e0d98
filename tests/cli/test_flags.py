from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from mapet.cli.flags import add_config_flags, given_values
from mapet.config.base import make_config
from mapet.jobs.pretrain.config import PretrainConfig


def values(*arguments: str, config: str | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=config)
    add_config_flags(parser, PretrainConfig)
    return given_values(parser.parse_args(arguments), PretrainConfig)


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--lr", "0.1"], "lr", 0.1),
        (["--steps", "5"], "steps", 5),
        (["--precision", "no"], "precision", "no"),
        (["--no-contrast"], "contrast", False),
        (["--spherical"], "spherical", True),
        (["--no-spherical"], "spherical", False),
        (["--layer-scale", "none"], "layer_scale", None),
        (["--model", "1e5"], "model", "1e5"),
        (["--eval-data", "none"], "eval_data", None),
        (["--teacher-stage", "-1"], "teacher_stage", -1),
        (["--teacher-stage", "features.13"], "teacher_stage", "features.13"),
        (["--mean", "0.5", "0.4", "1e-1"], "mean", [0.5, 0.4, 0.1]),
        (["--mean", "0.5,0.4,1e-1"], "mean", [0.5, 0.4, 0.1]),
        (
            ["--model-args", "class_token=false", "depth=4", "proj_drop_rate=1e-1", "pos_embed=learn"],
            "model_args",
            {"class_token": False, "depth": 4, "proj_drop_rate": 0.1, "pos_embed": "learn"},
        ),
    ],
)
def test_flags_mean_what_yaml_means(arguments: list[str], key: str, expected: object) -> None:
    found = values(*arguments)
    assert found == {key: expected}
    assert type(found[key]) is type(expected)
    make_config(PretrainConfig, {"data": "x", "tokenizer": "resnet18", **found})


def test_flags_override_a_recipe_and_its_way_of_saying_how_long(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 50\nlr: 1.0e-4\nmodel_args:\n")
    found = values("--steps", "3", "--model-args", "depth=1", config=str(recipe))
    assert found == {"steps": 3, "lr": 1e-4, "model_args": {"depth": 1}}

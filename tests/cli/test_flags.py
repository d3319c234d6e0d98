from pathlib import Path
from typing import Any

import pytest

from mapet import MapetError
from mapet.cli import load_verb
from mapet.cli.flags import build_parser, given_values
from mapet.config.base import parse
from mapet.jobs.pretrain.config import PretrainConfig


def values_of(*arguments: str) -> dict[str, Any]:
    """Return what ``mapet pretrain`` takes from its flags and its recipe, parsed."""
    parser = build_parser("pretrain", load_verb("pretrain"))
    return parse(PretrainConfig, given_values(parser.parse_args(["--out", "x", *arguments]), PretrainConfig))


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--no-contrast"], "contrast", False),
        (["--layer-scale", "none"], "layer_scale", None),
        (["--teacher-stage", "-1"], "teacher_stage", "-1"),
        (["--mean", "0.5", "0.4", "1e-1"], "mean", (0.5, 0.4, 0.1)),
        (["--mean", "0.5,0.4,1e-1"], "mean", (0.5, 0.4, 0.1)),
        (["--model-args", "depth=4", "a=1e-1", "b=no"], "model_args", {"depth": 4, "a": 0.1, "b": False}),
    ],
)
def test_flags_mean_what_recipes_mean(arguments: list[str], key: str, expected: object) -> None:
    assert values_of(*arguments) == {key: expected}


def test_flags_override_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 50\nlr: 1.0e-4\nmodel_args: {depth: 2, num_heads: 2}\n")
    found = values_of("--config", str(recipe), "--steps", "3", "--model-args", "depth=1")
    assert found == {"steps": 3, "lr": 1e-4, "model_args": {"depth": 1, "num_heads": 2}}


def test_wrong_values_of_a_recipe_are_refused_even_if_a_flag_replaces_them(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for line, says in (("lr: fast", "recipe .*recipe.yaml is wrong: lr = fast"), ("epoch: 3", "did you mean 'epochs")):
        recipe.write_text(f"{line}\n")
        with pytest.raises(MapetError, match=says):
            values_of("--config", str(recipe), "--lr", "0.1", "--epochs", "3")

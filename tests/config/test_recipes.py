from __future__ import annotations

from pathlib import Path

import pytest

from mapet import MapetError
from mapet.config.recipes import find_recipe, load_recipe


def test_a_recipe_stands_on_another(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("base: demo\nepochs: 2\nlr: 0.1\n")
    values, demo = load_recipe(str(tmp_path / "own.yaml")), load_recipe("demo")
    assert "steps" in demo
    assert values == {**{key: value for key, value in demo.items() if key != "steps"}, "epochs": 2, "lr": 0.1}


def test_a_base_is_looked_for_beside_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("base: other.yaml\nlr: 0.1\n")
    (tmp_path / "other.yaml").write_text("lr: 0.2\nseed: 3\n")
    assert load_recipe(str(tmp_path / "own.yaml")) == {"lr": 0.1, "seed": 3}


def test_recipes_in_a_circle_are_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(f"base: {second}\n")
    second.write_text(f"base: {first}\n")
    with pytest.raises(MapetError, match="is its own base"):
        load_recipe(str(first))


def test_recipes_are_found_by_name_and_misspelt_ones_are_not() -> None:
    assert find_recipe("ablations/context").is_file()
    with pytest.raises(MapetError, match="did you mean 'demo'"):
        find_recipe("deno")

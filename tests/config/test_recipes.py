from pathlib import Path

import pytest

from mapet import MapetError
from mapet.config.base import Config, parse
from mapet.config.recipes import RECIPES, find_recipe, load_recipe
from mapet.jobs.finetune.config import FinetuneConfig
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.jobs.tokenizer.config import FitConfig

NAMES = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))
# Recipes of comparisons and of segmentation are tested with their jobs.
OTHERS = ("compare_", "ablations/", "segment_")


def config_of(name: str) -> type[Config]:
    if name.startswith("finetune_"):
        return FinetuneConfig
    return FitConfig if name == "k-clip" else PretrainConfig


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(OTHERS)])
def test_every_recipe_is_valid(name: str) -> None:
    config_class = config_of(name)
    assert parse(config_class, load_recipe(name, config_class))


def test_a_recipe_may_have_a_base(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("base: demo\nepochs: 2\nlr: 0.1\n")
    values, demo = load_recipe(str(tmp_path / "own.yaml"), PretrainConfig), load_recipe("demo", PretrainConfig)
    assert "steps" in demo
    assert values == {**{key: value for key, value in demo.items() if key != "steps"}, "epochs": 2, "lr": 0.1}


def test_a_base_is_looked_up_beside_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("base: other.yaml\nlr: 0.1\n")
    (tmp_path / "other.yaml").write_text("lr: 0.2\nseed: 3\n")
    assert load_recipe(str(tmp_path / "own.yaml")) == {"lr": 0.1, "seed": 3}


def test_recipes_that_are_each_others_base_are_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(f"base: {second}\n")
    second.write_text(f"base: {first}\n")
    with pytest.raises(MapetError, match="is its own base"):
        load_recipe(str(first))


def test_recipes_are_found_by_name() -> None:
    assert find_recipe("ablations/context").is_file()
    with pytest.raises(MapetError, match="did you mean 'demo'"):
        find_recipe("deno")

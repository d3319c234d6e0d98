from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.test_main import refused

from mapet.cli import main
from mapet.models.export import export_network


@pytest.fixture
def model(tiny_vit, tmp_path: Path) -> str:  # type: ignore[no-untyped-def]
    folder = tmp_path / "model"
    folder.mkdir()
    export_network(tiny_vit(channels=1), folder, (0.13,), (0.31,))
    return str(folder)


def test_one_object_on_standard_output(
    model: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--steps", "2", "--batch-size", "8", "--workers", "0", "--augment", "none", "--layer-decay", "none"]
    assert main(["finetune", model, str(digits), "--out", str(tmp_path / "run"), "--json", *flags]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert 0 <= found["accuracy"] <= 1
    assert Path(found["exported"]) == tmp_path / "run" / "exported"
    assert "on the test images" in said.err
    assert "mapet predict" in said.err
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "augment: null\n" in config
    assert "layer_decay: null\n" in config
    assert main(["finetune", "--out", str(tmp_path / "run"), "--resume"]) == 0


def test_recipes_by_name_and_refusals(
    model: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")]
    said = refused(capsys, "finetune", model, str(digits), *out, "--config", "finetune_base")
    assert "batch size 512 is larger than the data set of 50 images" in said
    assert "unknown key 'mix_up'; did you mean 'mixup'" in _with_recipe(tmp_path, "mix_up: 1", capsys, model, *out)
    assert "lacks 'data': labelled images" in refused(capsys, "finetune", model, *out)
    assert "give label_share or labels_per_class" in refused(
        capsys, "finetune", model, str(digits), *out, "--label-share", "0.1", "--labels-per-class", "3"
    )
    assert not (tmp_path / "run").exists()


def _with_recipe(tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{line}\n")
    return refused(capsys, "finetune", *arguments, "--config", str(recipe))

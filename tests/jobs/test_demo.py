import json
from pathlib import Path

import pytest
from tests.conftest import QUIET, TINY

from mapet.cli import main
from mapet.jobs.demo.run import FINETUNING, run_demo


def test_rows_and_results(tmp_path: Path) -> None:
    values = {**TINY, "data": "mnist", "steps": 3}
    few = {**FINETUNING, "steps": 2, "batch_size": 20}
    result, rows = run_demo(values, tmp_path / "run", labels_per_class=(2,), finetuning=few, console=QUIET)
    assert result.steps == 3
    assert rows is not None
    probed, tuned = {"knn", "linear"}, {"knn", "linear", "finetune_20"}
    columns = {name: set(row) for name, row in rows.items()}
    assert columns == {"raw_pixels": probed, "random_vit": tuned, "pretrained_vit": tuned}
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == rows
    assert (tmp_path / "run" / "finetuned" / "pretrained_vit-20" / "exported" / "model.safetensors").exists()
    assert rows["raw_pixels"]["knn"] > 0.9
    assert all(0 <= accuracy <= 1 for row in rows.values() for accuracy in row.values())


@pytest.mark.slow
def test_the_demo_shows_a_gain_in_every_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())
    gain = {column: value - rows["random_vit"][column] for column, value in rows["pretrained_vit"].items()}
    assert list(gain) == ["knn", "linear", "finetune_100", "finetune_400"]
    assert min(gain.values()) > 0
    assert gain["finetune_400"] >= 0.1
    assert "pre-trained ViT" in capsys.readouterr().out

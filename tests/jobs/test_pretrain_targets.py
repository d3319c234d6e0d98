"""Pre-training on a teacher's features and on pixels."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from tests.conftest import TINY, StoppingFile

from mapet import MapetError
from mapet.jobs.pretrain.run import pretrain

QUIET = Console(quiet=True)
TEACHER = "mapet-micro-fashion-mnist"
FEATURES: dict[str, Any] = {**TINY, "vocab_size": None, "targets": "features", "teacher": TEACHER, "steps": 3}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", ["mapet", "pim", "mim", "raster", "mae", "simmim", "cae"])
@pytest.mark.parametrize("feature_loss", ["cosine", "smooth_l1"])
def test_features_are_regressed(objective: str, feature_loss: str, digits: Path, tmp_path: Path) -> None:
    values = {**FEATURES, "data": str(digits), "objective": objective, "feature_loss": feature_loss}
    result = pretrain(values, tmp_path / "run", console=QUIET)
    assert result.finished
    found = losses(tmp_path / "run")
    assert len(found) == 3
    assert all(math.isfinite(loss) for loss in found)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert -1 <= record["cosine"] <= 1
    baseline = json.loads((tmp_path / "run" / "baseline.json").read_text())
    assert (baseline["metric"], baseline["entropy"]) == ("cosine", None)
    assert 0 < baseline["level"] <= 1
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_a_resumed_run_on_features_equals_the_whole_run(digits: Path, exported_vit: Path, tmp_path: Path) -> None:
    shutil.copytree(exported_vit, tmp_path / "teacher")
    values = {**FEATURES, "data": str(digits), "steps": 4, "teacher": str(tmp_path / "teacher")}
    pretrain(values, tmp_path / "whole", console=QUIET)
    part = tmp_path / "part"
    assert pretrain(values, part, console=Console(file=StoppingFile())).steps < 4
    shutil.copytree(part, tmp_path / "changed")
    assert pretrain({}, part, resume=True, console=QUIET).finished
    assert losses(part) == losses(tmp_path / "whole")

    state = load_file(tmp_path / "teacher" / "model.safetensors")
    save_file({**state, "pos_embed": state["pos_embed"] + 1}, tmp_path / "teacher" / "model.safetensors")
    with pytest.raises(MapetError, match="the teacher is not what the run in .*changed began with"):
        pretrain({}, tmp_path / "changed", resume=True, console=QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None}, "there is no teacher; name one with --teacher"),
        ({"targets": None}, "teacher is for targets 'features'; add --targets features"),
        ({"tokenizer": "pixels"}, "leave out tokenizer"),
        ({"tokens": "store"}, "leave out tokens"),
        ({"vocab_size": 16}, "leave out vocab_size"),
        ({"targets": "pixels", "teacher": None, "tokenizer": "pixels"}, "'mapet' predicts pixels.*leave out tokenizer"),
        (
            {"targets": "pixels", "teacher": None, "teacher_stage": 1},
            "'mapet' predicts pixels.*leave out teacher_stage",
        ),
    ],
)
def test_targets_that_do_not_go_together_are_refused(
    change: dict[str, Any], message: str, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(MapetError, match=message) as error:
        pretrain({**FEATURES, "data": str(digits), **change}, tmp_path / "run", console=QUIET)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_raster_on_pixels_trains(digits: Path, tmp_path: Path) -> None:
    """Autoregressive image modelling (AIM, 2401.08541)."""
    values = {**TINY, "vocab_size": None, "data": str(digits), "steps": 3, "objective": "raster", "targets": "pixels"}
    assert pretrain(values, tmp_path / "run", console=QUIET).finished
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
    assert not (tmp_path / "run" / "baseline.json").exists()

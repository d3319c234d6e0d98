"""Pre-training with each objective and each kind of target."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tests.conftest import (
    QUIET,
    TINY,
    StoppingFile,
    assert_same_run,
    checkpoint,
    pretrain_tiny,
    records,
    resume_pretraining,
)

import mapet
from mapet import MapetError
from mapet.jobs.evaluate.run import evaluate
from mapet.jobs.export.run import export_model
from mapet.jobs.finetune.run import finetune
from mapet.jobs.pretrain.run import pretrain
from mapet.objectives.registry import OBJECTIVES
from mapet.report.progress import Baseline

# What an objective needs besides TINY, with small decoders.
SMALL: dict[str, dict[str, Any]] = {
    "mae": {"objective_args": {"decoder_depth": 1, "decoder_dim": 32, "decoder_heads": 2}, "vocab_size": None},
    "simmim": {"vocab_size": None},
    "cae": {"objective_args": {"regressor_depth": 1, "decoder_depth": 1}},
}


def run(objective: str, data: Path, out: Path, **values: Any) -> Any:
    return pretrain_tiny(data, out, objective=objective, **{**SMALL.get(objective, {}), **values})


@pytest.fixture(scope="module")
def mae_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pixels") / "run"
    run("mae", digits, out, steps=3, mean=[0.3], std=[0.4])
    return out


@pytest.mark.parametrize(
    ("objective", "values"),
    [
        *((objective, {}) for objective in OBJECTIVES),
        ("mapet", {"targets": "pixels", "vocab_size": None}),
        ("simmim", {"targets": "ids", "vocab_size": 16}),
    ],
)
def test_every_objective_trains(objective: str, values: dict[str, Any], digits: Path, tmp_path: Path) -> None:
    learning = {"steps": 60, "lr": 3e-3, "crop_min": 1.0, "flip": 0.0, "drop_path": 0.0}
    run(objective, digits, tmp_path / "run", **learning, **values)
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("objective", SMALL)
def test_stopped_run_resumes_bit_for_bit(objective: str, digits: Path, tmp_path: Path) -> None:
    """Masks, stochastic depth and micro-batches depend on the step alone."""
    values = {**TINY, "data": str(digits), "objective": objective, **SMALL[objective]}
    values |= {"steps": 8, "accumulate": 2, "drop_path": 0.2}
    pretrain(values, tmp_path / "whole", console=QUIET)
    stopped = pretrain(values, tmp_path / "stopped", console=Console(file=StoppingFile()))
    assert (stopped.stopped_by, stopped.finished) == (signal.SIGTERM, False)
    assert resume_pretraining(tmp_path / "stopped").finished
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_pixels_need_no_tokenizer(mae_run: Path) -> None:
    for name in ("tokenizer", "baseline.json", "figures/tokens.png"):
        assert not (mae_run / name).exists()
    assert (mae_run / "figures" / "layout.png").exists()
    assert "accuracy" not in records(mae_run)[0]
    config = yaml.safe_load((mae_run / "config.yaml").read_text())
    assert (config["mask_ratio"], config["masking"], config["crop_min"]) == (0.75, "random", 0.2)
    assert config["tokenizer"] is config["vocab_size"] is None


def test_run_without_ids_serves_the_other_commands(mae_run: Path, digits: Path, tmp_path: Path) -> None:
    weights = load_file(mae_run / "exported" / "model.safetensors")
    assert {f"backbone.{name}" for name in weights} == {name for name in checkpoint(mae_run) if "backbone." in name}
    network = timm.create_model(f"local-dir:{mae_run / 'exported'}", pretrained=True)
    assert set(network.state_dict()) == set(weights)
    model, transform = mapet.load(mae_run)
    assert model(transform(next(digits.rglob("*.png")))[None]).shape == (1, 32)
    values = {"model": str(mae_run), "data": str(digits), "workers": 0}
    evaluate("knn", values, console=QUIET)
    assert finetune({**values, "steps": 1, "batch_size": 8}, tmp_path / "tuned", console=QUIET).finished
    export_model("timm", {"model": str(mae_run)}, tmp_path / "card")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "objective" in card
    assert "without looking" not in card


def test_continued_with_another_objective(mae_run: Path, digits: Path, tmp_path: Path) -> None:
    still = {"lr": 1e-12, "warmup": 0.0, "min_lr": 0.0}  # one step that changes no weight
    fixed = {"data": str(digits), "init": str(mae_run), "batch_size": 8, "workers": 0, "steps": 1, **still}
    result = pretrain({**fixed, "objective": "mim", "vocab_size": 16}, tmp_path / "run", console=QUIET)
    assert result.config.mean == (0.3,)
    before, after = checkpoint(mae_run), checkpoint(tmp_path / "run")
    assert all(torch.allclose(after[name], before[name], atol=1e-9) for name in after if "backbone." in name)


def test_cae_is_compared_by_its_cross_entropy(digits: Path, tmp_path: Path) -> None:
    run("cae", digits, tmp_path / "run", steps=2)
    baseline = Baseline(**json.loads((tmp_path / "run" / "baseline.json").read_text()))
    record = records(tmp_path / "run")[-1]
    assert f"target loss {record['target_loss']:.3f} (unigram" in baseline.describe(record)
    assert record["loss"] == pytest.approx(record["target_loss"] + 2 * record["alignment"])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"tokenizer": "pixels"}, "'mae' predicts pixels, which need no token ids; leave out tokenizer"),
        ({"tokens": "store", "vocab_size": 16, "contrast": False}, "leave out contrast, tokens, vocab_size"),
        ({"objective_args": {"decoder_dim": 10}}, "decoder_dim 10 is not divisible by decoder_heads 16"),
        ({"objective_args": {"depth": 10}}, "'mae' has no argument 'depth'; did you mean 'decoder_depth'"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], says: str, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match=says):
        run("mae", digits, tmp_path / "run", steps=1, **values)
    assert not (tmp_path / "run" / "config.yaml").exists()

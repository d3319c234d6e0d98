"""Runs of the objectives that are no layouts: without ids, or with more parts than a head."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from tests.conftest import TINY
from tests.jobs.test_pretrain import QUIET, lines

import mapet
from mapet import MapetError
from mapet.jobs.bootstrap.run import bootstrap
from mapet.jobs.evaluate.run import evaluate
from mapet.jobs.export.run import export_model
from mapet.jobs.finetune.run import finetune
from mapet.jobs.pretrain.run import pretrain
from mapet.report.progress import Baseline

SMALL: dict[str, dict[str, Any]] = {
    "mae": {"objective_args": {"decoder_depth": 1, "decoder_dim": 32, "decoder_heads": 2}, "vocab_size": None},
    "simmim": {"vocab_size": None},
    "cae": {"objective_args": {"regressor_depth": 1, "decoder_depth": 1}},
}


def run(objective: str, data: Path, out: Path, **values: Any) -> Any:
    return pretrain(
        {**TINY, "data": str(data), "objective": objective, **SMALL[objective], **values}, out, console=QUIET
    )


@pytest.fixture(scope="module")
def mae_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pixels") / "run"
    run("mae", digits, out, steps=3, mean=[0.3], std=[0.4])
    return out


def test_a_run_on_pixels_has_no_tokenizer(mae_run: Path) -> None:
    files = {path.relative_to(mae_run).as_posix() for path in mae_run.rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith("tensorboard/")} == {
        ".lock",
        "config.yaml",
        "log.txt",
        "metrics.jsonl",
        "checkpoints/last/task.safetensors",
        "checkpoints/last/optimizer.safetensors",
        "checkpoints/last/state.json",
        "exported/config.json",
        "exported/model.safetensors",
        "figures/curve.png",
        "figures/layout.png",
    }
    assert set(lines(mae_run)[0]) == {
        "step",
        "epoch",
        "images",
        "loss",
        "lr",
        "grad_norm",
        "images_per_s",
        "data_wait",
        "damaged",
    }
    config = yaml.safe_load((mae_run / "config.yaml").read_text())
    assert (config["mask_ratio"], config["masking"], config["crop_min"]) == (0.75, "random", 0.2)
    assert config["tokenizer"] is config["vocab_size"] is None


def test_what_remains_is_a_plain_vit_for_all_that_comes_after(mae_run: Path, digits: Path, tmp_path: Path) -> None:
    weights = load_file(mae_run / "exported" / "model.safetensors")
    checkpoint = load_file(mae_run / "checkpoints" / "last" / "task.safetensors")
    assert {f"backbone.{name}" for name in weights} == {name for name in checkpoint if name.startswith("backbone.")}
    network = timm.create_model(f"local-dir:{mae_run / 'exported'}", pretrained=True)
    assert set(network.state_dict()) == set(weights)
    model, transform = mapet.load(mae_run)
    file = next(digits.rglob("*.png"))
    assert model(transform(file)[None]).shape == (1, 32)

    evaluate("knn", {"model": str(mae_run), "data": str(digits), "workers": 0}, console=QUIET)
    export_model("timm", {"model": str(mae_run)}, tmp_path / "card")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "objective" in card
    assert "without looking" not in card
    tuned = finetune(
        {"model": str(mae_run), "data": str(digits), "steps": 1, "batch_size": 8, "workers": 0, "augment": None},
        tmp_path / "tuned",
        console=QUIET,
    )
    assert tuned.finished


def test_it_is_continued(mae_run: Path, digits: Path, tmp_path: Path) -> None:
    """Its backbone by any objective; all its parts by its own, whose arguments come with it."""
    before = load_file(mae_run / "checkpoints" / "last" / "task.safetensors")
    still = {"data": str(digits), "init": str(mae_run), "batch_size": 8, "workers": 0, "steps": 1, "lr": 1e-12}
    still |= {"warmup": 0.0, "min_lr": 0.0}

    def more(name: str, **values: Any) -> dict[str, torch.Tensor]:
        result = pretrain({**still, **values}, tmp_path / name, console=QUIET)
        assert result.config.mean == (0.3,)
        return result.task.state_dict()

    after = more("all", init_parts="all")
    assert after.keys() == before.keys()
    assert all(torch.allclose(after[name], tensor, atol=1e-9) for name, tensor in before.items())
    after = more("backbone", objective="mim", vocab_size=16)
    assert all(torch.allclose(after[name], before[name], atol=1e-9) for name in after if name.startswith("backbone."))

    for values, says in (
        ({"objective": "simmim"}, r"this SimMIM's is missing; take its objective"),
        ({"objective": "mae"}, "and this MAE's is .*; take its objective, its arguments"),
        ({"objective": "mim", "tokenizer": "pixels"}, "takes over the head of"),
    ):
        with pytest.raises(MapetError, match=says):
            more("refused", init_parts="all", **values)
    assert not (tmp_path / "refused" / "config.yaml").exists()


def test_a_head_of_ids_is_not_taken_for_one_of_pixels(pretrained_run: Path, digits: Path, tmp_path: Path) -> None:
    values = {"data": str(digits), "init": str(pretrained_run), "init_parts": "all", "objective": "simmim"}
    with pytest.raises(MapetError, match="was trained for another tokenizer or teacher"):
        pretrain({**values, "batch_size": 8, "workers": 0, "steps": 1}, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("objective", SMALL)
def test_every_objective_trains(objective: str, digits: Path, tmp_path: Path) -> None:
    run(objective, digits, tmp_path / "run", steps=60, lr=3e-3, crop_min=1.0, flip=0.0, drop_path=0.0)
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_cae_is_compared_by_its_cross_entropy(digits: Path, tmp_path: Path) -> None:
    run("cae", digits, tmp_path / "run", steps=2)
    baseline = Baseline(**json.loads((tmp_path / "run" / "baseline.json").read_text()))
    line = lines(tmp_path / "run")[-1]
    assert f"target loss {line['target_loss']:.3f} (unigram" in baseline.describe(line)
    assert line["loss"] == pytest.approx(line["target_loss"] + 2 * line["alignment"])


@pytest.mark.parametrize("objective", SMALL)
def test_a_stopped_run_resumes_bit_for_bit(objective: str, digits: Path, tmp_path: Path) -> None:
    """Masks, stochastic depth and micro-batches are the step's, wherever it is taken up."""
    options: dict[str, Any] = {"steps": 25, "accumulate": 2, "drop_path": 0.2}
    run(objective, digits, tmp_path / "whole", **options)
    out = tmp_path / "stopped"

    def stop() -> None:
        metrics = out / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 5:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # a run that is faster than this must not end the tests
    try:
        thread = threading.Thread(target=stop)
        thread.start()
        stopped = run(objective, digits, out, **options)
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.stopped_by == signal.SIGTERM
    assert 5 <= stopped.steps < 25
    pretrain({}, out, resume=True, console=QUIET)
    keys = ("step", "loss", "lr", "grad_norm")
    same = [[tuple(line[key] for key in keys) for line in lines(path)] for path in (out, tmp_path / "whole")]
    assert same[0] == same[1]
    files = [(path / "exported" / "model.safetensors").read_bytes() for path in (out, tmp_path / "whole")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"tokenizer": "pixels"}, "'mae' predicts pixels, which need no token ids; leave out tokenizer"),
        ({"tokens": "store", "vocab_size": 16, "contrast": False}, "leave out contrast, tokens, vocab_size"),
        ({"objective_args": {"decoder_dim": 10}}, "decoder_dim 10 is not divisible by decoder_heads 16"),
        ({"objective_args": {"depth": 10}}, "'mae' has no argument 'depth'; did you mean 'decoder_depth'"),
    ],
)
def test_bad_input(values: dict[str, Any], says: str, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match=says):
        run("mae", digits, tmp_path / "run", steps=1, **values)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_pixels_are_not_bootstrapped(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match="'simmim' predicts pixels"):
        bootstrap({**TINY, "data": str(digits), "objective": "simmim"}, tmp_path / "boot", console=QUIET)
    assert not (tmp_path / "boot").exists()

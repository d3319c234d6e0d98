from __future__ import annotations

import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tests.conftest import TINY

from mapet import MapetError
from mapet.inference.models import open_model
from mapet.jobs.pretrain.run import pretrain


@pytest.fixture
def copy(classifier: Path, tmp_path: Path) -> Path:
    """An exported folder to be spoilt."""
    return Path(shutil.copytree(classifier, tmp_path / "model"))


def test_what_the_input_is_to_be(classifier: Path) -> None:
    opened = open_model(classifier)
    view = opened.view
    assert (view.size, view.mean, view.std, view.crop_pct) == ((28, 28), (0.13,), (0.31,), 1.0)
    assert (view.interpolation, view.squash, opened.channels) == ("bicubic", False, 1)
    assert open_model(classifier, crop_pct=0.5).view.crop_pct == 0.5
    assert open_model(classifier, image_size=(14, 35)).view.size == (14, 35)


def test_how_timm_wants_a_model_s_images_cut_is_kept() -> None:
    view = open_model("resnet18.a1_in1k", reinit=True).view
    assert (view.size, view.crop_pct, view.squash, view.interpolation) == ((224, 224), 0.95, False, "bicubic")
    view = open_model("convnextv2_nano.fcmae_ft_in22k_in1k_384", reinit=True).view
    assert (view.size, view.crop_pct, view.squash) == ((384, 384), 1.0, True)


def test_with_and_without_its_classifier(classifier: Path, pretrained_run: Path) -> None:
    images = torch.randn(2, 1, 28, 28)
    whole, headless = open_model(classifier, classifier=True), open_model(classifier)
    assert whole.network(images).shape == (2, 4)
    assert headless.network(images).shape == (2, 32)
    assert torch.equal(whole.network.forward_features(images), headless.network.forward_features(images))
    assert whole.require_classes() == ("round", "straight", "bent", 'odd, "quoted"')
    assert headless.classes == ()
    with pytest.raises(MapetError, match="has no classifier; fine-tune it first"):
        open_model(pretrained_run, classifier=True).require_classes()


def test_classes_without_names_are_known_from_imagenet_or_numbered(copy: Path) -> None:
    imagenet = open_model("resnet18.a1_in1k", classifier=True, reinit=True).classes
    assert len(imagenet) == 1000
    assert imagenet[1] == "n01443537", "as ImageNet's folders are called; the goldfish"
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "label_names": None}))
    assert open_model(copy, classifier=True).classes == ("0", "1", "2", "3")


def test_random_weights_come_from_the_seed(classifier: Path) -> None:
    def first(**arguments: Any) -> torch.Tensor:
        return open_model(classifier, **arguments).network.state_dict()["blocks.0.attn.qkv.weight"]

    assert torch.equal(first(), load_file(classifier / "model.safetensors")["blocks.0.attn.qkv.weight"])
    assert torch.equal(first(reinit=True, seed=1), first(reinit=True, seed=1))
    assert not torch.equal(first(reinit=True, seed=1), first(reinit=True, seed=2))
    assert not torch.equal(first(reinit=True), first())


def test_the_hash_is_of_the_weights(classifier: Path, copy: Path) -> None:
    assert open_model(copy).weights_hash == open_model(classifier).weights_hash
    weights = load_file(copy / "model.safetensors")
    weights["blocks.0.attn.qkv.weight"][0, 0] += 1e-3
    save_file(weights, copy / "model.safetensors")
    assert open_model(copy).weights_hash != open_model(classifier).weights_hash


def test_broken_weights(classifier: Path, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["blocks.0.attn.qkv.weight"][0, 0] = float("nan")
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(MapetError, match=r"contain NaN or infinity \(first 'blocks\.0\.attn\.qkv\.weight', 1 tensors"):
        open_model(copy)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MapetError, match=r"cannot be read .*cut short or edited, export it again"):
        open_model(copy)
    weights = load_file(classifier / "model.safetensors")
    del weights["norm.weight"]
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(MapetError, match=r"cannot be read .*norm\.weight"):
        open_model(copy)


def test_broken_configurations(copy: Path) -> None:
    config = (copy / "config.json").read_text()
    for text, says in (
        ("{", "cannot be read"),
        ("[]", "no JSON object"),
        ("{}", "lacks 'architecture'"),
        (config.replace("vit_tiny_patch16_224", "vit_nothing"), "cannot be read"),
    ):
        (copy / "config.json").write_text(text)
        with pytest.raises(MapetError, match=says):
            open_model(copy)


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors"])
def test_folders_that_are_no_model(lacking: str, copy: Path, digits: Path, tmp_path: Path) -> None:
    (copy / lacking).unlink()
    with pytest.raises(MapetError, match=f"lacks '{lacking}'"):
        open_model(copy)
    with pytest.raises(MapetError, match="neither a run that was saved at least once nor an exported model"):
        open_model(digits)
    for missing in (tmp_path / "gone", f"local-dir:{tmp_path / 'gone'}"):
        with pytest.raises(MapetError, match=r"gone' does not exist"):
            open_model(missing)
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(MapetError, match="name a run, an exported folder or a timm model"):
        open_model(tmp_path / "file.txt")


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("vit_tiny_patch16_224", "hf-hub:timm/no_such_model", "resnet18.no_such_tag"):
        with pytest.raises(MapetError, match=rf"weights of model '{name}' could not be fetched \("):
            open_model(name)


def test_image_sizes_that_do_not_fit(classifier: Path) -> None:
    with pytest.raises(MapetError, match=r"image size 28x30 does not fit .*30 is not divisible by .* 7; take 28 or 35"):
        open_model(classifier, image_size=(28, 30))
    with pytest.raises(MapetError, match=r"image size 3x7 .*take 7 or 14"):
        open_model(classifier, image_size=(3, 7))


@pytest.mark.parametrize("name", ["mixer_s32_224", "levit_128s", "efficientvit_m0", "maxvit_pico_rw_256"])
def test_sizes_that_only_running_shows_to_be_wrong(name: str) -> None:
    with pytest.raises(MapetError, match=f"model '{name}' cannot take images of 37 x 50 pixels|does not fit model"):
        open_model(name, image_size=(37, 50), reinit=True)


def test_networks_without_position_embeddings_take_any_size() -> None:
    opened = open_model("convnext_atto", image_size=(33, 50), reinit=True)
    assert opened.network(torch.zeros(1, 3, *opened.view.size)).shape == (1, 320)


class Stopper(io.StringIO):
    """A terminal whose user asks for a stop when the first step is shown."""

    def write(self, text: str) -> int:
        if "step 1/" in text:
            os.kill(os.getpid(), signal.SIGTERM)
        return len(text)


def test_a_run_that_has_not_finished_says_how_far_it_is(
    digits: Path, pretrained_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    result = pretrain({**TINY, "data": str(digits), "steps": 8}, run, console=Console(file=Stopper()))
    assert 0 < result.steps < 8
    caplog.clear()
    for source, warned in ((run, True), (f"local-dir:{run}", True), (run / "exported", False), (pretrained_run, False)):
        open_model(source)
        said = [record.message for record in caplog.records]
        part = f"step {result.steps} of 8 ({100 * result.steps // 8} %)"
        expected = f"run {run} has not finished: its weights are those after {part}"
        assert said == ([expected] if warned else []), source
        caplog.clear()
    open_model(run, reinit=True)
    assert not caplog.records, "random weights are not the run's"
    finished = pretrain({}, run, resume=True, console=Console(quiet=True))
    assert finished.steps == 8
    caplog.clear()
    open_model(run)
    assert not caplog.records
    (run / "checkpoints" / "last" / "state.json").write_text("{")
    open_model(run)
    assert f"nothing tells whether run {run} has finished" in caplog.text

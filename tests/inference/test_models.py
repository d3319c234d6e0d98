import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mapet import MapetError
from mapet.inference.models import open_model


@pytest.fixture
def copy(classifier: Path, tmp_path: Path) -> Path:
    """A copy of an exported folder, to be damaged."""
    return Path(shutil.copytree(classifier, tmp_path / "model"))


def test_the_view_is_that_of_training_or_timms(classifier: Path) -> None:
    opened = open_model(classifier)
    view = opened.view
    assert (view.size, view.mean, view.std, view.crop_pct) == ((28, 28), (0.13,), (0.31,), 1.0)
    assert (view.interpolation, view.squash, opened.reading.channels) == ("bicubic", False, 1)
    assert open_model(classifier, crop_pct=0.5).view.crop_pct == 0.5
    assert open_model(classifier, image_size=(14, 35)).view.size == (14, 35)
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


def save_with(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors in an exported folder; None removes one."""
    weights = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / "model.safetensors")


def test_the_hash_is_of_the_weights(classifier: Path, copy: Path) -> None:
    before = open_model(copy).weights_hash
    assert before == open_model(classifier).weights_hash
    save_with(copy, **{"norm.bias": torch.full((32,), 1e-3)})
    assert open_model(copy).weights_hash != before


def test_damaged_weights_are_refused(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    bias = load_file(copy / "model.safetensors")["norm.bias"]
    for kept in (torch.float16, torch.float64):
        save_with(copy, **{"norm.bias": bias.to(kept)})
        open_model(copy)
    for changed, says in (
        (None, r"model is damaged \(.*norm.bias.*\); restore it or export the model again"),
        (torch.full_like(bias, torch.nan), r"contain NaN or infinity \(first 'norm.bias', 1 tensors"),
    ):
        (copy / "model.safetensors").write_bytes(whole)
        save_with(copy, **{"norm.bias": changed})
        with pytest.raises(MapetError, match=says):
            open_model(copy)
        open_model(copy, reinit=True)
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MapetError, match=r"model is damaged \("):
        open_model(copy)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"mean": [0.1, 0.2]}, r"mean \(0.1, 0.2\).* do not fit"), ({"std": [0]}, ""), ({"crop_pct": "0.9"}, "")],
)
def test_damaged_input_settings_are_refused(settings: dict[str, Any], says: str, copy: Path) -> None:
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**content, "pretrained_cfg": content["pretrained_cfg"] | settings}))
    with pytest.raises(MapetError, match=rf"config.json of model .* is damaged \(.*{says}.*\); restore it or export"):
        open_model(f"local-dir:{copy}")


@pytest.mark.parametrize(
    ("text", "says"), [("{", "/config.json is damaged"), ("[]", " is damaged"), ("{}", " is damaged")]
)
def test_damaged_configurations_are_refused(text: str, says: str, copy: Path) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(MapetError, match=rf"model{says} \(.*\); restore it or export the model again"):
        open_model(copy)


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors"])
def test_other_folders_and_files_are_refused(lacking: str, copy: Path, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "mae.pth").write_bytes(b"weights")
    (copy / lacking).unlink()
    for source, says in (
        (
            copy,
            r"model' is neither a run that was saved .* nor an exported model \(config.json and model.safetensors\)",
        ),
        (digits, "neither a run that was saved at least once nor an exported model"),
        (tmp_path / "gone", "gone' does not exist"),
        (f"local-dir:{tmp_path / 'gone'}", "gone' does not exist"),
        (tmp_path / "mae.pth", "mae.pth' is a file, not a folder; convert .* or name a run"),
        ("mapet-micro-fashon-mnist", "did you mean 'mapet-micro-fashion-mnist'"),
        ("vit_tinny_patch16_224", "unknown model 'vit_tinny_patch16_224'.*did you mean 'vit_tiny_patch16_224'"),
    ):
        with pytest.raises(MapetError, match=says):
            open_model(source)


def test_weights_that_do_not_exist_on_the_hub_are_refused() -> None:
    with pytest.raises(MapetError, match=r"model 'resnet18.no_such_tag' could not be fetched or built \("):
        open_model("resnet18.no_such_tag")


def test_image_sizes_that_do_not_fit_are_refused(classifier: Path) -> None:
    with pytest.raises(MapetError, match=r"image size 28x30 does not fit .*30 is not divisible by .* 7; take 28 or 35"):
        open_model(classifier, image_size=(28, 30))
    with pytest.raises(MapetError, match=r"image size 3x7 .*take 7 or 14"):
        open_model(classifier, image_size=(3, 7))
    for name in ("mixer_s32_224", "levit_128s", "maxvit_pico_rw_256"):  # some only fail when the network runs
        with pytest.raises(MapetError, match=f"model '{name}' cannot take images of 37 x 50 pixels|does not fit model"):
            open_model(name, image_size=(37, 50), reinit=True)
    opened = open_model("convnext_atto", image_size=(33, 50), reinit=True)  # without position embeddings
    assert opened.network(torch.zeros(1, 3, *opened.view.size)).shape == (1, 320)


def test_an_unfinished_run_is_opened_with_a_warning(
    pretrained_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(pretrained_run, tmp_path / "run"))
    file = run / "checkpoints" / "last" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "total_steps": 8}))
    expected = [f"run {run} has not finished: its weights are those after step 2 of 8 (25 %)"]
    for source, said in ((run, expected), (f"local-dir:{run}", expected), (run / "exported", []), (pretrained_run, [])):
        open_model(source)
        assert [record.message for record in caplog.records] == said
        caplog.clear()
    open_model(run, reinit=True)
    assert not caplog.records, "random weights are not those of the run"
    file.write_text("{")
    open_model(run)
    assert f"cannot tell whether run {run} has finished" in caplog.text

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import mapet
from mapet.models.networks import RELEASED, build_vit, find_network
from mapet.tokenizers.teachers import build_teacher

NAME = "mapet-micro-fashion-mnist"


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_backbone_is_loaded_by_its_name(name: str) -> None:
    folder = RELEASED[name]
    card = (folder / "README.md").read_text()
    for part in (f"# {name}", "license: apache-2.0", "## How it was made\n\n`mapet pretrain ", f'mapet.load("{name}")'):
        assert part in card
    model, transform = mapet.load(name)
    image = transform(Image.effect_noise(model.patch_embed.img_size[::-1], 50))[None]
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        features = model(image)
        assert torch.equal(features, reference(image))
    assert features.shape == (1, model.num_features)
    with pytest.raises(mapet.MapetError, match="pass the weights to --init instead"):
        build_vit(name, image_size=28)


def test_networks_are_found_by_folder_before_name(
    pretrained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = f"local-dir:{pretrained_run}/exported"
    for source in (str(pretrained_run), f"local-dir:{pretrained_run}", f"{pretrained_run}/exported", exported):
        assert find_network(source) == exported
    for name in ("vit_tiny_patch16_224", "resnet18.a1_in1k", "hf-hub:some/model"):
        assert find_network(name) == name
    assert find_network(NAME) == f"local-dir:{RELEASED[NAME]}"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RELEASED[NAME], NAME)
    assert find_network(NAME) == f"local-dir:{NAME}"
    (Path(NAME) / "config.json").unlink()
    for source in (NAME, "vit_tinny_patch16_224", "local-dir:gone", f"local-dir:{tmp_path}", "", "x" * 5000, "a\0b"):
        assert find_network(source) is None


def test_teachers_are_recorded_by_a_name_that_finds_them(
    pretrained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source, recorded in ((NAME, NAME), (str(pretrained_run), f"local-dir:{pretrained_run}/exported")):
        teacher = build_teacher(source)
        assert teacher(torch.zeros(1, 1, 28, 28)).shape[2:] == (4, 4)
        assert (teacher.config["name"], teacher.origin) == (recorded, {"weights": recorded})
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RELEASED[NAME], NAME)
    assert build_teacher(NAME).origin == {"weights": f"local-dir:{NAME}"}


def test_the_pooled_feature_is_the_mean_of_the_normalised_patches() -> None:
    vit = build_vit("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(vit(images), vit.forward_features(images)[:, 1:].mean(1), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("vit_smal_patch16_224", {}, "did you mean 'vit_small_patch16_224'"),
        ("vit_tiny_patch16_224.foo", {}, "cannot build model 'vit_tiny_patch16_224.foo'"),
        ("resnet18", {}, "'resnet18' is not a plain Vision Transformer"),
        ("vit_tiny_patch16_224", {"image_size": 225}, r"not divisible by the patch size 16.* 224 or 240"),
        ("vit_tiny_patch16_224", {"dept": 3}, "cannot build .*dept"),
        ("vit_tiny_patch16_224", {"embed_dim": 100, "num_heads": 3}, "cannot build"),
        ("vit_tiny_patch16_224", {"depth": 0}, "would have no block; take a depth of at least 1"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(name: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(mapet.MapetError, match=says):
        build_vit(name, **{"image_size": 224, **arguments})

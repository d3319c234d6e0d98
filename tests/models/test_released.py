from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import mapet
from mapet.models.released import RELEASED, released_folder
from mapet.models.vit import build_vit
from mapet.tokenizers.teachers import build_teacher


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_backbone_is_loaded_by_its_name(name: str) -> None:
    folder = RELEASED[name]
    assert (folder / "model.safetensors").stat().st_size <= 25e6
    card = (folder / "README.md").read_text()
    for part in (f"# {name}", "license: apache-2.0", "## How it was made\n\n`mapet pretrain ", f'mapet.load("{name}")'):
        assert part in card

    model, transform = mapet.load(name)
    size = model.patch_embed.img_size
    image = transform(Image.effect_noise(size[::-1], 50))[None]
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        features = model(image)
        assert torch.equal(features, reference(image))
    assert features.shape == (1, model.num_features)
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    # Files may be of half precision; models are not.
    assert all(torch.equal(saved[key].to(value.dtype), value) for key, value in model.state_dict().items())


def test_a_released_backbone_teaches_and_no_place_of_it_is_written_down() -> None:
    teacher = build_teacher("mapet-micro-fashion-mnist")
    assert teacher(torch.zeros(1, 1, 28, 28)).shape == (1, 128, 4, 4)
    assert teacher.config["name"] == "mapet-micro-fashion-mnist"
    assert teacher.origin == {"weights": "mapet-micro-fashion-mnist"}


def test_a_folder_of_the_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mapet-micro-fashion-mnist"
    assert released_folder(name) == str(RELEASED[name])
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RELEASED[name], name)
    assert released_folder(name) == name
    assert build_teacher(name).origin == {"weights": f"local-dir:{name}"}


def test_weights_are_no_architecture() -> None:
    with pytest.raises(mapet.MapetError, match="begin with the weights by --init"):
        build_vit("mapet-micro-fashion-mnist", image_size=28)


def test_names_nearly_right_are_hinted_at() -> None:
    with pytest.raises(mapet.MapetError, match="did you mean 'mapet-micro-fashion-mnist'"):
        mapet.load("mapet-micro-fashion-mnis")
    with pytest.raises(mapet.MapetError, match="did you mean 'mapet-micro-fashion-mnist'"):
        build_teacher("mapet-micro-fashon-mnist")

import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import mapet
from mapet.models.released import RELEASED, released_folder
from mapet.models.vit import build_vit
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


def test_a_released_backbone_is_a_teacher_recorded_without_a_path() -> None:
    teacher = build_teacher(NAME)
    assert teacher(torch.zeros(1, 1, 28, 28)).shape == (1, 128, 4, 4)
    assert (teacher.config["name"], teacher.origin) == (NAME, {"weights": NAME})


def test_an_existing_folder_comes_before_a_released_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert released_folder(NAME) == str(RELEASED[NAME])
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RELEASED[NAME], NAME)
    assert released_folder(NAME) == NAME
    assert build_teacher(NAME).origin == {"weights": f"local-dir:{NAME}"}


def test_a_released_name_is_not_an_architecture() -> None:
    with pytest.raises(mapet.MapetError, match="pass the weights to --init instead"):
        build_vit(NAME, image_size=28)


def test_misspelt_names_are_corrected() -> None:
    for open_by_name in (mapet.load, build_teacher):
        with pytest.raises(mapet.MapetError, match=f"did you mean '{NAME}'"):
            open_by_name("mapet-micro-fashon-mnist")

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_model_data_config

import mapet
from mapet import MapetError
from mapet.models.export import export_network


@pytest.mark.parametrize("source", ["{run}", "{run}/exported", "local-dir:{run}/exported"])
def test_features_are_timms_own(source: str, pretrained_run: Path, digits: Path) -> None:
    model, transform = mapet.load(source.format(run=pretrained_run))
    assert not model.training
    theirs = timm.create_model(f"local-dir:{pretrained_run}/exported", pretrained=True, num_classes=0).eval()
    their_transform = create_transform(**resolve_model_data_config(theirs))
    for file in sorted(digits.rglob("0.png")):
        with torch.no_grad():
            expected = theirs(their_transform(Image.open(file))[None])
            assert torch.allclose(model(transform(file)[None]), expected, atol=1e-5)


@pytest.fixture(scope="module")
def of_photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported network for photographs of 224 pixels, with timm's crop_pct."""
    folder = tmp_path_factory.mktemp("of_photographs")
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0)
    export_network(network, folder, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_pct=0.9)
    return folder


@pytest.mark.parametrize("picture", [0, 1])
def test_features_of_photographs_are_timms_own(picture: int, of_photographs: Path) -> None:
    photograph = Image.fromarray(load_sample_images().images[picture])
    model, transform = mapet.load(of_photographs)
    config = resolve_model_data_config(model)
    assert config["crop_pct"] == 0.9
    theirs = create_transform(**config)(photograph)
    ours = transform(photograph)
    assert (ours - theirs).abs().max() < 0.018, "one grey level of 255, normalised"
    with torch.no_grad():
        expected, found = model(torch.stack([theirs, ours]))
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999_99
    assert (found - expected).abs().max() < 0.01


def test_images_may_be_files_pictures_or_arrays(of_photographs: Path, tmp_path: Path) -> None:
    pixels = load_sample_images().images[0]
    Image.fromarray(pixels).save(tmp_path / "china.png")
    transform = mapet.load(of_photographs).transform
    expected = transform(pixels)
    assert transform(Image.fromarray(pixels)).equal(expected)
    assert transform(tmp_path / "china.png").equal(expected)
    assert transform(str(tmp_path / "china.png")).equal(expected)
    (tmp_path / "cut.png").write_bytes((tmp_path / "china.png").read_bytes()[:5000])
    for name, says in (("gone.png", "missing"), ("cut.png", "truncated"), ("", "it is a folder")):
        with pytest.raises(
            MapetError, match=f"image '{tmp_path / name}' cannot be read .*{says}.*; name one undamaged"
        ):
            transform(str(tmp_path / name))


def test_grey_models_take_colour_and_colour_models_grey(pretrained_run: Path, of_photographs: Path) -> None:
    colour = load_sample_images().images[0]
    grey = np.asarray(Image.fromarray(colour).convert("L"))
    assert mapet.load(pretrained_run).transform(colour).shape == (1, 28, 28)
    levels = mapet.load(of_photographs).transform(grey) * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    levels += torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    assert levels.shape == (3, 224, 224)
    assert torch.allclose(levels[0], levels[2], atol=1e-6)


def test_another_input_size(pretrained_run: Path, of_photographs: Path) -> None:
    pixels = load_sample_images().images[0]
    model, transform = mapet.load(of_photographs, image_size=(96, 160))
    assert transform(pixels).shape == (3, 96, 160)
    theirs = timm.create_model(f"local-dir:{of_photographs}", pretrained=True, img_size=(96, 160)).eval()
    with torch.no_grad():
        images = transform(pixels)[None]
        assert torch.allclose(model(images), theirs(images), atol=1e-5)
        assert model.forward_features(images).shape == (1, 1 + 6 * 10, 192)
    model, transform = mapet.load(pretrained_run, image_size=35)
    assert transform(pixels).shape == (1, 35, 35)
    assert model(transform(pixels)[None]).shape == (1, 32)


def test_classes_and_repr(classifier: Path, pretrained_run: Path) -> None:
    loaded = mapet.load(classifier)
    assert loaded.classes == ("round", "straight", "bent", 'odd, "quoted"')
    assert loaded.model(torch.zeros(2, 1, 28, 28)).shape == (2, 4)
    assert repr(loaded) == "Loaded(VisionTransformer, input 1 x 28 x 28, 4 classes)"
    assert mapet.load(pretrained_run).classes == ()


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((28, 28), np.float32), r"type float32 and shape \(28, 28\)"),
        (np.zeros((28, 28), np.uint16), "type uint16"),
        (np.zeros((3, 28, 28), np.uint8), r"shape \(3, 28, 28\) cannot be transformed; pass a path"),
        (np.zeros((2, 28, 28, 3), np.uint8), r"shape \(2, 28, 28, 3\)"),
        (torch.zeros(3, 28, 28), "type Tensor cannot be transformed; pass a path, a Pillow image, or an array"),
    ],
)
def test_other_objects_are_refused(image: object, said: str, pretrained_run: Path) -> None:
    with pytest.raises(MapetError, match=said):
        mapet.load(pretrained_run).transform(image)  # type: ignore[arg-type]

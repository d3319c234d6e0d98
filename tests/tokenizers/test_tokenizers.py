import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file

from mapet import MapetError, load_tokenizer
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.data.views import PlainView
from mapet.models.export import export_network
from mapet.tokenizers.base import full_precision
from mapet.tokenizers.files import save_tokenizer
from mapet.tokenizers.kmeans_tokenizers import KFeatures, KPixels, KTokenizer
from mapet.tokenizers.teachers import TorchvisionTeacher, build_teacher


def photos(count: int = 6, size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def fitted(tokenizer: KTokenizer, images: torch.Tensor, seed: int = 0) -> KTokenizer:
    return tokenizer.fit(tokenizer.features(images).flatten(0, 1), seed)


def test_ids_after_contrast_normalisation_do_not_depend_on_brightness() -> None:
    for contrast in (True, False):
        tokenizer = fitted(KPixels(32, 8, 3, vocab_size=8, contrast=contrast), photos())
        same = (tokenizer.encode(photos() * 0.5) == tokenizer.encode(photos())).float().mean()
        assert (same > 0.9) == contrast


def test_saved_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizer = fitted(KPixels(32, 8, 3, vocab_size=8), photos())
    save_tokenizer(tokenizer, tmp_path)
    loaded, ids = load_tokenizer(tmp_path), tokenizer.encode(photos())
    assert torch.equal(loaded.encode(photos()), ids)
    assert (ids.shape, ids.dtype) == ((6, 16), torch.int64)
    assert set(ids.flatten().tolist()) == set(range(8))
    assert loaded.content_hash == tokenizer.content_hash
    assert fitted(KPixels(32, 8, 3, vocab_size=8), photos(), seed=1).content_hash != tokenizer.content_hash
    assert repr(loaded) == "<KPixels: 8 ids, 4 x 4 patches of 3 x 32 x 32 images>"


def test_pixels_are_cut_in_raster_order() -> None:
    image = torch.arange(2 * 8 * 8, dtype=torch.float32).reshape(1, 2, 8, 8)
    features = KPixels(8, 4, 2, vocab_size=3, contrast=False).features(image)
    assert torch.equal(features[0, 1], image[0, :, :4, 4:].flatten())
    assert torch.equal(features[0, 2], image[0, :, 4:, :4].flatten())


def test_content_hash_does_not_change_between_versions() -> None:
    tokenizer = KPixels(8, 4, 1, vocab_size=2)
    tokenizer.centroids.copy_(torch.arange(32.0).reshape(2, 16))
    assert tokenizer.content_hash == "4908952d0f18326027d505e179a7be792e1b979136985a1c84e6822498742ef1"


def test_ids_are_computed_in_full_precision() -> None:
    seen = []

    class Watched(KPixels):
        def patch_features(self, images: torch.Tensor) -> torch.Tensor:
            cudnn = torch.backends.cudnn
            autocast = torch.is_autocast_enabled(images.device.type)
            seen.append((cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32, autocast, images.dtype))
            return super().patch_features(images)

    tokenizer = fitted(Watched(32, 8, 3, vocab_size=8), photos())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokenizer.encode(photos().bfloat16())
    cudnn = torch.backends.cudnn
    assert seen == [(cudnn.enabled, cudnn.benchmark, False, False, torch.float32)] * 2


def test_teachers_may_multiply_in_tf32_and_distances_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, seen = torch.backends.cuda.matmul, []
    teacher = build_teacher("mapet-micro-fashion-mnist")
    output = teacher.stage_output

    def watched(images: torch.Tensor) -> torch.Tensor:
        seen.append((torch.backends.cudnn.allow_tf32, matmul.allow_tf32))
        return output(images)

    monkeypatch.setattr(teacher, "stage_output", watched)
    with full_precision(torch.device("cpu")):
        before = torch.backends.cudnn.allow_tf32, matmul.allow_tf32
        teacher(torch.rand(1, 1, 28, 28))
        assert (torch.backends.cudnn.allow_tf32, matmul.allow_tf32) == before == (False, False)
    assert seen == [(True, True)]


def test_damaged_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MapetError, match="holds no fitted tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer = fitted(KPixels(32, 8, 3, vocab_size=8), photos())
    save_tokenizer(tokenizer, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    save_file({"centroids": tokenizer.centroids + 1}, tmp_path / "tokenizer.safetensors")
    with pytest.raises(MapetError, match="is damaged .its tensors do not match its hash.; restore it or fit it again"):
        load_tokenizer(tmp_path)
    for change in ({"kind": "pixel"}, {"config": {}}, {"config": None}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
        with pytest.raises(MapetError, match="is damaged"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.safetensors").write_bytes(b"cut")
    with pytest.raises(MapetError, match="is damaged"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def timm_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files with random weights of small networks."""
    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for name in ("test_vit", "test_resnet", "test_efficientnet"):
        torch.manual_seed(0)
        files[name] = folder / f"{name}.pth"
        torch.save(timm.create_model(name).state_dict(), files[name])
    return files


def normalised(images: torch.Tensor, name: str) -> torch.Tensor:
    config = timm.get_pretrained_cfg(name).to_dict()
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


@pytest.mark.parametrize(
    ("name", "stage"), [("test_vit", None), ("test_vit", 1), ("test_resnet", 2), ("test_efficientnet", 1)]
)
@pytest.mark.parametrize("spherical", [False, True])
def test_tokenizers_of_timm_teachers(
    name: str, stage: int | None, spherical: bool, timm_weights: dict[str, Path], tmp_path: Path
) -> None:
    file = timm_weights[name]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    teacher = build_teacher(name, stage, f"{file}#sha256={digest}")
    views = photos(4, size=40)
    tokenizer = fitted(KFeatures(teacher, (5, 5), 8, 160, spherical), views)
    ids = tokenizer.encode(views)
    assert ids.shape == (4, 25)
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert torch.equal(loaded.encode(views), ids)
    assert loaded.content_hash == tokenizer.content_hash
    assert loaded.origin == {"weights": str(file), "sha256": digest}
    if spherical:
        cosines = F.normalize(tokenizer.patch_features(views), dim=-1) @ tokenizer.centroids.T
        assert torch.equal(ids, cosines.argmax(-1))


def test_features_of_a_vit_are_those_of_its_patch_tokens(timm_weights: dict[str, Path]) -> None:
    teacher = build_teacher("test_vit", weights=timm_weights["test_vit"])
    whole = timm.create_model("test_vit", num_classes=0).eval()
    whole.load_state_dict(torch.load(timm_weights["test_vit"], weights_only=True), strict=False)
    views = photos(2, size=160)
    tokens = whole.forward_intermediates(normalised(views, "test_vit"), norm=False, output_fmt="NLC")[1][-1]
    assert torch.allclose(KFeatures(teacher, (10, 10), 8, 160).features(views), tokens, atol=1e-4)


def test_stages_are_numbered_as_in_timm(timm_weights: dict[str, Path]) -> None:
    views, name = photos(2, size=160), "test_efficientnet"
    whole = timm.create_model(name, features_only=True).eval()
    state = torch.load(timm_weights[name], weights_only=True)
    whole.load_state_dict({key: tensor for key, tensor in state.items() if key in whole.state_dict()})
    for stage, expected in enumerate(whole(normalised(views, name))):
        assert torch.allclose(build_teacher(name, stage, timm_weights[name])(views), expected, atol=1e-4)


def test_an_exported_grey_network_as_teacher(tiny_vit: Callable[..., Any], tmp_path: Path) -> None:
    backbone = tiny_vit(channels=1, reg_tokens=2).eval()
    export_network(backbone, tmp_path, (0.5,), (0.25,))
    teacher, grey = build_teacher(str(tmp_path)), photos(2, size=28, channels=1)
    expected = backbone.forward_features((grey - 0.5) / 0.25)[:, 3:]
    found = teacher(grey)
    assert found.shape == (2, 32, 4, 4)
    assert torch.allclose(backbone.norm(found.flatten(2).mT), expected, atol=1e-5)
    assert torch.allclose(teacher(grey.expand(-1, 3, -1, -1)), found, atol=1e-3)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(MapetError, match=r"is damaged \(.*\); restore it or export the model again"):
        build_teacher(str(tmp_path))


def test_torchvision_features_on_photographs(mobilenet_weights: Path, photographs: Path) -> None:
    """``features[:14]`` of MobileNetV2, as upstream."""
    images, view = open_images(str(photographs)), PlainView((224, 224), (0.0,) * 3, (1.0,) * 3)
    views = torch.stack([view(images.load(i, Reading(3)))[0] for i in range(4)])
    tokenizer = KFeatures(build_teacher("mobilenet_v2", "features.13", mobilenet_weights), (14, 14), 16, 224)
    network = torchvision.models.mobilenet_v2()
    network.load_state_dict(torch.load(mobilenet_weights, weights_only=True))
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = network.eval().features[:14]((views - mean) / std).flatten(2).transpose(1, 2)
    tokenizer.train()  # the teacher stays in evaluation mode
    assert torch.allclose(tokenizer.features(views), expected, atol=1e-4)


def test_teachers_that_do_not_work_are_refused(timm_weights: dict[str, Path], tmp_path: Path) -> None:
    vit = timm_weights["test_vit"]
    (tmp_path / "cut.pth").write_bytes(vit.read_bytes()[:1000])
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "mobile.pth")
    torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), tmp_path / "deit.pth")
    for name, stage, weights, message in (
        ("mapet-micro-fashon-mnist", None, None, "did you mean 'mapet-micro-fashion-mnist'"),
        ("mobilnet_v2", None, None, r"unknown tokenizer or teacher 'mobilnet_v2'.*'mobilenet_v2'"),
        ("test_vit", None, tmp_path / "none.pth", "cannot be read"),
        ("test_vit", None, tmp_path / "cut.pth", "cannot be read"),
        ("test_vit", None, timm_weights["test_resnet"], "do not fit teacher 'test_vit'"),
        ("test_vit", None, f"{vit}#sha256={'0' * 64}", "have the SHA-256"),
        ("test_vit", "last", vit, "must be a number"),
        ("test_vit", 99, vit, "no stage 99"),
        ("mobilenet_v2", "feature.3", tmp_path / "mobile.pth", r"no stage 'feature.3'.*'features.3'"),
        ("mobilenet_v2", "flatten", tmp_path / "mobile.pth", r"not a spatial map.*earlier --teacher-stage"),
        ("deit_tiny_patch16_224", None, tmp_path / "deit.pth", r"cannot read images of 100 x 100 .*--teacher-size"),
    ):
        with pytest.raises(MapetError, match=message):
            KFeatures(build_teacher(name, stage, weights), (4, 4), 8, 100)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04.", (2**62).to_bytes(8, "little") + b"{}", b'\x12\0\0\0\0\0\0\0{"a":' + b"[" * 10**5, b"cut"],
    ids=["empty", "pickle", "huge header", "deep header", "cut"],
)
def test_teachers_with_damaged_weights_are_refused(
    content: bytes, tiny_vit: Callable[..., Any], tmp_path: Path
) -> None:
    export_network(tiny_vit(channels=1), tmp_path, (0.5,), (0.5,))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-50] if content == b"cut" else content)
    with pytest.raises(MapetError, match=f"{tmp_path} is damaged .*; restore it or export the model again"):
        build_teacher(str(tmp_path))


@pytest.mark.parametrize("mean", ["x", None, [["a"]], []])
def test_teachers_with_a_damaged_normalisation_are_refused(
    mean: object, tiny_vit: Callable[..., Any], tmp_path: Path
) -> None:
    export_network(tiny_vit(channels=1), tmp_path, (0.5,), (0.5,))
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = mean
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MapetError, match=r"config\.json of teacher .* is damaged \(mean "):
        build_teacher(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "no_network"),
        ("name", None),
        ("name", "get_model"),
        ("stage", 3),
        ("library", "x"),
        ("mean", "x"),
        (None, []),
        (None, "text"),
    ],
)
def test_tokenizers_with_a_damaged_teacher_are_refused(key: str | None, value: object, tmp_path: Path) -> None:
    network = torchvision.models.get_model("squeezenet1_1", weights=None)
    about = {
        "library": "torchvision",
        "name": "squeezenet1_1",
        "stage": "features",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    tokenizer = KFeatures(TorchvisionTeacher(about, network), (2, 2), 4, 64)
    tokenizer.centroids.zero_()
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).content_hash == tokenizer.content_hash
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["config"]["teacher"] = value if key is None else {**about, key: value}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MapetError, match=f"tokenizer {tmp_path} is damaged .*; restore it or fit it again"):
        load_tokenizer(tmp_path)

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from mapet import MapetError
from mapet.models.export import export_network
from mapet.tokenizers.base import KTokenizer
from mapet.tokenizers.files import load_tokenizer, save_tokenizer
from mapet.tokenizers.kfeatures import KFeatures
from mapet.tokenizers.kpixels import KPixels
from mapet.tokenizers.teachers import build_teacher


def photos(count: int = 6, size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def fitted(tokenizer: KTokenizer, images: torch.Tensor, seed: int = 0) -> KTokenizer:
    return tokenizer.fit(tokenizer.features(images).flatten(0, 1), seed)


def test_pixels_are_cut_in_raster_order() -> None:
    tokenizer = KPixels(8, 4, 2, vocab_size=3, contrast=False)
    image = torch.arange(2 * 8 * 8, dtype=torch.float32).reshape(1, 2, 8, 8)
    features = tokenizer.features(image)
    assert features.shape == (1, 4, 32)
    assert torch.equal(features[0, 1], image[0, :, :4, 4:].flatten())
    assert torch.equal(features[0, 2], image[0, :, 4:, :4].flatten())


def test_contrast_makes_ids_blind_to_brightness_and_gain() -> None:
    tokenizer = fitted(KPixels(32, 8, 3, vocab_size=8), photos(), seed=0)
    plain = fitted(KPixels(32, 8, 3, vocab_size=8, contrast=False), photos(), seed=0)
    darker = photos() * 0.5
    assert (tokenizer.encode(darker) == tokenizer.encode(photos())).float().mean() > 0.9
    assert (plain.encode(darker) == plain.encode(photos())).float().mean() < 0.9


def test_encode_is_a_protocol_of_ids() -> None:
    tokenizer = fitted(KPixels(32, 8, 3, vocab_size=8), photos(), seed=0)
    ids = tokenizer.encode(photos(3))
    assert ids.shape == (3, 16)
    assert ids.dtype == torch.int64
    assert tokenizer.grid == (4, 4)
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size


def test_saved_and_loaded_gives_the_same_ids_and_hash(tmp_path: Path) -> None:
    tokenizer = fitted(KPixels(32, 8, 3, vocab_size=8), photos(), seed=0)
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert torch.equal(loaded.encode(photos()), tokenizer.encode(photos()))
    assert loaded.content_hash == tokenizer.content_hash
    other = fitted(KPixels(32, 8, 3, vocab_size=8), photos(), seed=1)
    assert other.content_hash != tokenizer.content_hash


def test_ids_are_made_in_full_precision_and_with_cudnn_as_it_was() -> None:
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
    enabled, benchmark = torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark
    assert enabled
    assert seen == [(enabled, benchmark, False, False, torch.float32)] * 2


def test_damaged_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MapetError, match="holds no fitted tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer = fitted(KPixels(32, 8, 3, vocab_size=8), photos(), seed=0)
    save_tokenizer(tokenizer, tmp_path)
    tokenizer.centroids += 1
    from safetensors.torch import save_file

    save_file({"centroids": tokenizer.centroids}, tmp_path / "tokenizer.safetensors")
    with pytest.raises(MapetError, match="changed after fitting"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.safetensors").write_bytes(b"cut")
    with pytest.raises(MapetError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def timm_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights of small networks, in files as timm's users have them."""
    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for name in ("test_vit", "test_resnet", "test_efficientnet"):
        torch.manual_seed(0)
        files[name] = folder / f"{name}.pth"
        torch.save(timm.create_model(name).state_dict(), files[name])
    return files


@pytest.mark.parametrize(
    ("teacher", "stage"),
    [("test_vit", None), ("test_vit", 1), ("test_resnet", None), ("test_resnet", 2), ("test_efficientnet", 1)],
)
def test_timm_teachers_from_a_local_file(
    teacher: str, stage: int | None, timm_weights: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = KFeatures.from_teacher(teacher, (5, 5), 8, teacher_size=160, stage=stage, weights=timm_weights[teacher])
    views = photos(4, size=40)
    fitted(tokenizer, views)
    ids = tokenizer.encode(views)
    assert ids.shape == (4, 25)
    save_tokenizer(tokenizer, tmp_path)
    assert torch.equal(load_tokenizer(tmp_path).encode(views), ids)


def test_spherical_ids_tell_direction_only(timm_weights: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = KFeatures.from_teacher(
        "test_resnet", (5, 5), 8, 160, weights=timm_weights["test_resnet"], spherical=True
    )
    views = photos(4)
    fitted(tokenizer, views)
    features = tokenizer.features(views)
    assert torch.allclose(features.norm(dim=-1), torch.ones(4, 25), atol=1e-5)
    cosines = torch.nn.functional.normalize(tokenizer.patch_features(views), dim=-1) @ tokenizer.centroids.T
    assert torch.equal(tokenizer.encode(views), cosines.argmax(-1))
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).content_hash == tokenizer.content_hash


def test_where_weights_came_from_is_recorded(timm_weights: dict[str, Path], tmp_path: Path) -> None:
    file = timm_weights["test_vit"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    tokenizer = KFeatures.from_teacher("test_vit", (4, 4), 8, 160, weights=f"{file}#sha256={digest}")
    fitted(tokenizer, photos())
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).origin == {"weights": str(file), "sha256": digest}
    with pytest.raises(MapetError, match=f"have the SHA-256 {digest}"):
        build_teacher("test_vit", weights=f"{file}#sha256={'0' * 64}")


def test_an_exported_run_is_a_tokenizer_that_needs_its_folder_no_more(tiny_vit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    exported = tmp_path / "exported"
    exported.mkdir()
    export_network(tiny_vit(depth=3, reg_tokens=2).eval(), exported, (0.5,) * 3, (0.25,) * 3)
    tokenizer = KFeatures.from_teacher(str(exported), (4, 4), 8, 28, stage=1)
    fitted(tokenizer, photos(size=28))
    (tmp_path / "tok").mkdir()
    save_tokenizer(tokenizer, tmp_path / "tok")
    exported.rename(tmp_path / "gone")
    loaded = load_tokenizer(tmp_path / "tok")
    assert torch.equal(loaded.features(photos(size=28)), tokenizer.features(photos(size=28)))
    assert loaded.config["teacher"]["mean"] == [0.5] * 3


def test_vit_teachers_prefix_tokens_are_dropped(timm_weights: dict[str, Path]) -> None:
    tokenizer = KFeatures.from_teacher("test_vit", (10, 10), 8, teacher_size=160, weights=timm_weights["test_vit"])
    whole = timm.create_model("test_vit", num_classes=0).eval()
    whole.load_state_dict(torch.load(timm_weights["test_vit"], weights_only=True), strict=False)
    views = photos(2, size=160)
    mean, std = (torch.tensor(whole.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    tokens = whole.forward_intermediates((views - mean) / std, norm=False, output_fmt="NLC")[1][-1]
    assert torch.allclose(tokenizer.features(views), tokens, atol=1e-4)


def test_stages_are_counted_as_timm_counts_them(timm_weights: dict[str, Path]) -> None:
    views = photos(2, size=160)
    whole = timm.create_model("test_efficientnet", features_only=True).eval()
    state = torch.load(timm_weights["test_efficientnet"], weights_only=True)
    whole.load_state_dict({name: tensor for name, tensor in state.items() if name in whole.state_dict()})
    config = timm.get_pretrained_cfg("test_efficientnet").to_dict()
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for stage, expected in enumerate(whole((views - mean) / std)):
        teacher = build_teacher("test_efficientnet", stage, timm_weights["test_efficientnet"])
        assert torch.allclose(teacher(views), expected, atol=1e-4)


def test_a_grey_backbone_of_ones_own_as_teacher(tiny_vit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    backbone = tiny_vit(channels=1).eval()
    export_network(backbone, tmp_path, (0.5,), (0.25,))
    teacher = build_teacher(f"local-dir:{tmp_path}")
    grey = photos(2, size=28, channels=1)
    expected = backbone.forward_features((grey - 0.5) / 0.25)[:, 1:]
    found = teacher(grey)
    assert found.shape == (2, 32, 4, 4)
    assert torch.allclose(backbone.norm(found.flatten(2).mT), expected, atol=1e-5)
    assert torch.allclose(teacher(grey.expand(-1, 3, -1, -1)), found, atol=1e-3)


def test_real_mobilenet_gives_upstream_features(mobilenet_weights: Path, photographs: Path) -> None:
    """torchvision's own network, cut after ``features[:14]``, on real photographs."""
    from mapet.data.open import open_images
    from mapet.data.views import PlainView

    images = open_images(str(photographs))
    view = PlainView((224, 224), (0.0,) * 3, (1.0,) * 3)
    views = torch.stack([view(images.load(i, 3))[0] for i in range(4)])
    tokenizer = KFeatures.from_teacher(
        "mobilenet_v2", (14, 14), 16, teacher_size=224, stage="features.13", weights=mobilenet_weights
    )
    network = torchvision.models.mobilenet_v2()
    network.load_state_dict(torch.load(mobilenet_weights, weights_only=True))
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = network.eval().features[:14]((views - mean) / std).flatten(2).transpose(1, 2)
    assert expected.shape == (4, 196, 96)
    assert torch.allclose(tokenizer.features(views), expected, atol=1e-4)
    tokenizer.train()
    assert torch.allclose(tokenizer.features(views), expected, atol=1e-4), "a teacher must stay in evaluation"


def test_bad_teachers_are_refused(timm_weights: dict[str, Path], tmp_path: Path) -> None:
    def build(teacher: str, teacher_size: int = 160, **options: object) -> KFeatures:
        return KFeatures.from_teacher(teacher, (4, 4), 8, teacher_size, **options)  # type: ignore[arg-type]

    with pytest.raises(MapetError, match=r"unknown tokenizer or teacher 'mobilnet_v2'.*'mobilenet_v2'"):
        build("mobilnet_v2")
    with pytest.raises(MapetError, match="do not exist"):
        build("test_vit", weights=tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes(timm_weights["test_vit"].read_bytes()[:1000])
    with pytest.raises(MapetError, match="cannot be read"):
        build("test_vit", weights=tmp_path / "cut.pth")
    with pytest.raises(MapetError, match="do not fit teacher 'test_vit'"):
        build("test_vit", weights=timm_weights["test_resnet"])
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "mobile.pth")
    with pytest.raises(MapetError, match=r"not a spatial map.*earlier --teacher-stage"):
        build("mobilenet_v2", stage="flatten", weights=tmp_path / "mobile.pth")
    with pytest.raises(MapetError, match=r"no stage 'feature.3'"):
        build("mobilenet_v2", stage="feature.3", weights=tmp_path / "mobile.pth")
    with pytest.raises(MapetError, match="must be a number"):
        build("test_vit", stage="last", weights=timm_weights["test_vit"])
    torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), tmp_path / "deit.pth")
    with pytest.raises(MapetError, match=r"'deit_tiny_patch16_224' cannot read images of 100 x 100 .*--teacher-size"):
        build("deit_tiny_patch16_224", teacher_size=100, weights=tmp_path / "deit.pth")
    with pytest.raises(MapetError, match="no stage 99"):
        build("test_vit", stage=99, weights=timm_weights["test_vit"])

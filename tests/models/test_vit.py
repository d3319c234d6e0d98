from __future__ import annotations

import pytest
import torch

from mapet import MapetError
from mapet.models.vit import build_vit


def test_pooled_feature_is_the_mean_of_the_normalised_patches() -> None:
    vit = build_vit("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(vit(images), vit.forward_features(images)[:, 1:].mean(1), atol=1e-6)


def test_unknown_model_suggests_close_names() -> None:
    with pytest.raises(MapetError, match="did you mean 'vit_small_patch16_224'"):
        build_vit("vit_smal_patch16_224", image_size=224)


def test_image_size_must_be_divisible_by_the_patch() -> None:
    with pytest.raises(MapetError, match=r"image size 225 is not divisible by the patch size 16.* 224 or 240"):
        build_vit("vit_tiny_patch16_224", image_size=225)


def test_an_unknown_tag_is_refused() -> None:
    with pytest.raises(MapetError, match="cannot build model 'vit_tiny_patch16_224.foo'"):
        build_vit("vit_tiny_patch16_224.foo", image_size=224)


def test_a_model_that_is_no_vit_is_refused() -> None:
    with pytest.raises(MapetError, match="resnet18"):
        build_vit("resnet18", image_size=224)


def test_unknown_model_argument_is_named() -> None:
    with pytest.raises(MapetError, match="dept"):
        build_vit("vit_tiny_patch16_224", image_size=224, dept=3)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(MapetError, match="vit_tiny_patch16_224"):
        build_vit("vit_tiny_patch16_224", image_size=224, embed_dim=100, num_heads=3)

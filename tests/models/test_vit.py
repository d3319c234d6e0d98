from typing import Any

import pytest
import torch

from mapet import MapetError
from mapet.models.vit import build_vit


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
    with pytest.raises(MapetError, match=says):
        build_vit(name, **{"image_size": 224, **arguments})

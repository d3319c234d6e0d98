from typing import Any

import pytest
import timm
import torch
from torch import nn

from mapet import MapetError
from mapet.inference.tokens import Tokens, read_tokens

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def vit(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **{**small, **changes}).eval()


@torch.no_grad()
def read(network: nn.Module, images: torch.Tensor = IMAGES) -> Tokens:
    return read_tokens(network, images)


@pytest.mark.parametrize(
    ("changes", "prefix"),
    [
        ({}, 1),
        ({"global_pool": "avg"}, 1),
        ({"global_pool": "avg", "fc_norm": False}, 1),
        ({"reg_tokens": 4}, 5),
        ({"class_token": False, "global_pool": "avg"}, 0),
        ({"class_token": False, "reg_tokens": 2, "global_pool": "avg"}, 2),
    ],
)
def test_features_of_a_vit(changes: dict[str, Any], prefix: int) -> None:
    network = vit(**changes)
    tokens = read(network)
    with torch.no_grad():
        features, pooled = network.forward_features(IMAGES), network(IMAGES)
    assert features.shape == (2, prefix + 4 * 6, 32)
    assert tokens.grid == (4, 6)
    assert tokens.patches.equal(features[:, prefix:])
    assert tokens.choose("pooled").equal(pooled)
    assert torch.allclose(tokens.choose("mean"), features[:, prefix:].mean(dim=1), atol=1e-6)
    if changes.get("class_token", True):
        assert tokens.choose("class").equal(features[:, 0])
        assert tokens.choose("class+mean").equal(torch.cat([features[:, 0], tokens.choose("mean")], dim=1))
    else:
        for kind in ("class", "class+mean"):
            with pytest.raises(MapetError, match="features need a class token, which vit_tiny"):
                tokens.choose(kind)


def test_patches_are_in_raster_order() -> None:
    network = vit(depth=0, pos_embed="none")
    images = IMAGES.clone()
    images[0, :, 8:16, 40:48] += 1  # the last patch of the second row
    changed = (read(network, images).patches[0] != read(network).patches[0]).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [11]


SMALL_SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("name", "changes"), [("resnet18", {}), ("mobilenetv3_small_050", {}), ("swin_tiny_patch4_window7_224", SMALL_SWIN)]
)
def test_features_of_networks_with_feature_maps(name: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, **changes).eval()
    images = torch.randn(2, 3, 64, 64)
    tokens = read(network, images)
    with torch.no_grad():
        maps, pooled = network.forward_features(images), network(images)
    if changes:
        maps = maps.permute(0, 3, 1, 2)  # Swin's channels come last
    assert tokens.cls is None
    assert tokens.grid == tuple(maps.shape[2:])
    assert tokens.patches.equal(maps.flatten(2).transpose(1, 2))
    assert tokens.choose("pooled").equal(pooled)
    assert torch.allclose(tokens.choose("mean"), maps.mean(dim=(2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "coat_lite_tiny",  # tokens after a class token that is not declared
        "crossvit_tiny_240",  # a list of two grids
        "efficientvim_m1",  # a list
        "levit_128s",  # fewer tokens than patches
        "pit_ti_224",  # the class token alone
    ],
)
def test_networks_without_a_grid_have_pooled_features(name: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0).eval()
    images = torch.randn(1, *network.pretrained_cfg["input_size"])
    tokens = read(network, images)
    with torch.no_grad():
        assert tokens.choose("pooled").equal(network(images))
    assert (tokens.patches, tokens.grid) == (None, None)
    for kind in ("mean", "patches"):
        with pytest.raises(MapetError, match=f"{kind} features need a grid of patches, which {name} lacks; take"):
            tokens.choose(kind)

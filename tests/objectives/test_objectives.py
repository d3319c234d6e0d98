"""What every objective has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mapet import Ids, MapetError, Mask
from mapet.config.base import settle
from mapet.config.keys import TrainKeys
from mapet.engine.optimizer import build_optimizer
from mapet.models.vit import build_vit
from mapet.objectives.base import Objective
from mapet.objectives.registry import OBJECTIVES, build_objective, build_target
from mapet.objectives.targets import TARGETS

SMALL: dict[str, dict[str, int]] = {
    "mae": {"decoder_depth": 1, "decoder_dim": 8, "decoder_heads": 2},
    "cae": {"regressor_depth": 1, "decoder_depth": 1},
}
EVERY_OBJECTIVE = pytest.mark.parametrize("name", OBJECTIVES)


def make(name: str, backbone: Any, targets: str = "ids", **changes: Any) -> Objective:
    """Return a small objective that predicts 9 ids, 9 features or pixels."""
    target = build_target(name, targets, backbone, 9, "cosine")
    return build_objective(name, backbone, target, **{"args": SMALL.get(name), **changes})


def draw_given(targets: str, images: int, patches: int) -> Tensor | None:
    """Return what a tokenizer or teacher makes of images."""
    values = {"ids": torch.randint(0, 9, (images, patches)), "features": torch.randn(images, patches, 9)}
    return values.get(targets)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(OBJECTIVES)),
    targets=st.sampled_from(sorted(TARGETS)),
    side=st.integers(2, 5),
    patch=st.sampled_from([4, 7]),
    channels=st.sampled_from([1, 3]),
    registers=st.integers(0, 3),
    class_token=st.booleans(),
    no_embed_class=st.booleans(),
    share=st.floats(0, 1),
)
def test_any_size_and_target_works(
    name: str, targets: str, side: int, patch: int, channels: int, registers: int, share: float, **tokens: bool
) -> None:
    backbone = build_vit(
        "vit_tiny_patch16_224",
        image_size=side * patch,
        patch_size=patch,
        channels=channels,
        embed_dim=16,
        depth=2,
        num_heads=2,
        reg_tokens=registers,
        **tokens,
    )
    patches = side * side
    predicted = 1 + int(share * (patches - 2))
    objective = make(name, backbone, targets, mask_ratio=predicted / patches, masking="random")
    images = torch.randn(3, channels, side * patch, side * patch)
    output = objective(images, draw_given(targets, 3, patches))
    width = patch * patch * channels if targets == "pixels" else 9
    assert output["prediction"].shape == (3, objective.targets, width)
    assert output["loss"].isfinite()
    output["loss"].backward()
    assert not [name for name, parameter in objective.named_parameters() if parameter.grad is None]


@EVERY_OBJECTIVE
def test_context_and_targets_may_overlap(name: str, tiny_vit: Callable[..., Any]) -> None:
    """In a mask made by hand; some patches are in neither part."""
    objective = make(name, tiny_vit(), mask_ratio=0.5, masking="random").eval()
    mask = Mask(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]] * 2), torch.tensor([[4, 5, 6, 7, 12, 8, 9, 10]] * 2))
    images, ids = torch.randn(2, 3, 28, 28), torch.randint(0, 9, (2, 16))
    output = objective(images, ids, mask)
    expected = F.cross_entropy(output["prediction"].flatten(0, 1), ids.gather(1, mask.target).flatten())
    assert torch.allclose(output.get("target_loss", output["loss"]), expected)
    output["loss"].backward()


@EVERY_OBJECTIVE
def test_the_outcome_is_the_backbone(name: str, tiny_vit: Callable[..., Any]) -> None:
    backbone = tiny_vit()
    assert make(name, backbone).outcome() is backbone


@EVERY_OBJECTIVE
def test_matrices_alone_are_decayed(name: str, tiny_vit: Callable[..., Any]) -> None:
    objective = make(name, tiny_vit(reg_tokens=2))
    config = settle(TrainKeys, {"data": "d"}, images=100)
    decayed = {
        id(p)
        for group in build_optimizer(objective, config).param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    names = {name for name, parameter in objective.named_parameters() if id(parameter) in decayed}
    assert not names & {"mask_token", "backbone.pos_embed", "backbone.cls_token", "backbone.reg_token"}
    assert {name for name, p in objective.named_parameters() if p.ndim == 2} <= names
    assert all(name.endswith("weight") and "norm" not in name for name in names)


@EVERY_OBJECTIVE
def test_masks_come_from_the_seed_alone(name: str, tiny_vit: Callable[..., Any]) -> None:
    objective = make(name, tiny_vit()).eval()
    images, ids = torch.randn(4, 3, 28, 28), torch.randint(0, 9, (4, 16))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(objective(images, ids)["loss"].item())
    assert losses[0] == losses[1]
    assert (losses[0] == losses[2]) == (name == "raster")


@EVERY_OBJECTIVE
def test_mixed_precision_gives_the_same_loss(name: str, tiny_vit: Callable[..., Any]) -> None:
    objective = make(name, tiny_vit())
    images, ids = torch.randn(4, 3, 28, 28), torch.randint(0, 9, (4, 16))
    mask = objective.draw_mask(4, images.device)
    whole = objective(images, ids, mask)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = objective(images, ids, mask)["loss"]
    assert mixed.dtype == torch.float32
    mixed.backward()
    assert mixed.item() == pytest.approx(whole.item(), rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@EVERY_OBJECTIVE
def test_masks_are_drawn_on_the_device(name: str, tiny_vit: Callable[..., Any]) -> None:
    objective = make(name, tiny_vit()).cuda()
    output = objective(torch.randn(2, 3, 28, 28).cuda(), torch.zeros(2, 16, dtype=torch.long).cuda())
    assert output["prediction"].is_cuda
    assert all(part.is_cuda for part in objective.draw_mask(2, torch.device("cuda")))


def test_published_defaults(tiny_vit: Callable[..., Any]) -> None:
    backbone = tiny_vit(image_size=224, patch_size=16, depth=1)
    built = {name: make(name, backbone) for name in OBJECTIVES}
    assert {name: (each.targets, each.masking, each.default_targets) for name, each in built.items()} == {
        "mapet": (147, "random", "ids"),
        "pim": (147, "random", "ids"),
        "mim": (75, "blockwise", "ids"),
        "raster": (147, "raster", "ids"),
        "mae": (147, "random", "pixels"),
        "simmim": (120, "cells", "pixels"),
        "cae": (98, "blockwise", "ids"),
    }


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("mapett", {}, "unknown objective 'mapett'; did you mean 'mapet'"),
        ("mapet", {"masking": "randm"}, "unknown masking 'randm'; did you mean 'random'"),
        ("mapet", {"mask_ratio": 0.01}, "mask_ratio 0.01 of 16 patches leaves no target; take 0.0625 to 0.938"),
        ("cae", {"mask_ratio": 1.0}, "mask_ratio is 1, so no patch is visible to regress from; take less"),
        ("simmim", {"masking": "random", "args": {"mask_cell": 2}}, "the masking 'random' has no cells"),
        ("mae", {"args": {"decoder_dept": 2}}, "has no argument 'decoder_dept'; did you mean 'decoder_depth'"),
        ("simmim", {"args": {"vocab_size": 2}}, "'simmim' has no argument 'vocab_size'; it takes mask_cell"),
        ("mapet", {"args": {"backbone": 2}}, "'mapet' has no argument 'backbone'; it takes targets_per_image"),
        ("mim", {"args": {"targets_per_image": 2}}, "'mim' has no argument 'targets_per_image'; it takes none"),
        ("mae", {"args": {"decoder_depth": 0}}, "decoder_depth is 0; it must be a whole number of at least 1"),
        ("mae", {"args": {"decoder_dim": "wide"}}, "decoder_dim is 'wide'; it must be a whole number"),
        ("mae", {"args": {"decoder_heads": 5}}, "decoder_dim 512 is not divisible by decoder_heads 5"),
        ("mae", {"args": {"decoder_dim": 10, "decoder_heads": 5}}, "need a width divisible by 4, not 10"),
        ("simmim", {"args": {"mask_cell": 1.5}}, "mask_cell is 1.5"),
        ("cae", {"args": {"regressor_depth": True}}, "regressor_depth is True"),
        ("cae", {"args": {"alignment_weight": -1.0}}, "alignment_weight is -1.0; it must be a number from 0"),
        ("cae", {"args": {"alignment_weight": "two"}}, "alignment_weight is 'two'"),
    ],
)
def test_wrong_arguments_are_refused(
    name: str, changes: dict[str, Any], says: str, tiny_vit: Callable[..., Any]
) -> None:
    with pytest.raises(MapetError, match=says):
        build_objective(name, tiny_vit(), Ids(9), **changes)


@EVERY_OBJECTIVE
def test_targets_of_another_grid_are_refused(name: str, tiny_vit: Callable[..., Any]) -> None:
    objective = make(name, tiny_vit())
    with pytest.raises(MapetError, match=r"shape \(2, 9\), but 2 images of 4 x 4 patches need \(2, 16, \.\.\.\)"):
        objective(torch.zeros(2, 3, 28, 28), torch.zeros(2, 9, dtype=torch.long))

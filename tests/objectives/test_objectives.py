"""What every objective has in common."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mapet import Ids, MapetError, Mask
from mapet.config.base import settle
from mapet.config.keys import TrainKeys
from mapet.engine.optimizer import build_optimizer
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


@EVERY_OBJECTIVE
@pytest.mark.parametrize("targets", ["pixels", *TARGETS])
@pytest.mark.parametrize(
    ("changes", "mask_ratio"),
    [
        ({"channels": 1}, 1 / 16),
        ({"reg_tokens": 2}, 15 / 16),
        ({"class_token": False}, 0.5),
        ({"no_embed_class": True, "reg_tokens": 1, "image_size": 14}, 0.5),
    ],
)
def test_every_objective_predicts_every_target(
    name: str, targets: str, changes: dict[str, Any], mask_ratio: float, tiny_vit: Callable[..., Any]
) -> None:
    objective = make(name, tiny_vit(**changes), targets, mask_ratio=mask_ratio, masking="random")
    channels, side, patches = changes.get("channels", 3), changes.get("image_size", 28), objective.patches
    given = {"ids": torch.randint(0, 9, (3, patches)), "features": torch.randn(3, patches, 9)}.get(targets)
    images = torch.randn(3, channels, side, side)
    output = objective(images, given)
    width = 49 * channels if targets == "pixels" else 9
    assert objective.predict(images, objective.draw_mask(3, images.device)).shape == (3, objective.targets, width)
    assert output["loss"].isfinite()
    output["loss"].backward()
    assert not [key for key, parameter in objective.named_parameters() if parameter.grad is None]


@EVERY_OBJECTIVE
def test_context_and_targets_may_overlap(name: str, tiny_vit: Callable[..., Any]) -> None:
    """In a mask made by hand; some patches are in neither part."""
    objective = make(name, tiny_vit(), mask_ratio=0.5, masking="random").eval()
    mask = Mask(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]] * 2), torch.tensor([[4, 5, 6, 7, 12, 8, 9, 10]] * 2))
    images, ids = torch.randn(2, 3, 28, 28), torch.randint(0, 9, (2, 16))
    output = objective(images, ids, mask)
    expected = F.cross_entropy(objective.predict(images, mask).flatten(0, 1), ids.gather(1, mask.target).flatten())
    assert torch.allclose(output.get("target_loss", output["loss"]), expected)
    output["loss"].backward()


@EVERY_OBJECTIVE
def test_the_outcome_is_the_backbone_and_matrices_alone_are_decayed(name: str, tiny_vit: Callable[..., Any]) -> None:
    objective = make(name, backbone := tiny_vit(reg_tokens=2))
    assert objective.outcome() is backbone
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
        ("mapet", {"args": {"backbone": 2}}, "'mapet' has no argument 'backbone'; it takes targets_per_image"),
        ("mim", {"args": {"targets_per_image": 2}}, "'mim' has no argument 'targets_per_image'; it takes none"),
        ("mae", {"args": {"decoder_depth": 0}}, "decoder_depth is 0; it must be a whole number of at least 1"),
        ("mae", {"args": {"decoder_heads": 5}}, "decoder_dim 512 is not divisible by decoder_heads 5"),
        ("mae", {"args": {"decoder_dim": 10, "decoder_heads": 5}}, "need a width divisible by 4, not 10"),
        ("cae", {"args": {"regressor_depth": True}}, "regressor_depth is True"),
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

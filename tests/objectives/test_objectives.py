"""What holds for every objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mapet import MapetError
from mapet.models.vit import build_vit
from mapet.objectives.registry import OBJECTIVES, build_objective

SMALL: dict[str, dict[str, int]] = {
    "mae": {"decoder_depth": 1, "decoder_dim": 8, "decoder_heads": 2},
    "cae": {"regressor_depth": 1, "decoder_depth": 1},
}


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(OBJECTIVES)),
    side=st.integers(2, 5),
    patch=st.sampled_from([4, 7]),
    channels=st.sampled_from([1, 2, 3, 5]),
    registers=st.integers(0, 3),
    class_token=st.booleans(),
    no_embed_class=st.booleans(),
    share=st.floats(0, 1),
)
def test_any_size_works(
    name: str,
    side: int,
    patch: int,
    channels: int,
    registers: int,
    class_token: bool,
    no_embed_class: bool,
    share: float,
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
        class_token=class_token,
        no_embed_class=no_embed_class,
    )
    prefix = registers + class_token
    tokens = prefix + side * side
    least = prefix + 1 if name == "cae" else max(1, prefix)
    context = min(tokens - 1, least + int(share * (tokens - least)))
    objective = build_objective(name, backbone, 9, context, args=SMALL.get(name))
    images = torch.randn(3, channels, side * patch, side * patch)
    if objective.needs_ids:
        output = objective(images, torch.randint(0, 9, (3, side * side)))
        assert output["logits"].shape == (3, tokens - context, 9)
    else:
        output = objective(images)
        assert output["prediction"].shape == (3, tokens - context, patch * patch * channels)
    output["loss"].backward()
    unused = [name for name, parameter in objective.named_parameters() if parameter.grad is None]
    assert not unused


def test_unknown_names_are_refused_with_the_nearest(tiny_vit: Callable[..., Any]) -> None:
    with pytest.raises(MapetError, match="did you mean 'mapet'"):
        build_objective("mapett", tiny_vit(), 9)
    with pytest.raises(MapetError, match="did you mean 'random'"):
        build_objective("mapet", tiny_vit(), 9, order="randm")


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("mae", {"decoder_dept": 2}, "'mae' has no argument 'decoder_dept'; did you mean 'decoder_depth'"),
        ("simmim", {"vocab_size": 2}, "'simmim' has no argument 'vocab_size'; it takes mask_cell"),
        ("mapet", {"backbone": 2}, "'mapet' has no argument 'backbone'; it takes targets_per_image"),
        ("mae", {"decoder_depth": 0}, "decoder_depth is 0; it must be a whole number of at least 1"),
        ("mae", {"decoder_dim": "wide"}, "decoder_dim is 'wide'; it must be a whole number"),
        ("mae", {"decoder_dim": 12, "decoder_heads": 5}, "decoder_dim 12 is not divisible among 5 decoder_heads"),
        ("mae", {"decoder_dim": 10, "decoder_heads": 5}, "need a width divisible by 4, not 10"),
        ("simmim", {"mask_cell": 1.5}, "mask_cell is 1.5"),
        ("cae", {"regressor_depth": True}, "regressor_depth is True"),
        ("cae", {"alignment_weight": -1.0}, "alignment_weight is -1.0; it must be a number from 0"),
        ("cae", {"alignment_weight": "two"}, "alignment_weight is 'two'"),
    ],
)
def test_arguments_that_cannot_work_are_refused(
    name: str, args: dict[str, Any], says: str, tiny_vit: Callable[..., Any]
) -> None:
    with pytest.raises(MapetError, match=says):
        build_objective(name, tiny_vit(), 9, args=args)


def test_other_refusals(tiny_vit: Callable[..., Any]) -> None:
    with pytest.raises(MapetError, match="mask_cell is given, but the order 'random' has no cells"):
        build_objective("simmim", tiny_vit(), order="random", args={"mask_cell": 2})
    with pytest.raises(MapetError, match="context_tokens is 1, so no patch is visible .* take at least 2"):
        build_objective("cae", tiny_vit(), 9, context_tokens=1)
    with pytest.raises(MapetError, match="patches of one pixel"):
        build_objective("mae", tiny_vit(image_size=4, patch_size=1, channels=1))


def test_published_numbers_of_targets_at_224(tiny_vit: Callable[..., Any]) -> None:
    backbone = tiny_vit(image_size=224, patch_size=16, depth=1)
    found = {name: build_objective(name, backbone, 9).targets for name in OBJECTIVES}
    assert found == {"mapet": 147, "pim": 147, "mim": 75, "raster": 147, "mae": 147, "simmim": 120, "cae": 98}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masks_come_from_the_seed_alone(name: str, tiny_vit: Callable[..., Any]) -> None:
    """As the engine seeds a step: the same seed, the same loss; another seed, other targets."""
    objective = build_objective(name, tiny_vit(), 9, args=SMALL.get(name)).eval()
    images, ids = torch.randn(4, 3, 28, 28), torch.randint(0, 9, (4, 16))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append((objective(images, ids) if objective.needs_ids else objective(images))["loss"].item())
    assert losses[0] == losses[1]
    assert (losses[0] == losses[2]) == (name == "raster")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_mixed_precision(name: str, tiny_vit: Callable[..., Any]) -> None:
    objective = build_objective(name, tiny_vit(), 9, args=SMALL.get(name))
    images, ids = torch.randn(4, 3, 28, 28), torch.randint(0, 9, (4, 16))
    order = objective.draw_order(4, images.device)
    given = (images, ids) if objective.needs_ids else (images,)
    whole = objective(*given, order=order)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = objective(*given, order=order)["loss"]
    assert mixed.dtype == torch.float32
    mixed.backward()
    assert mixed.item() == pytest.approx(whole.item(), rel=0.02)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_position_embeddings_and_lone_vectors_are_not_decayed(name: str, tiny_vit: Callable[..., Any]) -> None:
    from mapet.engine.optimizer import build_optimizer

    objective = build_objective(name, tiny_vit(reg_tokens=2), 9, args=SMALL.get(name))
    groups = build_optimizer(objective, 1e-3, 0.1, 0.99).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {key for key, parameter in objective.named_parameters() if id(parameter) in decayed}
    assert not names & {"mask_token", "backbone.pos_embed", "backbone.cls_token", "backbone.reg_token"}
    matrices = {
        key for key, parameter in objective.named_parameters() if key.endswith("weight") and parameter.ndim == 2
    }
    assert matrices <= names

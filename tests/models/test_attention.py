from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from mapet import MapetError
from mapet.models.attention import attend, use_layouts


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_attend_equals_the_definition(dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mapet.models.attention.cpu_has_bfloat16", lambda: native)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (7, 5, 5))
    mask = torch.rand(7, 5) < 0.6
    mask[:, 0] = True
    scores = (query @ key.transpose(-2, -1) / 8**0.5).masked_fill(~mask, float("-inf"))
    expected = scores.softmax(-1) @ value
    result = attend(query.to(dtype), key.to(dtype), value.to(dtype), mask)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    assert (result.double() - expected).abs().max() < tolerance


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True},
        {"scale_attn_norm": True},
        {"qkv_bias": False},
        {"init_values": 0.1},
        {"reg_tokens": 2},
        {"class_token": False, "global_pool": "avg"},
    ],
)
def test_masked_rows_equal_timms_own_masked_attention(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 0}
    plain = timm.create_model("vit_tiny_patch16_224", **options, **changes).double().eval()
    ours = timm.create_model("vit_tiny_patch16_224", **options, **changes).double().eval()
    ours.load_state_dict(plain.state_dict())
    use_layouts(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    mask = torch.rand(11, 7) < 0.5
    mask[:, 0] = True
    square = F.pad(mask, (0, 4), value=False)
    expected = plain.blocks[0](x, attn_mask=torch.zeros(11, 11).double().masked_fill(~square, float("-inf")))
    assert torch.allclose(ours.blocks[0](x, attn_mask=mask), expected, atol=1e-12)
    assert torch.allclose(ours.blocks[0](x, attn_mask=mask[-3:]), expected[:, -3:], atol=1e-12)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(ours(images), plain(images))


def test_stochastic_depth_draws_one_decision_per_image_for_all_rows(tiny_vit: Callable[..., Any]) -> None:
    block = tiny_vit(drop_path=0.5).blocks[-1].train()
    x = torch.randn(64, 6, 32)
    mask = torch.ones(6, 6, dtype=torch.bool)
    torch.manual_seed(0)
    change = (block(x, attn_mask=mask) - x).abs().amax(-1)
    dropped = change == 0
    assert dropped.any()
    assert (dropped.all(1) | ~dropped.any(1)).all()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("resnet18", {}, "plain timm VisionTransformer"),
        ("vit_tiny_r_s16_p8_224", {}, "HybridEmbed whose patches overlap"),
        ("vit_base_patch16_xp_224", {"depth": 1}, "ParallelScalingBlock"),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}, "position embedding"),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, "dynamic_img_size"),
        ("vit_tiny_patch16_224", {"block_fn": timm.models.vision_transformer.ResPostBlock}, "ResPostBlock"),
    ],
)
def test_backbones_that_cannot_take_a_layout_are_refused(name: str, options: dict[str, Any], says: str) -> None:
    backbone = timm.create_model(name, **options)
    with pytest.raises(MapetError, match=says):
        use_layouts(backbone)

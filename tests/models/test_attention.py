import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from mapet import MapetError
from mapet.models.attention import Layout, additive_mask, attend, use_layouts


@pytest.mark.parametrize(
    ("dtype", "native", "tolerance"),
    [
        (torch.float32, False, 1e-5),
        (torch.float64, False, 1e-12),
        (torch.bfloat16, False, 0.05),
        (torch.bfloat16, True, 0.05),
    ],
)
def test_attend_equals_the_definition(
    dtype: torch.dtype, native: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mapet.models.attention.CPU_HAS_BFLOAT16", native)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (7, 5, 5))
    mask = torch.rand(7, 5) < 0.6
    mask[:, 0] = True
    scores = (query @ key.mT / 8**0.5).masked_fill(~mask, float("-inf"))
    result = attend(query.to(dtype), key.to(dtype), value.to(dtype), additive_mask(mask, dtype))
    assert (result.double() - scores.softmax(-1) @ value).abs().max() < tolerance


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True},
        {"scale_attn_norm": True},
        {"qkv_bias": False},
        {"init_values": 0.1},
        {"reg_tokens": 2},
        {"mlp_layer": timm.layers.SwiGLU, "init_values": 0.1},
    ],
)
def test_rows_of_a_rectangular_mask_equal_those_of_timms_square_one(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 0}
    plain, ours = (timm.create_model("vit_tiny_patch16_224", **options, **changes).double().eval() for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    use_layouts(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    mask = torch.rand(11, 7) < 0.5
    mask[:, 0] = True
    square = F.pad(mask, (0, 4), value=False)
    expected = plain.blocks[0](x, attn_mask=torch.zeros(11, 11).double().masked_fill(~square, float("-inf")))
    mask = additive_mask(mask, x.dtype)
    assert torch.allclose(ours.blocks[0](x, Layout(11, 7, mask)), expected, atol=1e-12)
    assert torch.allclose(ours.blocks[0](x, Layout(11, 7, mask).last(3)), expected[:, -3:], atol=1e-12)
    assert torch.allclose(ours.blocks[0](x, Layout(3, 11)), plain.blocks[0](x)[:, -3:], atol=1e-12)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(ours(images), plain(images))


@pytest.mark.parametrize("changes", [{"init_values": 0.1}, {"proj_drop_rate": 0.2}, {"scale_mlp_norm": True}])
@pytest.mark.parametrize("least", [0, 10**9])
def test_gradients_are_timms(changes: dict[str, Any], least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mapet.models.attention.LEAST_WITHOUT_KEEPING", least)
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 0}
    plain, ours = (timm.create_model("vit_tiny_patch16_224", **options, **changes).double() for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    gradients = []
    for block, layout in ((plain.blocks[0], None), (use_layouts(ours).blocks[0], Layout(11, 11))):
        torch.manual_seed(1)  # of dropout
        block(x, layout).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in block.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-11), name


def test_neither_normalised_nor_activated_rows_of_the_mlp_are_kept(
    tiny_vit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mapet.models.attention.LEAST_WITHOUT_KEEPING", 0)
    block, made = tiny_vit().blocks[0], []
    for module in (block.norm2, block.mlp.act, block.mlp.fc1):
        module.register_forward_hook(lambda module, inputs, output: made.append(weakref.ref(output)))
    result = block(torch.randn(2, 6, 32), Layout(6, 6))
    normalised, hidden, activated = (output() for output in made)
    assert normalised is None
    assert activated is None
    assert hidden is not None
    result.sum().backward()
    assert len(made) == 5  # both were computed again; the product was not
    with torch.no_grad():
        block(torch.randn(2, 6, 32), Layout(6, 6))


def test_stochastic_depth_decides_once_for_all_rows_of_an_image(tiny_vit: Callable[..., Any]) -> None:
    block = tiny_vit(drop_path=0.5).blocks[-1].train()
    x = torch.randn(64, 6, 32)
    dropped = (block(x, Layout(6, 6)) == x).all(dim=-1)
    assert dropped.any()
    assert torch.equal(dropped.all(dim=1), dropped.any(dim=1))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("resnet18", {}, "plain timm VisionTransformer"),
        ("vit_tiny_r_s16_p8_224", {}, "HybridEmbed whose patches overlap"),
        ("vit_base_patch16_xp_224", {"depth": 1}, "ParallelScalingBlock"),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}, "no learned position embedding"),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, "dynamic_img_size"),
        ("vit_tiny_patch16_224", {"block_fn": timm.models.vision_transformer.ResPostBlock}, "ResPostBlock"),
    ],
)
def test_other_backbones_are_refused(name: str, options: dict[str, Any], says: str) -> None:
    backbone = timm.create_model(name, **options)
    with pytest.raises(MapetError, match=says):
        use_layouts(backbone)

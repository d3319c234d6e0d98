"""MAE and SimMIM, compared with those of transformers on copied weights in float64."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mapet import MAE, Mask, SimMIM
from mapet.objectives.base import Objective
from mapet.objectives.patches import patchify

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SIZES |= {"image_size": 28, "patch_size": 7, "layer_norm_eps": 1e-6}

# Renames weights or gradients of transformers.
Converter = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def block_of(theirs: Mapping[str, Tensor], before: str, after: str) -> dict[str, Tensor]:
    """Return a block of a ViT of transformers under timm's names."""
    found: dict[str, Tensor] = {}
    names = {"norm1": "layernorm_before", "attn.proj": "attention.o_proj", "norm2": "layernorm_after"}
    names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for kind in ("weight", "bias"):
        found |= {f"{after}{ours}.{kind}": theirs[f"{before}{name}.{kind}"] for ours, name in names.items()}
        projections = [theirs[f"{before}attention.{part}_proj.{kind}"] for part in "qkv"]
        found[f"{after}attn.qkv.{kind}"] = torch.cat(projections)
    return found


def encoder_of(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder under the objectives' names."""
    found = {
        "backbone.cls_token": theirs["vit.embeddings.cls_token"],
        "backbone.pos_embed": theirs["vit.embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        found[f"backbone.patch_embed.proj.{kind}"] = theirs[f"vit.embeddings.patch_embeddings.projection.{kind}"]
        found[f"backbone.norm.{kind}"] = theirs[f"vit.layernorm.{kind}"]
    blocks = next(name for name in theirs if name.startswith("vit.") and ".0." in name).split(".0.")[0]
    for index in range(2):
        found |= block_of(theirs, f"{blocks}.{index}.", f"backbone.blocks.{index}.")
    return found


def mae_of(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = encoder_of(theirs) | {"mask_token": theirs["decoder.mask_token"]}
    names = {"decoder_embed": "decoder_embed", "decoder_norm": "decoder_norm", "head": "decoder_pred"}
    for kind in ("weight", "bias"):
        found |= {f"{ours}.{kind}": theirs[f"decoder.{name}.{kind}"] for ours, name in names.items()}
    for index in range(2):
        found |= block_of(theirs, f"decoder.decoder_layers.{index}.", f"decoder.{index}.")
    return found


def simmim_of(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Their pixel shuffle takes channels first; our rows of pixels have them last.
    channels_last = torch.arange(147).view(3, 7, 7).permute(1, 2, 0).flatten()
    return encoder_of(theirs) | {
        "mask_token": theirs["vit.embeddings.mask_token"],
        "head.weight": theirs["decoder.0.weight"][channels_last].flatten(1),
        "head.bias": theirs["decoder.0.bias"][channels_last],
    }


def copy_weights(reference: nn.Module, objective: Objective, convert: Converter) -> None:
    """Move the weights away from zeros and ones, so that one in a wrong place shows, and copy them."""
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    objective.load_state_dict(convert(reference.state_dict()))


def assert_equal_gradients(reference: nn.Module, objective: Objective, convert: Converter) -> None:
    theirs = {name: p.grad if p.requires_grad else torch.zeros_like(p) for name, p in reference.named_parameters()}
    expected = convert(theirs)
    for name, parameter in objective.named_parameters():
        if expected[name].any():  # positions of MAE's encoder are fixed there and learned here
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-6, atol=1e-7), name


def test_mae_equals_that_of_transformers(tiny_vit: Callable[..., Any]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    decoder = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = transformers.ViTMAEConfig(
        **SIZES, **{f"decoder_{key}": value for key, value in decoder.items()}, norm_pix_loss=True, mask_ratio=0.75
    )
    reference = transformers.ViTMAEForPreTraining(config)
    reference.decoder.initialize_weights(16)  # the constructor leaves the decoder's positions at zero
    reference = reference.double()
    objective = MAE(tiny_vit(), decoder_depth=2, decoder_dim=24, decoder_heads=3).double()
    copy_weights(reference, objective, mae_of)
    assert (objective.positions - reference.decoder.decoder_pos_embed).abs().max() < 1e-6

    images, noise = torch.randn(3, 3, 28, 28, dtype=torch.float64), torch.rand(3, 16, dtype=torch.float64)
    mask = Mask.split(noise.argsort(dim=1), 12)
    expected, output = reference(images, noise=noise), objective(images, mask=mask)
    prediction = expected.logits.gather(1, mask.target[..., None].expand(-1, -1, 147))
    assert (objective.predict(images, mask) - prediction).abs().max() < 1e-6
    assert output["loss"].item() == pytest.approx(expected.loss.item(), abs=1e-7)
    output["loss"].backward()
    expected.loss.backward()
    assert_equal_gradients(reference, objective, mae_of)


def test_simmim_equals_that_of_transformers(tiny_vit: Callable[..., Any]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, encoder_stride=7)
    reference = transformers.ViTForMaskedImageModeling(config).double().eval()
    objective = SimMIM(tiny_vit()).double().eval()
    copy_weights(reference, objective, simmim_of)

    images = torch.randn(3, 3, 28, 28, dtype=torch.float64)
    mask = objective.draw_mask(3, images.device)
    masked = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, mask.target, True)
    expected, output = reference(images, bool_masked_pos=masked), objective(images, mask=mask)
    prediction = patchify(expected.reconstruction, (7, 7)).gather(1, mask.target[..., None].expand(-1, -1, 147))
    assert (objective.predict(images, mask) - prediction).abs().max() < 1e-10
    assert output["loss"].item() == pytest.approx(expected.loss.item(), rel=1e-7)  # they add 1e-5 to a denominator
    output["loss"].backward()
    expected.loss.backward()
    assert_equal_gradients(reference, objective, simmim_of)


def test_maes_encoder_does_not_see_missing_patches(tiny_vit: Callable[..., Any]) -> None:
    objective = MAE(tiny_vit(), decoder_depth=1, decoder_dim=16, decoder_heads=2).double().eval()
    images = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    mask = objective.draw_mask(2, images.device)
    before = objective.predict(images, mask)
    missing = torch.zeros(2, 16).scatter_(1, mask.target, 1.0).view(2, 1, 4, 4)
    changed = images + missing.repeat_interleave(7, 2).repeat_interleave(7, 3)
    assert torch.equal(objective.predict(changed, mask), before)
    assert not torch.equal(objective.predict(images + 0.1, mask), before)


def test_simmim_masks_cells_of_the_published_size_and_number(tiny_vit: Callable[..., Any]) -> None:
    backbone = tiny_vit(image_size=224, patch_size=16, depth=1)
    objective = SimMIM(backbone)
    target = objective.draw_mask(50, torch.device("cpu")).target
    cells = torch.zeros(50, 196, dtype=torch.bool).scatter_(1, target, True).view(50, 7, 2, 7, 2).sum((2, 4))
    assert cells.unique().tolist() == [0, 4]  # 32 pixels, all or nothing
    assert (cells > 0).sum((1, 2)).unique().tolist() == [30]  # ceil(0.6 * 49)
    assert SimMIM(backbone, mask_cell=1).targets == 118  # ceil(0.6 * 196)
    assert SimMIM(tiny_vit(image_size=35)).targets == 15  # cells do not tile 5 x 5 patches

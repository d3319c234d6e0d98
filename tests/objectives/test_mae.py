from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mapet import MAE
from mapet.objectives.patches import patchify


def block_from_transformers(theirs: Mapping[str, Tensor], before: str, after: str) -> dict[str, Tensor]:
    """A block of transformers' ViTs under timm's names."""
    found: dict[str, Tensor] = {}
    names = {
        "norm1": "layernorm_before",
        "attn.proj": "attention.o_proj",
        "norm2": "layernorm_after",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for kind in ("weight", "bias"):
        found |= {f"{after}{ours}.{kind}": theirs[f"{before}{name}.{kind}"] for ours, name in names.items()}
        parts = [theirs[f"{before}attention.{part}_proj.{kind}"] for part in "qkv"]
        found[f"{after}attn.qkv.{kind}"] = torch.cat(parts)
    return found


def vit_from_transformers(theirs: Mapping[str, Tensor], depth: int, blocks: str) -> dict[str, Tensor]:
    """The encoder under the objectives' names."""
    found = {
        "backbone.cls_token": theirs["vit.embeddings.cls_token"],
        "backbone.pos_embed": theirs["vit.embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        found[f"backbone.patch_embed.proj.{kind}"] = theirs[f"vit.embeddings.patch_embeddings.projection.{kind}"]
        found[f"backbone.norm.{kind}"] = theirs[f"vit.layernorm.{kind}"]
    for index in range(depth):
        found |= block_from_transformers(theirs, f"{blocks}.{index}.", f"backbone.blocks.{index}.")
    return found


def test_transformers_loss_prediction_and_gradients(tiny_vit: Callable[..., Any]) -> None:
    """ViTMAEForPreTraining on copied weights with the same noise, in float64."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=28,
        patch_size=7,
        layer_norm_eps=1e-6,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=96,
        norm_pix_loss=True,
        mask_ratio=0.75,
    )
    reference = transformers.ViTMAEForPreTraining(config)
    reference.decoder.initialize_weights(16)  # the constructor leaves the decoder's positions at zero
    reference = reference.double()
    with torch.no_grad():
        for parameter in reference.parameters():  # norms and biases too, so that each is seen to be in its place
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    objective = MAE(tiny_vit(), decoder_depth=2, decoder_dim=24, decoder_heads=3).double()

    theirs = reference.state_dict()
    blocks = next(key for key in theirs if key.startswith("vit.") and ".0." in key).split(".0.")[0]
    ours = vit_from_transformers(theirs, 2, blocks) | {"mask_token": theirs["decoder.mask_token"]}
    for kind in ("weight", "bias"):
        ours[f"decoder_embed.{kind}"] = theirs[f"decoder.decoder_embed.{kind}"]
        ours[f"decoder_norm.{kind}"] = theirs[f"decoder.decoder_norm.{kind}"]
        ours[f"head.{kind}"] = theirs[f"decoder.decoder_pred.{kind}"]
    for index in range(2):
        ours |= block_from_transformers(theirs, f"decoder.decoder_layers.{index}.", f"decoder.{index}.")
    objective.load_state_dict(ours)
    assert (objective.positions - theirs["decoder.decoder_pos_embed"]).abs().max() < 1e-6

    images, noise = torch.randn(3, 3, 28, 28, dtype=torch.float64), torch.rand(3, 16, dtype=torch.float64)
    expected = reference(images, noise=noise)
    order = torch.cat([torch.zeros(3, 1, dtype=torch.long), noise.argsort(dim=1) + 1], dim=1)
    output = objective(images, order)
    rows = (order[:, -12:] - 1)[:, :, None].expand(-1, -1, 147)
    assert (output["prediction"] - expected.logits.gather(1, rows)).abs().max() < 1e-6
    assert output["loss"].item() == pytest.approx(expected.loss.item(), abs=1e-7)
    output["loss"].backward()
    expected.loss.backward()
    for mine, other in (
        (objective.backbone.patch_embed.proj, reference.vit.embeddings.patch_embeddings.projection),
        (objective.decoder_embed, reference.decoder.decoder_embed),
        (objective.head, reference.decoder.decoder_pred),
    ):
        assert (mine.weight.grad - other.weight.grad).abs().max() < 1e-6
    assert (objective.mask_token.grad - reference.decoder.mask_token.grad).abs().max() < 1e-6


def test_missing_patches_are_not_seen(tiny_vit: Callable[..., Any]) -> None:
    objective = MAE(tiny_vit(), decoder_depth=1, decoder_dim=16, decoder_heads=2).double().eval()
    images = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    order = objective.draw_order(2, images.device)
    before = objective(images, order)["prediction"]
    missing = torch.zeros(2, 16).scatter_(1, order[:, -objective.targets :] - 1, 1.0).view(2, 1, 4, 4)
    changed = images + missing.repeat_interleave(7, 2).repeat_interleave(7, 3) * torch.randn_like(images)
    assert torch.equal(objective(changed, order)["prediction"], before)
    assert not torch.equal(objective(images + 0.1, order)["prediction"], before)


def test_the_perfect_answer_costs_nothing_and_the_mean_costs_one(tiny_vit: Callable[..., Any]) -> None:
    objective = MAE(tiny_vit(), decoder_depth=1, decoder_dim=16, decoder_heads=2).eval()
    images = torch.randn(2, 3, 28, 28)
    torch.nn.init.zeros_(objective.head.weight)
    assert objective(images)["loss"].item() == pytest.approx(1 - 1 / 147, abs=1e-4)  # variances are unbiased
    # Patches that all look alike can be answered by the bias alone, at whatever brightness and contrast.
    tile = torch.randn(3, 7, 7)
    contrast = torch.rand(2, 1, 4, 4).repeat_interleave(7, 2).repeat_interleave(7, 3) + 0.5
    alike = tile.repeat(1, 4, 4) * contrast + contrast
    pixels = patchify(tile[None], (7, 7))[0, 0]
    with torch.no_grad():
        objective.head.bias.copy_((pixels - pixels.mean()) / pixels.std())
    assert objective(alike)["loss"].item() < 1e-6

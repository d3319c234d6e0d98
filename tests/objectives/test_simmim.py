from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.objectives.test_mae import vit_from_transformers

from mapet import SimMIM


def test_transformers_loss_reconstruction_and_gradients(tiny_vit: Callable[..., Any]) -> None:
    """ViTForMaskedImageModeling on copied weights with the same masks, in float64."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=28,
        patch_size=7,
        encoder_stride=7,
        layer_norm_eps=1e-6,
    )
    reference = transformers.ViTForMaskedImageModeling(config).double().eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    objective = SimMIM(tiny_vit()).double().eval()
    theirs = reference.state_dict()
    ours = vit_from_transformers(theirs, 2, "vit.layers") | {"mask_token": theirs["vit.embeddings.mask_token"]}
    # Their pixel shuffle takes channels first, our rows of pixels have them last.
    shuffle = torch.arange(147).view(3, 7, 7).permute(1, 2, 0).flatten()
    ours["head.weight"] = theirs["decoder.0.weight"][shuffle, :, 0, 0]
    ours["head.bias"] = theirs["decoder.0.bias"][shuffle]
    objective.load_state_dict(ours)

    images = torch.randn(3, 3, 28, 28, dtype=torch.float64)
    order = objective.draw_order(3, images.device)
    masked = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, order[:, -objective.targets :] - 1, True)
    expected = reference(images, bool_masked_pos=masked)
    output = objective(images, order)
    tiles = expected.reconstruction.unfold(2, 7, 7).unfold(3, 7, 7).permute(0, 2, 3, 4, 5, 1).reshape(3, 16, 147)
    rows = (order[:, -objective.targets :] - 1)[:, :, None].expand(-1, -1, 147)
    assert (output["prediction"] - tiles.gather(1, rows)).abs().max() < 1e-10
    # They add 1e-5 to the number of masked pixels.
    assert output["loss"].item() == pytest.approx(expected.loss.item(), rel=1e-7)
    output["loss"].backward()
    expected.loss.backward()
    embedding = reference.vit.embeddings
    assert torch.allclose(objective.mask_token.grad, embedding.mask_token.grad, rtol=1e-6)
    projection = embedding.patch_embeddings.projection
    assert torch.allclose(objective.backbone.patch_embed.proj.weight.grad, projection.weight.grad, rtol=1e-6)


def test_masks_are_cells_of_the_published_size_and_number(tiny_vit: Callable[..., Any]) -> None:
    objective = SimMIM(tiny_vit(image_size=224, patch_size=16, depth=1))
    order = objective.draw_order(50, torch.device("cpu"))
    masked = torch.zeros(50, 196, dtype=torch.bool).scatter_(1, order[:, -objective.targets :] - 1, True)
    cells = masked.view(50, 7, 2, 7, 2).sum((2, 4))
    assert set(cells.unique().tolist()) == {0, 4}  # 32 pixels, all or nothing
    assert (cells > 0).sum((1, 2)).unique().tolist() == [30]  # ceil(0.6 * 49)
    assert SimMIM(tiny_vit(image_size=224, patch_size=16, depth=1), mask_cell=1).targets == 118  # ceil(0.6 * 196)


def test_a_grid_that_cells_do_not_tile(tiny_vit: Callable[..., Any]) -> None:
    objective = SimMIM(tiny_vit(image_size=35), mask_cell=2)
    assert objective.targets == 15
    assert torch.equal(objective.draw_order(2, torch.device("cpu")).sort(dim=1).values, torch.arange(26).expand(2, -1))

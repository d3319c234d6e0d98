from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mapet import CAE, MapetError


def make(tiny_vit: Callable[..., Any], **arguments: Any) -> CAE:
    objective = CAE(tiny_vit(), 11, **arguments).double().eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return objective


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 3, 28, 28, dtype=torch.float64), torch.randint(0, 11, (3, 16))


def attend(x_q: Tensor, x_k: Tensor, x_v: Tensor, block: Any, heads: int) -> Tensor:
    """Softmax attention, written out."""
    wq, wk, wv = block.attention.in_proj_weight.chunk(3)
    bq, bk, bv = block.attention.in_proj_bias.chunk(3)
    q, k, v = x_q @ wq.T + bq, x_k @ wk.T + bk, x_v @ wv.T + bv
    size = q.shape[-1] // heads
    parts = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        weights = (q[:, own] @ k[:, own].T / size**0.5).softmax(dim=-1)
        parts.append(weights @ v[:, own])
    out = block.attention.out_proj
    return torch.cat(parts, dim=-1) @ out.weight.T + out.bias


def test_against_the_paper_one_image_at_a_time(tiny_vit: Callable[..., Any]) -> None:
    """Section 3.1 by loops, with a boolean mask in raster order as the authors' code has it, and timm's own blocks."""
    objective = make(tiny_vit)
    images, ids = batch()
    order = objective.draw_order(3, images.device)
    output = objective(images, ids, order)
    vit = objective.backbone
    cross_entropies, alignments, hits = [], [], []
    for i in range(3):
        mask = torch.zeros(16, dtype=torch.bool)
        mask[order[i, -objective.targets :] - 1] = True
        tokens = vit._pos_embed(vit.patch_embed(images[i : i + 1]))[0]
        keep = torch.cat([torch.tensor([True]), ~mask])
        other = torch.cat([torch.tensor([True]), mask])
        z_visible = vit.norm(vit.blocks(tokens[keep][None]))[0, 1:]
        z_target = vit.norm(vit.blocks(tokens[other][None]))[0, 1:].detach()
        positions = objective.positions[0]
        q = objective.mask_token[0].expand(int(mask.sum()), -1)
        for block in objective.regressor:
            kv, at = torch.cat([z_visible, q]), torch.cat([positions[~mask], positions[mask]])
            seen = attend(
                block.norm_query(q + positions[mask]), block.norm_key(kv + at), block.norm_value(kv), block, 2
            )
            q = block.norm_mlp(q + block.scale_attention.gamma * seen)
            q = q + block.scale_mlp.gamma * block.mlp(q)
        z_masked = objective.regressor_norm(q)
        decoded = objective.decoder((z_masked + positions[mask])[None])[0]
        logits = objective.head(objective.decoder_norm(decoded))
        cross_entropies.append(F.cross_entropy(logits, ids[i][mask]))
        alignments.append(((z_masked - z_target) ** 2).mean())
        hits.append((logits.argmax(-1) == ids[i][mask]).double().mean())
    expected = torch.stack(cross_entropies).mean() + 2 * torch.stack(alignments).mean()
    assert torch.allclose(output["cross_entropy"], torch.stack(cross_entropies).mean(), atol=1e-12)
    assert torch.allclose(output["alignment"].double(), torch.stack(alignments).mean(), atol=1e-6)
    assert torch.allclose(output["loss"], expected, atol=1e-6)
    assert output["accuracy"].item() == pytest.approx(torch.stack(hits).mean().item())
    theirs = torch.autograd.grad(expected, list(objective.parameters()))
    output["loss"].backward()
    for (name, parameter), gradient in zip(objective.named_parameters(), theirs, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6), name


def test_no_gradient_flows_through_the_alignment_target(tiny_vit: Callable[..., Any]) -> None:
    """Of the pixels of masked patches the loss depends on the values, but sends them no gradient."""
    objective = make(tiny_vit)
    images, ids = batch()
    order = objective.draw_order(3, images.device)
    images.requires_grad_(True)
    before = objective(images, ids, order)
    before["loss"].backward()
    masked = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, order[:, -objective.targets :] - 1, True).view(3, 1, 4, 4)
    pixels = masked.repeat_interleave(7, 2).repeat_interleave(7, 3).expand(-1, 3, -1, -1)
    assert (images.grad[pixels] == 0).all()
    assert (images.grad[~pixels] != 0).any()
    after = objective(images.detach() + pixels, ids, order)
    assert torch.equal(after["logits"], before["logits"])
    assert after["alignment"] != before["alignment"]


def test_the_weight_of_the_alignment(tiny_vit: Callable[..., Any]) -> None:
    images, ids = batch()
    order = make(tiny_vit).draw_order(3, images.device)
    for weight in (0.0, 2.0, 5.0):
        output = make(tiny_vit, alignment_weight=weight)(images, ids, order)
        assert output["loss"] == output["cross_entropy"] + weight * output["alignment"]


def test_token_ids_of_another_grid_are_refused(tiny_vit: Callable[..., Any]) -> None:
    with pytest.raises(MapetError, match=r"shape \(3, 9\), but 3 images of 4 x 4 patches need \(3, 16\)"):
        make(tiny_vit)(batch()[0], torch.zeros(3, 9, dtype=torch.long))

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mapet import CAE, Ids, Mask


def make(tiny_vit: Callable[..., Any], **arguments: Any) -> CAE:
    objective = CAE(tiny_vit(), Ids(11), **arguments).double().eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return objective


def draw_batch(objective: CAE) -> tuple[Tensor, Tensor, Mask]:
    torch.manual_seed(1)
    images = torch.randn(3, 3, 28, 28, dtype=torch.float64)
    return images, torch.randint(0, 11, (3, 16)), objective.draw_mask(3, images.device)


def attend(x_q: Tensor, x_k: Tensor, x_v: Tensor, block: Any, heads: int) -> Tensor:
    """Softmax attention, written out."""
    wq, wk, wv = block.attention.in_proj_weight.chunk(3)
    bq, bk, bv = block.attention.in_proj_bias.chunk(3)
    q, k, v = x_q @ wq.T + bq, x_k @ wk.T + bk, x_v @ wv.T + bv
    parts = []
    for q_head, k_head, v_head in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        weights = (q_head @ k_head.T / q_head.shape[-1] ** 0.5).softmax(dim=-1)
        parts.append(weights @ v_head)
    out = block.attention.out_proj
    return torch.cat(parts, dim=-1) @ out.weight.T + out.bias


def test_cae_follows_the_paper_one_image_at_a_time(tiny_vit: Callable[..., Any]) -> None:
    """Section 3.1 in loops, with a boolean mask in raster order as in the authors' code."""
    objective = make(tiny_vit, alignment_weight=3.0)
    images, ids, mask = draw_batch(objective)
    output = objective(images, ids, mask)
    vit, positions = objective.backbone, objective.positions[0]
    of_target, alignments, hits = [], [], []
    for i in range(3):
        masked = torch.zeros(16, dtype=torch.bool).index_fill_(0, mask.target[i], True)
        tokens = vit._pos_embed(vit.patch_embed(images[i : i + 1]))[0]
        class_token = torch.tensor([True])
        z_visible = vit.norm(vit.blocks(tokens[torch.cat([class_token, ~masked])][None]))[0, 1:]
        z_target = vit.norm(vit.blocks(tokens[torch.cat([class_token, masked])][None]))[0, 1:].detach()
        at_keys = torch.cat([positions[~masked], positions[masked]])
        q = objective.mask_token[0].expand(int(masked.sum()), -1)
        for block in objective.regressor:
            kv = torch.cat([z_visible, q])
            at_queries = block.norm_query(q + positions[masked])
            seen = attend(at_queries, block.norm_key(kv + at_keys), block.norm_value(kv), block, 2)
            q = block.norm_mlp(q + block.scale_attention.gamma * seen)
            q = q + block.scale_mlp.gamma * block.mlp(q)
        z_masked = objective.regressor_norm(q)
        decoded = objective.decoder((z_masked + positions[masked])[None])[0]
        logits = objective.head(objective.decoder_norm(decoded))
        of_target.append(F.cross_entropy(logits, ids[i][masked]))
        alignments.append(((z_masked - z_target) ** 2).mean())
        hits.append((logits.argmax(-1) == ids[i][masked]).double().mean())
    target_loss, alignment = torch.stack(of_target).mean(), torch.stack(alignments).mean()
    expected = target_loss + 3 * alignment
    assert torch.allclose(output["target_loss"], target_loss, atol=1e-12)
    assert torch.allclose(output["alignment"].double(), alignment, atol=1e-6)
    assert torch.allclose(output["loss"], expected, atol=1e-6)
    assert output["accuracy"].item() == pytest.approx(torch.stack(hits).mean().item())
    theirs = torch.autograd.grad(expected, list(objective.parameters()))
    output["loss"].backward()
    for (name, parameter), gradient in zip(objective.named_parameters(), theirs, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6), name


def test_the_target_of_the_alignment_gets_no_gradient(tiny_vit: Callable[..., Any]) -> None:
    """The loss depends on the pixels of masked patches and sends them no gradient."""
    objective = make(tiny_vit)
    images, ids, mask = draw_batch(objective)
    before = objective(images.requires_grad_(True), ids, mask)
    before["loss"].backward()
    masked = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, mask.target, True).view(3, 1, 4, 4)
    pixels = masked.repeat_interleave(7, 2).repeat_interleave(7, 3).expand(-1, 3, -1, -1)
    assert (images.grad[pixels] == 0).all()
    assert (images.grad[~pixels] != 0).any()
    after = objective(images.detach() + pixels, ids, mask)
    assert torch.equal(after["target_loss"], before["target_loss"])
    assert after["alignment"] != before["alignment"]

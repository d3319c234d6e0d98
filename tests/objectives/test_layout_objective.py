from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mapet import MIM, PIM, MaPeT, MapetError, Raster
from mapet.models.vit import build_vit


def make(kind: type[MaPeT] = MaPeT, context: int | None = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, **changes}
    return kind(build_vit("vit_tiny_patch16_224", **arguments), 11, context_tokens=context).double().eval()


def batch(objective: Any, count: int = 2, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    height, width = objective.backbone.patch_embed.img_size
    return (
        torch.randn(count, channels, height, width, dtype=torch.float64),
        torch.randint(0, objective.vocab_size, (count, objective.patches)),
    )


def test_upstream_logits_loss_and_gradients(oracle: Callable[..., Any]) -> None:
    """The authors' implementation, recorded: float32 within 1e-5, gradients within 1e-4."""
    import mapet

    recorded = oracle("pretrain")
    objective = mapet.load_upstream(recorded.state_dict, recorded.config)
    tensors = recorded.tensors
    output = objective(tensors["images"], tensors["token_ids"], tensors["order"])
    assert (output["logits"] - tensors["logits"]).abs().max() <= 1e-5
    assert (output["loss"] - tensors["loss"]).abs() <= 1e-5
    output["loss"].backward()
    upstream = {"mask_token": "mask_positional_token", "head.weight": "decoder.weight", "head.bias": "decoder.bias"}
    checked = set()
    for name, parameter in objective.named_parameters():
        their_name = upstream.get(name, name.removeprefix("backbone."))
        parts = [their_name.replace("qkv", part) for part in ("q", "kv")] if "qkv" in name else [their_name]
        expected = torch.cat([tensors[f"grad.{part}"] for part in parts])
        checked |= {f"grad.{part}" for part in parts}
        assert (parameter.grad - expected).abs().max() <= 1e-4, name
    assert checked == {key for key in tensors if key.startswith("grad.")}


@pytest.mark.parametrize("kind", [MaPeT, PIM, Raster])
def test_no_logit_depends_on_its_own_or_a_later_target(kind: type[MaPeT]) -> None:
    """Exactly zero difference in float64, through all blocks; and it does depend on every earlier target."""
    objective = make(kind, context=6)
    images, ids = batch(objective, 1)
    order = objective.draw_order(1, images.device)
    before = objective(images, ids, order)["logits"][0]
    for t in range(objective.targets):
        patch = int(order[0, 6 + t]) - 1
        row, column = divmod(patch, 4)
        changed = images.clone()
        changed[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 1.0
        difference = (objective(changed, ids, order)["logits"][0] - before).abs().amax(-1)
        assert (difference[: t + 1] == 0).all(), f"target {t} leaks"
        assert (difference[t + 1 :] > 0).all(), f"target {t} is not used"


@pytest.mark.parametrize("kind", [MaPeT, PIM, MIM, Raster])
def test_every_logit_depends_on_every_context_patch(kind: type[MaPeT]) -> None:
    objective = make(kind, context=6)
    images, ids = batch(objective, 1)
    order = objective.draw_order(1, images.device)
    before = objective(images, ids, order)["logits"][0]
    for position in range(1, 6):
        row, column = divmod(int(order[0, position]) - 1, 4)
        changed = images.clone()
        changed[0, :, row * 8, column * 8] += 1.0
        assert ((objective(changed, ids, order)["logits"][0] - before).abs().amax(-1) > 0).all()


def test_slots_are_what_mapet_has_over_pim() -> None:
    """The set of positions still to be visited moves MaPeT's logits, and not PIM's."""
    for kind, expected in ((MaPeT, True), (PIM, False)):
        objective = make(kind, context=6)
        images, ids = batch(objective, 1)
        order = objective.draw_order(1, images.device)
        before = objective(images, ids, order)["logits"][0]
        # Shift the last target's position embedding: its slot moves, but earlier queries see no content of it.
        with torch.no_grad():
            objective.backbone.pos_embed[0, order[0, -1]] += 1.0
        moved = (objective(images, ids, order)["logits"][0] - before).abs().amax(-1)
        assert bool((moved[0] > 0).item()) is expected


def test_mim_equals_a_plain_vit_with_mask_tokens() -> None:
    """timm's own blocks, no mask, patches in raster order."""
    objective = make(MIM, context=7)
    images, ids = batch(objective)
    order = objective.draw_order(2, images.device)
    output = objective(images, ids, order)
    vit = objective.backbone
    patches = vit.patch_embed(images)
    masked = torch.zeros(2, 17, dtype=torch.bool).scatter_(1, order[:, 7:], True)[:, 1:, None]
    x = vit._pos_embed(torch.where(masked, objective.mask_token, patches))
    logits = objective.head(vit.norm(vit.blocks(x)))
    expected = logits.gather(1, order[:, 7:, None].expand(-1, -1, 11))
    assert torch.allclose(output["logits"], expected, atol=1e-12)
    assert torch.allclose(output["loss"], F.cross_entropy(logits[:, 1:][masked[..., 0]], ids[masked[..., 0]]))


def test_loss_and_accuracy_are_those_of_the_targets_in_visiting_order() -> None:
    objective = make()
    images, ids = batch(objective, 4)
    order = objective.draw_order(4, images.device)
    output = objective(images, ids, order)
    target_ids = torch.stack([ids[b][order[b, -objective.targets :] - 1] for b in range(4)])
    log_p = output["logits"].log_softmax(-1).gather(2, target_ids[:, :, None])
    assert torch.allclose(output["loss"], -log_p.mean())
    assert output["accuracy"] == (output["logits"].argmax(-1) == target_ids).float().mean()


def test_raster_is_mapet_with_the_identity_order() -> None:
    raster, mapet = make(Raster, 6), make(MaPeT, 6)
    images, ids = batch(raster)
    identity = torch.arange(17).expand(2, -1)
    assert torch.equal(raster(images, ids)["logits"], mapet(images, ids, identity)["logits"])


def test_paper_and_beit_defaults_at_224() -> None:
    for kind, context in ((MaPeT, 50), (PIM, 50), (MIM, 197 - 75), (Raster, 50)):
        objective = make(kind, image_size=224, patch_size=16, depth=1)
        assert objective.context_tokens == context


@pytest.mark.parametrize(
    ("context", "says"),
    [
        (17, "no target is left.*at most 16"),
        (40, "context_tokens is 40, but the image gives 17 tokens"),
        (0, "always belong to the context; take at least 1"),
    ],
)
def test_impossible_contexts_are_refused(context: int, says: str) -> None:
    with pytest.raises(MapetError, match=says):
        make(context=context)


def test_token_ids_of_another_grid_are_refused(tiny_vit: Callable[..., Any]) -> None:
    objective = MaPeT(tiny_vit(), 9)
    with pytest.raises(MapetError, match=r"shape \(2, 9\), but 2 images of 4 x 4 patches need \(2, 16\)"):
        objective(torch.zeros(2, 3, 28, 28), torch.zeros(2, 9, dtype=torch.long))


def test_a_plain_timm_backbone_will_do_and_stays_one() -> None:
    import timm

    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    backbone = timm.create_model("vit_tiny_patch16_224", **options).eval()
    images = torch.randn(2, 3, 32, 32)
    before, keys = backbone(images), list(backbone.state_dict())
    objective = MaPeT(backbone, 9, context_tokens=5)
    objective(images, torch.zeros(2, 16, dtype=torch.long))["loss"].backward()
    assert objective.backbone is backbone
    assert list(backbone.state_dict()) == keys
    assert torch.equal(backbone(images), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_orders_and_masks_live_on_the_device() -> None:
    objective = make().float().cuda()
    images, ids = batch(objective)
    output = objective(images.float().cuda(), ids.cuda())
    assert output["logits"].is_cuda
    assert objective.draw_order(2, torch.device("cuda")).is_cuda


@pytest.mark.parametrize("kind", [MaPeT, PIM])
def test_fewer_targets_are_predicted_as_they_were_among_all(kind: type[MaPeT]) -> None:
    """The cheaper form computes the first targets exactly as the full one, from fewer rows."""
    whole = make(kind)
    images, ids = batch(whole)
    part = kind(whole.backbone, 11, targets_per_image=4).double().eval()
    part.load_state_dict(whole.state_dict())
    order = whole.draw_order(2, images.device)
    first, all_of_them = part(images, ids, order), whole(images, ids, order)
    assert first["logits"].shape[1] == 4
    assert torch.allclose(first["logits"], all_of_them["logits"][:, :4], atol=1e-12)
    assert torch.allclose(
        first["loss"], F.cross_entropy(first["logits"].flatten(0, 1), ids.gather(1, order[:, 5:9] - 1).flatten())
    )
    assert len(part.mask) < len(whole.mask)


def test_more_predictions_than_targets_are_refused() -> None:
    backbone = make().backbone
    with pytest.raises(MapetError, match="targets_per_image is 13, but an image has 12 targets"):
        MaPeT(backbone, 11, targets_per_image=13)

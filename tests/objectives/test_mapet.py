"""MaPeT, PIM, Raster and MIM."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mapet import MIM, PIM, Ids, MaPeT, MapetError, Mask, Raster
from mapet.models.networks import build_vit
from mapet.objectives.mapet import visible_keys


def make(kind: type[MaPeT] = MaPeT, targets: int = 11, **arguments: Any) -> Any:
    """Return an objective in float64 for 4 x 4 patches of 8 x 8 pixels and 11 ids."""
    torch.manual_seed(0)
    backbone = build_vit("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3)
    return kind(backbone, Ids(11), targets / 16, **arguments).double().eval()


def draw_batch(objective: Any, count: int = 2) -> tuple[Tensor, Tensor, Mask]:
    torch.manual_seed(1)
    images = torch.randn(count, 3, 32, 32, dtype=torch.float64)
    return images, torch.randint(0, 11, (count, 16)), objective.draw_mask(count, images.device)


def changed_rows(objective: Any, images: Tensor, ids: Tensor, mask: Mask, patch: int) -> Tensor:
    """Return for each prediction of one image whether it depends on the pixels of a patch."""
    row, column = divmod(patch, 4)
    changed = images.clone()
    changed[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 1.0
    before, after = (objective.predict(pixels, mask)[0] for pixels in (images, changed))
    return (after != before).any(dim=-1)


SIZES = pytest.mark.parametrize(("context", "targets"), [(1, 4), (4, 6), (5, 12), (17, 48), (2, 1)])


@SIZES
def test_each_row_of_mapet_sees_each_position_once(context: int, targets: int) -> None:
    visible = visible_keys(context, targets, targets, slots=True, queries=True)
    assert visible.shape == (context + 3 * targets, context + 2 * targets)
    position_of_key = torch.cat([torch.arange(context + targets), torch.arange(context, context + targets)])
    seen = torch.zeros(len(visible), context + targets, dtype=torch.long)
    seen.index_add_(1, position_of_key, visible.long())
    assert (seen == 1).all()


@SIZES
def test_rows_see_the_keys_of_the_paper(context: int, targets: int) -> None:
    visible = visible_keys(context, targets, targets, slots=True, queries=True)
    tokens = context + targets
    content, slots, queries = (
        [set(row.nonzero()[:, 0].tolist()) for row in part] for part in visible.split([tokens, targets, targets])
    )
    everywhere = set(range(context)) | set(range(tokens, tokens + targets))
    assert all(row == everywhere for row in content[:context] + slots)
    for t in range(targets):
        before = set(range(context + t))
        assert content[context + t] == before | {context + t} | set(range(tokens + t + 1, tokens + targets))
        assert queries[t] == before | set(range(tokens + t, tokens + targets))


@SIZES
def test_pim_has_no_slots_and_mim_sees_everything(context: int, targets: int) -> None:
    tokens = context + targets
    mapet = visible_keys(context, targets, targets, slots=True, queries=True)
    pim = visible_keys(context, targets, targets, slots=False, queries=True)
    assert torch.equal(pim, torch.cat([mapet[:tokens], mapet[-targets:]])[:, :tokens])
    mim = visible_keys(context, targets, targets, slots=True, queries=False)
    assert mim.shape == (tokens, tokens)
    assert mim.all()


@pytest.mark.parametrize("kind", [MaPeT, PIM, MIM, Raster])
def test_predictions_depend_on_the_context_and_on_earlier_targets_only(kind: type[MaPeT]) -> None:
    """Exactly zero difference in float64, through all blocks; targets of MIM do not depend on each other."""
    objective = make(kind)
    images, ids, mask = draw_batch(objective, 1)
    assert all(changed_rows(objective, images, ids, mask, patch).all() for patch in mask.context[0].tolist())
    for t, patch in enumerate(mask.target[0].tolist()):
        later = kind is not MIM
        changed = changed_rows(objective, images, ids, mask, patch)
        assert changed.tolist() == [False] * (t + 1) + [later] * (objective.targets - t - 1)


@pytest.mark.parametrize(("kind", "depends"), [(MaPeT, True), (PIM, False)])
def test_mapet_alone_knows_the_positions_still_to_be_visited(kind: type[MaPeT], depends: bool) -> None:
    objective = make(kind)
    images, _, mask = draw_batch(objective, 1)
    before = objective.predict(images, mask)[0, 0]
    with torch.no_grad():  # the first query sees the slot of the last target, not its content
        objective.backbone.pos_embed[0, mask.target[0, -1] + 1] += 1.0
    assert torch.equal(objective.predict(images, mask)[0, 0], before) is not depends


def test_mim_is_a_plain_vit_with_mask_tokens() -> None:
    """timm's own forward pass, with patches in raster order."""
    objective = make(MIM)
    images, ids, mask = draw_batch(objective)
    output = objective(images, ids, mask)
    vit = objective.backbone
    masked = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, mask.target, True)
    tokens = vit._pos_embed(torch.where(masked[..., None], objective.mask_token, vit.patch_embed(images)))
    logits = objective.head(vit.norm(vit.blocks(tokens)))[:, 1:]
    expected = logits.gather(1, mask.target[..., None].expand(-1, -1, 11))
    assert torch.allclose(objective.predict(images, mask), expected, atol=1e-12)
    assert torch.allclose(output["loss"], F.cross_entropy(logits[masked], ids[masked]))


def test_raster_is_mapet_in_raster_order() -> None:
    raster, mapet = make(Raster), make(MaPeT)
    images, _, _ = draw_batch(raster)
    in_order = Mask.split(torch.arange(16).expand(2, -1), 11)
    assert torch.equal(raster.predict(images, raster.draw_mask(2, images.device)), mapet.predict(images, in_order))


@pytest.mark.parametrize("kind", [MaPeT, PIM])
def test_fewer_predictions_equal_the_first_ones_of_all(kind: type[MaPeT]) -> None:
    whole = make(kind)
    images, ids, mask = draw_batch(whole)
    part = kind(whole.backbone, Ids(11), 11 / 16, targets_per_image=4).double().eval()
    part.load_state_dict(whole.state_dict())
    first = part.predict(images, mask)
    assert torch.allclose(first, whole.predict(images, mask)[:, :4], atol=1e-12)
    loss = F.cross_entropy(first.flatten(0, 1), ids.gather(1, mask.target[:, :4]).flatten())
    assert torch.allclose(part(images, ids, mask)["loss"], loss)
    assert sum(part.rows.values()) == len(part.visible) == len(whole.visible) - 2 * 7  # content and queries
    with pytest.raises(MapetError, match="targets_per_image is 12, but an image has 11 targets; take less"):
        make(kind, targets_per_image=12)

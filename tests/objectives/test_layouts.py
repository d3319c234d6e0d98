from __future__ import annotations

import pytest
import torch

from mapet.objectives.layouts import masked_layout, permuted_layout

SIZES = [(5, 1), (10, 4), (17, 5), (65, 17), (3, 2)]


@pytest.mark.parametrize(("tokens", "context"), SIZES)
def test_mapet_rows_see_every_position_exactly_once(tokens: int, context: int) -> None:
    layout = permuted_layout(tokens, context, slots=True)
    targets = tokens - context
    assert layout.mask.shape == (tokens + 2 * targets, tokens + targets)
    assert (layout.content, layout.slots, layout.predicted) == (tokens, targets, targets)
    # Key k < N is the content of position k; key N + t is the bare position of target t.
    position_of_key = torch.cat([torch.arange(tokens), torch.arange(context, tokens)])
    seen = torch.zeros(len(layout.mask), tokens, dtype=torch.long)
    seen.index_add_(1, position_of_key, layout.mask.long())
    assert (seen == 1).all()


@pytest.mark.parametrize(("tokens", "context"), SIZES)
def test_mapet_groups_see_what_the_paper_says(tokens: int, context: int) -> None:
    mask = permuted_layout(tokens, context, slots=True).mask
    targets = tokens - context
    content, slots, queries = mask.split([tokens, targets, targets])
    expected_slots = set(range(context)) | set(range(tokens, tokens + targets))
    for row in (*content[:context], *slots):
        assert set(row.nonzero()[:, 0].tolist()) == expected_slots
    for t in range(targets):
        before = set(range(context + t))
        assert set(content[context + t].nonzero()[:, 0].tolist()) == (
            before | {context + t} | set(range(tokens + t + 1, tokens + targets))
        )
        assert set(queries[t].nonzero()[:, 0].tolist()) == before | set(range(tokens + t, tokens + targets))


@pytest.mark.parametrize(("tokens", "context"), SIZES)
def test_pim_is_mapet_without_slots(tokens: int, context: int) -> None:
    mapet = permuted_layout(tokens, context, slots=True).mask
    pim = permuted_layout(tokens, context, slots=False)
    targets = tokens - context
    keep_rows = torch.cat([mapet[:tokens], mapet[-targets:]])
    assert torch.equal(pim.mask, keep_rows[:, :tokens])
    assert (pim.content, pim.slots, pim.predicted) == (tokens, 0, targets)


def test_mim_sees_everything_and_predicts_from_the_masks() -> None:
    layout = masked_layout(10, 4)
    assert layout.mask.all()
    assert layout.mask.shape == (10, 10)
    assert (layout.content, layout.slots, layout.predicted) == (4, 0, 6)


@pytest.mark.parametrize("slots", [True, False])
def test_fewer_predictions_leave_out_rows_and_change_none(slots: bool) -> None:
    tokens, context, predicted = 17, 5, 4
    whole, part = (permuted_layout(tokens, context, slots=slots, predicted=n) for n in (None, predicted))
    content, bare = context + predicted, tokens - context if slots else 0
    assert (part.content, part.slots, part.predicted) == (content, bare, predicted)
    rows = [*range(content), *range(tokens, tokens + bare), *range(tokens + bare, tokens + bare + predicted)]
    keys = [*range(content), *range(tokens, tokens + bare)]
    assert torch.equal(part.mask, whole.mask[rows][:, keys])
    # No row that is left sees what is left out.
    others = [key for key in range(tokens) if key not in keys]
    assert not whole.mask[rows][:, others].any()

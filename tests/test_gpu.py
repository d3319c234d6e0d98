"""What a GPU computes is what the CPU computes, eager and compiled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import curve, pretrain_tiny, records
from torchvision.transforms import v2

from mapet import Mask
from mapet.data.colour import draw_jitter, jittered
from mapet.objectives.registry import OBJECTIVES, build_objective, build_target

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_are_those_of_the_cpu(name: str, compiled: bool, tiny_vit: Callable[..., Any]) -> None:
    backbone = tiny_vit()
    objective = build_objective(name, backbone, build_target(name, OBJECTIVES[name].default_targets, backbone, 9, ""))
    objective.eval()
    images, ids = torch.randn(4, 3, 28, 28), torch.randint(0, 9, (4, 16))
    mask = objective.draw_mask(4, images.device)
    found = []
    for device in ("cpu", "cuda"):
        objective.to(device).zero_grad()
        forward = torch.compile(objective, dynamic=False) if compiled and device == "cuda" else objective
        loss = forward(images.to(device), ids.to(device), Mask(*(part.to(device) for part in mask)))["loss"]
        loss.backward()
        found.append((loss.item(), [p.grad.cpu() for p in objective.parameters() if p.grad is not None]))
    (one, gradients), (other, theirs) = found
    assert one == pytest.approx(other, rel=1e-4)
    assert all(
        torch.allclose(a, b, atol=1e-3 * float(a.abs().max()) + 1e-6) for a, b in zip(gradients, theirs, strict=True)
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masks_are_drawn_on_the_device(name: str, tiny_vit: Callable[..., Any]) -> None:
    backbone = tiny_vit()
    objective = build_objective(name, backbone, build_target(name, OBJECTIVES[name].default_targets, backbone, 9, ""))
    mask = objective.cuda().draw_mask(2, torch.device("cuda"))
    assert all(part.is_cuda for part in mask)
    both = torch.cat(list(mask), dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(16, device="cuda").expand(2, -1))


def test_colours_are_those_of_the_cpu() -> None:
    images = torch.rand(8, 3, 32, 32)
    drawn = torch.stack([draw_jitter(v2.ColorJitter(0.4, 0.4, 0.4), seed) for seed in range(8)])
    assert torch.allclose(jittered(images.cuda(), drawn.cuda()).cpu(), jittered(images, drawn), atol=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_runs_learn_and_resume(precision: str, compiled: bool, digits: Path, tmp_path: Path) -> None:
    options = {"precision": precision, "compile": compiled, "checkpoint_every": 10, "steps": 20}
    result = pretrain_tiny(digits, tmp_path / "run", **options)
    assert result.finished
    assert next(result.task.parameters()).is_cuda
    losses = [record["loss"] for record in curve(tmp_path / "run")]
    assert all(0 < record["mfu"] < 1 for record in records(tmp_path / "run"))
    assert losses[-1] < losses[0]
    again = pretrain_tiny(digits, tmp_path / "again", **options)
    assert losses == pytest.approx([record["loss"] for record in curve(again.folder.root)], rel=0.02)

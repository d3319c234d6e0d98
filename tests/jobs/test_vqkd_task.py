from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mapet.jobs.tokenizer.vqkd_objective import DEAD_AFTER_SHARES, VQKDObjective
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mapet
from mapet import MapetError
from mapet.engine.optimizer import build_optimizer
from mapet.tokenizers.vqkd import VQKD

TARGET_DIM = 24


def make(vocab_size: int = 40, decoder_depth: int = 1, **changes: Any) -> VQKDObjective:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "code_dim": 6, **changes}
    return VQKDObjective(VQKD(vocab_size=vocab_size, **sizes), TARGET_DIM, decoder_depth)


def batch(count: int = 4, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and features of a random network on their patches."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    teacher = torch.randn(TARGET_DIM, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    return images, F.conv2d(images, teacher, stride=4).tanh().flatten(2).mT


def with_codes(objective: VQKDObjective, spread: float = 0.02) -> VQKDObjective:
    """Give it codes in tufts near some features of ``batch()``: equal to none, and some nearest to none."""
    points = objective.tokenizer(batch()[0]).detach().flatten(0, 1)
    drawn = points[torch.randperm(len(points))[:10]].repeat(4, 1)
    objective.tokenizer.codebook.copy_(F.normalize(drawn + spread * torch.randn_like(drawn), dim=-1))
    return objective


def gradients(objective: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in objective.named_parameters()}  # type: ignore[union-attr]


def test_gradients_pass_from_code_to_feature_as_if_they_were_one() -> None:
    objective = with_codes(make()).double().eval()
    images, targets = (x.double() for x in batch())
    objective(images, targets)["loss"].backward()
    found = gradients(objective)
    assert all(bool(gradient.abs().sum() > 0) for name, gradient in found.items() if "qkv.bias" not in name)

    objective.zero_grad()
    features = objective.tokenizer(images)
    codebook = objective.tokenizer.codebook
    codes = codebook[(features @ codebook.T).argmax(-1)].requires_grad_()
    assert (codes - features).norm(dim=-1).min() > 1e-3
    rebuilt = objective.decode(codes)
    cosine = (rebuilt * targets).sum(-1) / (rebuilt.norm(dim=-1) * targets.norm(dim=-1))
    (1 - cosine).mean().backward()
    commitment = 2 * (features - codes).detach() / features.numel()
    features.backward(codes.grad + commitment)
    for name, expected in gradients(objective).items():
        assert torch.allclose(found[name], expected, rtol=1e-9, atol=1e-12), name


def test_loss_cosine_and_codes_used_are_what_they_say() -> None:
    objective = with_codes(make()).eval()
    images, targets = batch()
    output = objective(images, targets)
    features = objective.tokenizer(images)
    ids = objective.tokenizer.encode(images / 2 + 0.5)  # clamped by nobody: no resizing takes place
    codes = objective.tokenizer.codebook[ids]
    rebuilt = objective.decode(codes)
    cosine = torch.stack([F.cosine_similarity(a, b, dim=0) for a, b in zip(rebuilt[1], targets[1], strict=True)])
    assert torch.allclose(objective(images[1:2], targets[1:2])["cosine"], cosine.mean(), atol=1e-6)
    commitment = (codes - features).square().sum(-1).mean() / 6
    assert torch.allclose(output["loss"], 1 - output["cosine"] + commitment, atol=1e-6)
    assert commitment > 1e-5
    assert output["codes_used"] == len(ids.unique()) / 40
    assert not output["cosine"].requires_grad


def test_codes_move_as_the_formula_says() -> None:
    objective = with_codes(make()).train()
    images, targets = batch()
    points = objective.tokenizer(images).detach().flatten(0, 1).double().numpy()
    expected = objective.tokenizer.codebook.double().numpy().copy()
    nearest = (points @ expected.T).argmax(1)
    objective(images, targets)
    for code in range(40):
        members = points[nearest == code]
        if len(members):
            mean = members.mean(0)
            moved = 0.99 * expected[code] + 0.01 * mean / np.linalg.norm(mean)
            expected[code] = moved / np.linalg.norm(moved)
    assert 5 < len(set(nearest)) < 40
    assert np.allclose(objective.tokenizer.codebook.numpy(), expected, atol=1e-6)
    assert np.array_equal(objective.idle.numpy(), np.where(np.isin(range(40), nearest), 0, 64))


@pytest.mark.parametrize(("vocab_size", "distinct"), [(40, 40), (100, 64)])
def test_first_codes_are_features_of_the_first_batch(vocab_size: int, distinct: int) -> None:
    objective = make(vocab_size)
    points = objective.tokenizer(batch()[0]).detach().flatten(0, 1)
    objective.decay = 1.0
    objective(*batch())
    cosine = objective.tokenizer.codebook @ points.T
    assert cosine.amax(1).min() > 1 - 1e-6
    chosen = len(cosine.argmax(1).unique())
    # Drawn with replacement where there are too few points, and without where there are enough.
    assert chosen == distinct if vocab_size == 40 else 30 < chosen < distinct


def test_codes_of_a_loaded_tokenizer_are_kept() -> None:
    objective = with_codes(make()).train()
    before = objective.tokenizer.codebook.clone()
    objective(*batch())
    assert (objective.tokenizer.codebook * before).sum(-1).min() > 0.99


def test_a_dead_code_is_moved_onto_a_feature_and_others_are_not() -> None:
    objective = make(65).train()
    points = objective.tokenizer(batch()[0]).detach().flatten(0, 1)
    lonely = -points[0]
    codebook = objective.tokenizer.codebook.copy_(torch.cat([points, lonely[None]]))
    # 64 patches a step: after this many steps they are 100 for each of the 65 codes.
    for _ in range(-(-100 * 65 // 64)):
        assert torch.equal(codebook[64], lonely)
        objective(*batch())
    assert (points @ codebook[64]).max() > 1 - 1e-6
    assert (objective.idle == 0).all()
    assert torch.allclose(codebook[:64], points, atol=1e-6)


def test_evaluation_changes_nothing() -> None:
    objective = with_codes(make()).eval()
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    objective(*batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())
    objective.train()(*batch())
    assert not torch.equal(objective.tokenizer.codebook, before["tokenizer.codebook"])
    untrained = make().eval()
    untrained(*batch())
    assert untrained.tokenizer.codebook.isnan().all()


def test_codes_stay_float32_under_autocast() -> None:
    objective = with_codes(make(), spread=0.001).train()
    codebook = objective.tokenizer.codebook.clone()
    with torch.autocast("cpu", torch.bfloat16):
        features = objective.tokenizer(batch()[0])
        output = objective(*batch())
    assert output["loss"].dtype == torch.float32
    # bfloat16 could not tell one tuft's codes from each other.
    hit = (features @ codebook.T).argmax(-1).unique()
    assert torch.equal(torch.nonzero(objective.idle == 0)[:, 0], hit)


def step(objective: VQKDObjective, optimizer: torch.optim.Optimizer, number: int, count: int = 4) -> float:
    torch.manual_seed(number)
    output = objective(*batch(count, seed=number))
    optimizer.zero_grad()
    output["loss"].backward()
    optimizer.step()
    return output["loss"].item()


def test_a_resumed_run_is_the_run() -> None:
    """Over a step in which codes die, which the state must foresee."""
    objective = make(400).train()
    optimizer = build_optimizer(objective, 1e-3, 0.05, 0.95)
    for number in range(6):
        step(objective, optimizer, number)
    objective.idle.fill_(DEAD_AFTER_SHARES * 400 - 2 * 64)

    again = make(400).train()
    again.load_state_dict(objective.state_dict())
    optimizer_again = build_optimizer(again, 1e-3, 0.05, 0.95)
    optimizer_again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(6, 10):
        assert step(again, optimizer_again, number) == step(objective, optimizer, number)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, objective.state_dict()[name]), name
    assert objective.idle.max() <= 3 * 64, "what was not hit before the second of the four steps was not moved"


def test_distillation_learns_and_uses_its_codes() -> None:
    objective = make(32, decoder_depth=1).train()
    optimizer = build_optimizer(objective, 3e-3, 0.05, 0.95)
    images, targets = batch(8)
    seen = []
    for number in range(150):
        torch.manual_seed(number)
        output = objective(images, targets)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        seen.append((output["cosine"].item(), output["codes_used"].item()))
    assert seen[0][0] < 0.2
    assert seen[-1][0] > 0.8
    assert seen[-1][1] > 0.7


def train_share(rank: int, world: int) -> list[torch.Tensor]:
    """Five steps on this process's share of each batch; return codes, idle and what was used."""
    objective = make(96).double().train()
    trained = DistributedDataParallel(objective) if world > 1 else objective
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    used = []
    for number in range(5):
        images, targets = (x.double().chunk(world)[rank] for x in batch(8, seed=number))
        torch.manual_seed(100 * rank + number)  # the engine seeds each process differently
        if number == 3:
            objective.idle[:10] = DEAD_AFTER_SHARES * 96
        output = trained(images, targets)
        used.append(output["codes_used"])
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
    return [objective.tokenizer.codebook, objective.idle, torch.stack(used)]


PROCESS = """
import sys
import torch
from tests.objectives.test_vqkd import train_share

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.save(train_share(rank, 2), f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_make_the_codes_of_one(tmp_path: Path) -> None:
    """Drawn, moved and revived over the joint batch, through five steps with gradients averaged."""
    paths = os.pathsep.join([str(Path(mapet.__file__).parents[1]), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)
    ]
    codebook, idle, used = train_share(0, 1)
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for other in both:
        assert torch.allclose(other[0], codebook, rtol=0, atol=1e-9)
        assert torch.equal(other[1], idle)
        assert torch.equal(other[2], used)
    assert torch.equal(both[0][0], both[1][0])


def test_vectors_are_spared_weight_decay() -> None:
    objective = make()
    decayed = {
        id(p)
        for group in build_optimizer(objective, 1e-3, 0.05, 0.95).param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    names = {name for name, parameter in objective.named_parameters() if id(parameter) not in decayed}
    lone = {f"{part}.{name}" for part in ("tokenizer.encoder", "decoder") for name in ("pos_embed", "cls_token")}
    assert lone <= names
    assert {name for name in names if name not in lone} == {
        name for name, parameter in objective.named_parameters() if parameter.ndim == 1
    }


def test_features_of_another_grid_are_refused() -> None:
    images, targets = batch()
    with pytest.raises(MapetError, match=r"shape \(4, 9, 24\), but 4 images of this tokenizer need \(4, 16, 24\)"):
        make()(images, targets[:, :9])

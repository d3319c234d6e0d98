import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.conftest import under_torchrun
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mapet
from mapet.engine.optimizer import build_optimizer
from mapet.jobs.tokenizer.vqkd_task import DEAD_AFTER_SHARES, VQKDTask
from mapet.tokenizers.vqkd import VQKD

TARGET_DIM = 24


def make(vocab_size: int = 40) -> VQKDTask:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "code_dim": 6}
    return VQKDTask(VQKD(vocab_size=vocab_size, **sizes), TARGET_DIM, decoder_depth=1)


def batch(count: int = 4, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and features of a random network on their patches."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    teacher = torch.randn(TARGET_DIM, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    return images, F.conv2d(images, teacher, stride=4).tanh().flatten(2).mT


def points_of(task: VQKDTask) -> torch.Tensor:
    """Features of the patches of ``batch()``."""
    return task.tokenizer(batch()[0]).detach().flatten(0, 1)


def with_codes(task: VQKDTask, spread: float = 0.02) -> VQKDTask:
    """Set codes near some features of ``batch()``, several to a feature, so that some codes are not used."""
    points = points_of(task)
    drawn = points[torch.randperm(len(points))[:10]].repeat(4, 1)
    task.tokenizer.codebook.copy_(F.normalize(drawn + spread * torch.randn_like(drawn), dim=-1))
    return task


def gradients(task: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in task.named_parameters()}  # type: ignore[union-attr]


def test_gradients_are_straight_through() -> None:
    task = with_codes(make()).double().eval()
    images, targets = (x.double() for x in batch())
    task(images, targets)["loss"].backward()
    found = gradients(task)
    assert all(bool(gradient.abs().sum() > 0) for name, gradient in found.items() if "qkv.bias" not in name)

    task.zero_grad()
    features, codebook = task.tokenizer(images), task.tokenizer.codebook
    codes = codebook[(features @ codebook.T).argmax(-1)].requires_grad_()
    assert (codes - features).norm(dim=-1).min() > 1e-3
    rebuilt = task.decode(codes)
    cosine = (rebuilt * targets).sum(-1) / (rebuilt.norm(dim=-1) * targets.norm(dim=-1))
    (1 - cosine).mean().backward()
    commitment = 2 * (features - codes).detach() / features.numel()
    features.backward(codes.grad + commitment)
    for name, expected in gradients(task).items():
        assert torch.allclose(found[name], expected, rtol=1e-9, atol=1e-12), name


def test_loss_cosine_and_codes_used() -> None:
    task = with_codes(make()).eval()
    images, targets = batch()
    output, features = task(images, targets), task.tokenizer(images)
    ids = task.tokenizer.encode(images / 2 + 0.5)
    codes = task.tokenizer.codebook[ids]
    cosine = F.cosine_similarity(task.decode(codes), targets, dim=-1).mean()
    commitment = (codes - features).square().sum(-1).mean() / 6
    assert commitment > 1e-5
    assert torch.allclose(output["cosine"], cosine, atol=1e-6)
    assert torch.allclose(output["loss"], 1 - cosine + commitment, atol=1e-6)
    assert output["codes_used"] == len(ids.unique()) / 40


def test_codes_move_as_upstreams() -> None:
    task = with_codes(make()).train()
    points, expected = points_of(task).double().numpy(), task.tokenizer.codebook.double().numpy().copy()
    nearest = (points @ expected.T).argmax(1)
    task(*batch())
    for code in set(nearest):
        mean = points[nearest == code].mean(0)
        moved = 0.99 * expected[code] + 0.01 * mean / np.linalg.norm(mean)
        expected[code] = moved / np.linalg.norm(moved)
    assert 5 < len(set(nearest)) < 40
    assert np.allclose(task.tokenizer.codebook.numpy(), expected, atol=1e-6)
    assert np.array_equal(task.idle.numpy(), np.where(np.isin(range(40), nearest), 0, 64))


@pytest.mark.parametrize("vocab_size", [40, 100])
def test_first_codes_are_features_of_the_first_batch(vocab_size: int) -> None:
    task = make(vocab_size)
    points, task.decay = points_of(task), 1.0
    task(*batch())
    cosine = task.tokenizer.codebook @ points.T
    assert cosine.amax(1).min() > 1 - 1e-6
    different = len(cosine.argmax(1).unique())
    # Of the 64 points, 40 are drawn without replacement, and 100 with replacement.
    assert different == 40 if vocab_size == 40 else 30 < different < 64


def test_dead_codes_are_moved_onto_features() -> None:
    task = make(65).train()
    points = points_of(task)
    lonely = -points[0]
    codebook = task.tokenizer.codebook.copy_(torch.cat([points, lonely[None]]))
    # After so many steps of 64 patches there were 100 patches for each of the 65 codes.
    for _ in range(-(-100 * 65 // 64)):
        assert torch.equal(codebook[64], lonely)
        task(*batch())
    assert (points @ codebook[64]).max() > 1 - 1e-6
    assert (task.idle == 0).all()
    assert torch.allclose(codebook[:64], points, atol=1e-6)


def test_evaluation_changes_nothing() -> None:
    task = with_codes(make()).eval()
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    task(*batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
    task.train()(*batch())
    moved = task.tokenizer.codebook
    assert not torch.equal(moved, before["tokenizer.codebook"])
    assert (moved * before["tokenizer.codebook"]).sum(-1).min() > 0.99, "training begins with the codes"
    untrained = make().eval()
    untrained(*batch())
    assert untrained.tokenizer.codebook.isnan().all()


def test_codes_are_float32_under_autocast() -> None:
    task = with_codes(make(), spread=0.001).train()
    codebook = task.tokenizer.codebook.clone()
    with torch.autocast("cpu", torch.bfloat16):
        features = task.tokenizer(batch()[0])
        output = task(*batch())
    assert output["loss"].dtype == torch.float32
    # In bfloat16 neighbouring codes would be equal.
    used = (features @ codebook.T).argmax(-1).unique()
    assert torch.equal(torch.nonzero(task.idle == 0)[:, 0], used)


def train_share(rank: int, world: int) -> list[torch.Tensor]:
    """Take five steps on this process's share of each batch; return codes, idle and the shares of codes used."""
    task = make(96).double().train()
    trained = DistributedDataParallel(task) if world > 1 else task
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    used = []
    for number in range(5):
        images, targets = (x.double().chunk(world)[rank] for x in batch(8, seed=number))
        torch.manual_seed(100 * rank + number)  # the trainer gives each process its own seed
        if number == 3:
            task.idle[:10] = DEAD_AFTER_SHARES * 96
        output = trained(images, targets)
        used.append(output["codes_used"])
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
    return [task.tokenizer.codebook, task.idle, torch.stack(used)]


PROCESS = """
import sys
import torch
from mapet.engine.parallel import join_processes
from tests.jobs.test_vqkd_task import train_share

rank = join_processes().process_index
torch.save(train_share(rank, 2), f"{sys.argv[1]}/{rank}.pt")
"""


def test_two_processes_learn_the_codes_of_one(tmp_path: Path) -> None:
    """Codes are drawn, moved and revived over the joint batch."""
    paths = os.pathsep.join([str(Path(mapet.__file__).parents[1]), str(Path(__file__).parents[2])])
    (tmp_path / "process.py").write_text(PROCESS)
    command = under_torchrun([sys.executable, str(tmp_path / "process.py"), str(tmp_path)])
    subprocess.run(command, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, check=True)
    codebook, idle, used = train_share(0, 1)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for other in both:
        assert torch.allclose(other[0], codebook, rtol=0, atol=1e-9)
        assert torch.equal(other[1], idle)
        assert torch.equal(other[2], used)
    assert torch.equal(both[0][0], both[1][0])


def test_vectors_are_not_decayed() -> None:
    task = make()
    config: Any = SimpleNamespace(lr=1e-3, weight_decay=0.05, beta2=0.95)
    groups = build_optimizer(task, config).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in task.named_parameters() if id(parameter) not in decayed}
    lone = {f"{part}.{name}" for part in ("tokenizer.encoder", "decoder") for name in ("pos_embed", "cls_token")}
    assert names == lone | {name for name, parameter in task.named_parameters() if parameter.ndim == 1}

"""The task of fine-tuning, compared with timm's losses and moving average."""

import copy

import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.optim import SGD

from mapet.data.augment import seeded
from mapet.jobs.finetune.classification import Classification

IMAGES, LABELS = torch.rand(8, 3, 32, 32), torch.arange(8) % 5


@pytest.fixture
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)


def test_smoothed_loss(network: torch.nn.Module) -> None:
    expected = LabelSmoothingCrossEntropy(0.1)(network(IMAGES), LABELS)
    output = Classification(network, 5, smoothing=0.1)(IMAGES, LABELS)
    torch.testing.assert_close(output["loss"], expected)
    assert output["accuracy"] == (network(IMAGES).argmax(-1) == LABELS).float().mean()
    measured = Classification(network, 5, mixup=0.8, cutmix=1.0, smoothing=0.1).eval()(IMAGES, LABELS)
    torch.testing.assert_close(measured["loss"], expected)


@pytest.mark.parametrize("seed", range(6))  # some draw mixup, some cutmix
def test_mixed_loss(seed: int, network: torch.nn.Module) -> None:
    task, before = Classification(network, 5, mixup=0.8, cutmix=1.0, smoothing=0.1), IMAGES.clone()
    torch.manual_seed(seed)
    loss = task(IMAGES, LABELS)["loss"]
    assert torch.equal(IMAGES, before)
    torch.manual_seed(seed)
    with seeded(int(torch.randint(2**62, ()))):
        images, targets = task.mix(IMAGES.clone(), LABELS)  # type: ignore[misc]
    assert not torch.equal(images, IMAGES)
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(network(images), targets))


def test_moving_average(network: torch.nn.Module) -> None:
    task, expected = Classification(network, 5, ema_decay=0.6), copy.deepcopy(network.state_dict())
    optimizer = SGD(network.parameters(), lr=0.1)
    for step in range(4):
        task(IMAGES, LABELS)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.after_step(step, 4)
        # timm's warm-up, 1 - (1 + step)^(-2/3); the first update takes the weights as they are.
        decay = 0.0 if step == 0 else min(0.6, 1 - (step + 1) ** (-2 / 3))
        for name, tensor in network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    for name, tensor in task.outcome().state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    assert not torch.equal(task.outcome().head.weight, network.head.weight)  # type: ignore[union-attr]
    assert Classification(network, 5).outcome() is network
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert trained == {f"network.{name}" for name, _ in network.named_parameters()}

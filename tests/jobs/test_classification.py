from __future__ import annotations

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


def test_the_loss_is_timms(network: torch.nn.Module) -> None:
    smoothed = Classification(network, 5, smoothing=0.1)(IMAGES, LABELS)
    torch.testing.assert_close(smoothed["loss"], LabelSmoothingCrossEntropy(0.1)(network(IMAGES), LABELS))
    assert smoothed["accuracy"] == (network(IMAGES).argmax(-1) == LABELS).float().mean()

    mixing = Classification(network, 5, mixup=0.8, cutmix=1.0, smoothing=0.1)
    for seed in range(6):  # mixup or cutmix
        torch.manual_seed(seed)
        before = IMAGES.clone()
        loss = mixing(IMAGES, LABELS)["loss"]
        assert torch.equal(IMAGES, before)
        torch.manual_seed(seed)
        with seeded(int(torch.randint(2**62, ()))):
            images, targets = mixing.mix(IMAGES.clone(), LABELS)  # type: ignore[misc]
        assert not torch.equal(images, IMAGES)
        torch.testing.assert_close(loss, SoftTargetCrossEntropy()(network(images), targets))

    plain = mixing.eval()(IMAGES, LABELS)["loss"]
    torch.testing.assert_close(plain, LabelSmoothingCrossEntropy(0.1)(network(IMAGES), LABELS))


def test_the_average_follows_every_step(network: torch.nn.Module) -> None:
    objective = Classification(network, 5, ema_decay=0.6)
    expected = copy.deepcopy(network.state_dict())
    optimizer = SGD(network.parameters(), lr=0.1)
    objective.average_after(optimizer)
    for update in range(1, 5):
        objective(IMAGES, LABELS)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        # timm's warm-up: 1 - (1 + step)^(-2/3), the first update takes the weights as they are.
        decay = 0.0 if update == 1 else min(0.6, 1 - update ** (-2 / 3))
        for name, tensor in network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    assert objective.updates == 4
    for name, tensor in objective.outcome.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    assert not torch.equal(objective.outcome.head.weight, network.head.weight)  # type: ignore[union-attr]
    assert Classification(network, 5).outcome is network
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert trained == {f"network.{name}" for name, _ in network.named_parameters()}

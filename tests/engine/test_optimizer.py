import pytest
import timm
import torch

from mapet.config.base import settle
from mapet.config.keys import TrainKeys
from mapet.engine.optimizer import build_optimizer, learning_rate

CONFIG = settle(
    TrainKeys,
    {"data": "d", "steps": 100, "lr": 1.0, "warmup": 0.1, "warmup_lr": 0.1, "min_lr": 0.2, "beta2": 0.98},
    images=64,
)


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    assert [learning_rate(CONFIG, step) for step in (0, 5, 10, 55)] == pytest.approx([0.1, 0.55, 1.0, 0.6])
    assert learning_rate(CONFIG.but(warmup=0.0), 0) == 1.0
    assert learning_rate(CONFIG.but(lr=0.01), 0) == 0.01  # the peak bounds both ends
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.2)
    for step in range(10, 100):
        assert learning_rate(CONFIG, step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_earlier_blocks_learn_more_slowly() -> None:
    network = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3)
    optimizer = build_optimizer(network, CONFIG, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = {names[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}
    assert groups.keys() == set(names.values())
    assert all((group["lr"], group["betas"]) == (1.0, (0.9, 0.98)) for group in groups.values())
    scales = {"head.weight": 1.0, "norm.weight": 0.5, "blocks.1.mlp.fc1.weight": 0.5, "blocks.0.mlp.fc1.weight": 0.25}
    scales |= {"patch_embed.proj.weight": 0.125, "pos_embed": 0.125}
    assert {name: groups[name]["lr_scale"] for name in scales} == scales
    decay = {name: groups[name]["weight_decay"] for name in ("head.weight", "head.bias", "pos_embed", "norm.weight")}
    assert decay == {"head.weight": 0.05, "head.bias": 0.0, "pos_embed": 0.0, "norm.weight": 0.0}

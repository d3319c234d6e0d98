from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm

from mapet import MaPeT
from mapet.engine.optimizer import build_optimizer


def test_only_matrices_decay(tiny_vit: Callable[..., Any]) -> None:
    objective = MaPeT(tiny_vit(reg_tokens=1, layer_scale=0.1), 9)
    optimizer = build_optimizer(objective, 1e-3, 0.05, 0.999)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert set(decay) == {0.0, 0.05}
    assert decay[0.0] | decay[0.05] == set(names.values())
    assert {"mask_token", "head.bias", "backbone.pos_embed", "backbone.cls_token", "backbone.reg_token"} <= decay[0.0]
    assert all(name.endswith("weight") and "norm" not in name for name in decay[0.05])


def test_earlier_blocks_learn_more_slowly() -> None:
    network = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3)
    optimizer = build_optimizer(network, 1e-3, 0.05, 0.999, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    scale, decay = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scale[names[id(parameter)]], decay[names[id(parameter)]] = group["lr_scale"], group["weight_decay"]
    assert set(scale) == set(names.values())
    assert scale["head.weight"] == 1.0
    assert scale["blocks.1.mlp.fc1.weight"] == scale["norm.weight"] == 0.5
    assert scale["blocks.0.mlp.fc1.weight"] == 0.5 * scale["blocks.1.mlp.fc1.weight"]
    assert scale["patch_embed.proj.weight"] == scale["pos_embed"] == 0.5 * scale["blocks.0.mlp.fc1.weight"]
    assert decay["head.weight"] == 0.05
    assert decay["head.bias"] == decay["pos_embed"] == decay["norm.weight"] == 0.0

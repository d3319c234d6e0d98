from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mapet import MaPeT
from mapet.engine import build_optimizer


def test_only_matrices_decay(tiny_vit: Callable[..., Any]) -> None:
    objective = MaPeT(tiny_vit(reg_tokens=1, layer_scale=0.1), 9)
    optimizer = build_optimizer(objective, 1e-3, 0.05, 0.999)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert set(decay) == {0.0, 0.05}
    assert decay[0.0] | decay[0.05] == set(names.values())
    assert {"mask_token", "head.bias", "backbone.pos_embed", "backbone.cls_token", "backbone.reg_token"} <= decay[0.0]
    assert all(name.endswith("weight") and "norm" not in name for name in decay[0.05])

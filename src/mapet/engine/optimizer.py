"""The optimizer of the paper's recipes."""

from __future__ import annotations

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import AdamW


def build_optimizer(
    trained: nn.Module, lr: float, weight_decay: float, beta2: float, layer_decay: float | None = None
) -> AdamW:
    """AdamW with decay for matrices only: not for vectors, biases, norms and position embeddings.

    Args:
        trained: an objective, or with ``layer_decay`` a timm network.
        lr: peak learning rate.
        weight_decay: of the matrices.
        beta2: AdamW's.
        layer_decay: factor from each block's learning rate to that of the one before it (BEiT, 2106.08254); it goes
            into the groups' ``lr_scale``. None: the same for all.
    """
    exempt: set[str] = getattr(trained, "no_weight_decay", set)()
    if layer_decay is None:
        groups = param_groups_weight_decay(trained, weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(trained, weight_decay, exempt, layer_decay=layer_decay)
    return AdamW(groups, lr=lr, betas=(0.9, beta2))

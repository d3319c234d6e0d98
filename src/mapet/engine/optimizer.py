"""The optimizer of the paper's recipe."""

from __future__ import annotations

from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim import AdamW


def build_optimizer(objective: nn.Module, lr: float, weight_decay: float, beta2: float) -> AdamW:
    """AdamW with decay for matrices only: not for vectors, biases, norms and position embeddings."""
    exempt: set[str] = getattr(objective, "no_weight_decay", set)()
    groups = param_groups_weight_decay(objective, weight_decay, no_weight_decay_list=exempt)
    return AdamW(groups, lr=lr, betas=(0.9, beta2))

"""The optimizer of the paper's recipes, and its learning rate as a pure function of the step."""

import math

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import AdamW

from mapet.config.keys import TrainKeys


def build_optimizer(trained: nn.Module, config: TrainKeys, layer_decay: float | None = None) -> AdamW:
    """Return AdamW that decays matrices only: not vectors, biases, norms and position embeddings.

    Args:
        trained: a task, or with ``layer_decay`` a timm network.
        config: learning rate, weight decay and the second beta.
        layer_decay: factor from each block's learning rate to that of the block before it (BEiT, 2106.08254); it goes
            into the groups' ``lr_scale``. None: the same for all.
    """
    exempt: set[str] = getattr(trained, "no_weight_decay", set)()
    if layer_decay is None:
        groups = param_groups_weight_decay(trained, config.weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(trained, config.weight_decay, exempt, layer_decay=layer_decay)
    return AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


def learning_rate(config: TrainKeys, step: int) -> float:
    """Return the learning rate of a step of a run."""
    start, end = min(config.warmup_lr, config.lr), min(config.min_lr, config.lr)
    warmup = round(config.warmup * config.steps)
    return warmup_cosine(step, total=config.steps, warmup=warmup, start=start, peak=config.lr, end=end)


def warmup_cosine(step: int, *, total: int, warmup: int, start: float, peak: float, end: float) -> float:
    """Return a rate at ``step`` of ``total``: linear from ``start`` to ``peak``, then a cosine to ``end``.

    The first of ``warmup`` steps has ``start``, step ``warmup`` has ``peak``, the last step nearly ``end``.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))

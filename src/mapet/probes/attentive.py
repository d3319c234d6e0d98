"""Attentive probe: one learned query attends to the patches, then a linear classifier."""

from collections.abc import Sequence

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from mapet.data.augment import seeded
from mapet.data.seeds import Stream, fold_seed
from mapet.probes.features import Features
from mapet.probes.heads import Setting, Training, cross_entropy

HEAD_WIDTH = 64  # channels of an attention head
MOST_PASSES = 300


def attentive_head(width: int, classes: int) -> nn.Sequential:
    """Return an attentive probe without an MLP, as in CAPI (2502.08769); V-JEPA (2404.08471) adds an MLP.

    Args:
        width: channels of the patches; attention heads have 64 channels if that divides the width, else there is one.
        classes: number of classes.

    Returns:
        a module that maps ``(B, P, D)`` patches to ``(B, C)`` logits.
    """
    attention_heads = width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1
    return nn.Sequential(
        nn.LayerNorm(width),  # some networks do not normalise their last patches
        AttentionPoolLatent(width, out_features=0, num_heads=attention_heads, q_proj=False),
        nn.Linear(width, classes),
    )


class AttentiveHeads(nn.Module):
    """One attentive head for each setting, all on the same patches."""

    def __init__(self, width: int, classes: int, heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(attentive_head(width, classes) for _ in range(heads))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``(B, heads, C)`` logits of ``(B, P, D)`` patches."""
        return torch.stack([head(tokens) for head in self.heads], dim=1)


def fit_attentive(features: Features, settings: Sequence[Setting], training: Training) -> AttentiveHeads:
    """Train an attentive head for each setting on the same batches, with AdamW and a cosine schedule."""
    with seeded(fold_seed(training.seed, Stream.HEAD)):
        heads = AttentiveHeads(features.store.shape[-1], len(features.classes), len(settings)).to(training.device)
    groups = [
        {"params": list(head.parameters()), "lr": setting.lr, "weight_decay": setting.weight_decay}
        for head, setting in zip(heads.heads, settings, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps_for(len(features)))
    for tokens, y in training.batches(features):
        optimizer.zero_grad()
        cross_entropy(heads(tokens), y).mean(0).sum().backward()
        optimizer.step()
        schedule.step()
    return heads.eval()

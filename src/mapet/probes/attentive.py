"""Attentive probes: one learned query attends to the patches, then a linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from mapet.data.augment import seeded
from mapet.data.seeds import Stream, fold_seed
from mapet.probes.features import Features
from mapet.probes.heads import Setting, Training, cross_entropy

HEAD_WIDTH = 64  # of an attention head
MOST_PASSES = 300


class AttentiveHead(nn.Module):
    """A probe without an MLP, as in CAPI (2502.08769) and, but for that, V-JEPA (2404.08471).

    Args:
        width: of the tokens; split into attention heads of 64 where that divides it, else one head.
        classes: how many.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        attention_heads = width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1
        # Some networks do not normalise their patches in the end.
        self.norm = nn.LayerNorm(width)
        self.pool = AttentionPoolLatent(width, out_features=0, num_heads=attention_heads, q_proj=False)
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``(B, C)`` logits of ``(B, P, D)`` patches."""
        logits: Tensor = self.classifier(self.pool(self.norm(tokens)))
        return logits


class AttentiveHeads(nn.Module):
    """Attentive heads of several settings over the same patches."""

    def __init__(self, width: int, classes: int, heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(AttentiveHead(width, classes) for _ in range(heads))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``(B, heads, C)`` logits of ``(B, P, D)`` patches."""
        return torch.stack([head(tokens) for head in self.heads], dim=1)


def fit_attentive(features: Features, settings: Sequence[Setting], training: Training) -> AttentiveHeads:
    """Train an attentive head for every setting, by AdamW with a cosine, on the same batches of patches."""
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

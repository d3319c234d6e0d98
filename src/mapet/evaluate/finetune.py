"""Fine-tuning with few labels: one short recipe, the same for every backbone that is compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.optim import AdamW

from mapet.data import Draws, ImageSet, PlainView, StepSampler, Stream, TrainView, ViewDataset, fold_seed, load_batches
from mapet.engine import warmup_cosine
from mapet.evaluate.classifier import score_classifier


@dataclass(frozen=True)
class FinetuneRecipe:
    """AdamW on the whole network with a fresh linear head on the backbone's pooled feature.

    Args:
        steps: optimiser steps.
        batch_size: images a step, or all labelled images if they are fewer.
        lr: peak learning rate; a tenth of the run warms up, then cosine to zero.
        weight_decay: AdamW's.
        crop_min: least share of the image that a random crop covers.
        flip: probability of a horizontal flip.
    """

    steps: int = 100
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.05
    crop_min: float = 0.6
    flip: float = 0.0


def finetune_accuracy(
    backbone: VisionTransformer,
    train: ImageSet,
    test: ImageSet,
    view: PlainView,
    recipe: FinetuneRecipe,
    *,
    channels: int,
    seed: int,
) -> float:
    """Fine-tune a copy of ``backbone`` on labelled images; return the accuracy in 0..1 on ``test``."""
    device = next(backbone.parameters()).device
    model = copy.deepcopy(backbone)
    torch.manual_seed(fold_seed(seed, Stream.HEAD))
    model.reset_classifier(len(train.classes))
    model.to(device).train()
    optimizer = AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)

    augment = TrainView(view.size[0], 0, recipe.crop_min, recipe.flip, 0.0, view.mean, view.std)
    batch_size = min(recipe.batch_size, len(train))
    sampler = StepSampler(len(train), batch_size, seed, first_step=0, last_step=recipe.steps)
    assert train.labels is not None
    labels = torch.tensor(train.labels, device=device)
    loader = load_batches(ViewDataset(train, augment, channels, Draws(seed, seed)), sampler, workers=0)
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(
                step, total=recipe.steps, warmup=recipe.steps // 10, start=0.0, peak=recipe.lr, end=0.0
            )
        loss = F.cross_entropy(model(batch["student"].to(device)), labels[batch["index"].to(device)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return score_classifier(model, test, view, channels, device=device).accuracy

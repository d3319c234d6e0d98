"""Supervised fine-tuning: mixup and cutmix, smoothed labels, an average of the weights."""

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mapet.data.augment import seeded
from mapet.objectives.task import Output, Task


class Classification(Task):
    """Cross-entropy of a network with a classifier.

    Args:
        network: gives ``(B, classes)`` logits. It is used, not copied.
        classes: number of them.
        mixup: alpha of mixup (Zhang et al., 1710.09412); 0 for none.
        cutmix: alpha of cutmix (Yun et al., 1905.04899); 0 for none. With both, each batch takes one of them.
        smoothing: share of a label's probability that is spread over all classes.
        ema_decay: of an exponential moving average of the weights, which warms up as timm's does; None for none.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        smoothing: float = 0.0,
        ema_decay: float | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.smoothing = smoothing
        self.mix = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes) if mixup or cutmix else None
        self.ema = ModelEmaV3(network, ema_decay, use_warmup=True) if ema_decay is not None else None
        if self.ema is not None:
            self.ema.requires_grad_(False)  # processes that train together would wait for its gradients

    def forward(self, images: Tensor, labels: Tensor) -> Output:
        """Map ``(B, C, H, W)`` images and ``(B,)`` labels to ``loss``, ``accuracy`` (by each image's own label) and
        ``logits`` ``(B, classes)``.
        """
        targets = labels
        if self.mix is not None and self.training:
            # timm mixes in place and draws from NumPy; torch's random state is the step's.
            with seeded(int(torch.randint(2**62, ()))):
                images, targets = self.mix(images.clone(), labels)
        logits = self.network(images)
        smoothing = self.smoothing if targets is labels else 0.0  # mixed targets are smoothed already
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        accuracy = (logits.argmax(dim=-1) == labels).float().mean()
        return {"loss": loss, "accuracy": accuracy, "logits": logits}

    def after_step(self, step: int, total: int) -> None:
        """Update the moving average, if there is one."""
        if self.ema is not None:
            self.ema.update(self.network, step=step + 1)

    def outcome(self) -> nn.Module:
        """Return the averaged network where there is one."""
        return self.network if self.ema is None else self.ema.module

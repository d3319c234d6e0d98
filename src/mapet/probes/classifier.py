"""Accuracy of a network that has a classifier."""

from typing import Any

import numpy as np
from torch import nn

from mapet.data.sources import ImageSet
from mapet.data.views import View
from mapet.probes.features import stream_labelled
from mapet.probes.metrics import MOST_GUESSES, Scores, score


def score_classifier(network: nn.Module, images: ImageSet, view: View, channels: int, **options: Any) -> Scores:
    """Score a classifier on labelled images; damaged images are left out.

    Args:
        network: gives ``(B, C)`` logits; it is put into evaluation mode.
        images: labelled with the classes of the network, in its order.
        view, channels: see ``inference.stream``.
        options: ``show`` and the options of ``stream_labelled``.

    Raises:
        MapetError: if the logits contain NaN or infinity, or too many images are damaged.
    """
    truth, guesses = [], []
    for labels, logits in stream_labelled(network.eval(), images, view, channels, **options):
        truth.append(labels)
        guesses.append(logits.topk(min(MOST_GUESSES, logits.shape[1])).indices.cpu().numpy())
    return score(np.concatenate(truth), np.concatenate(guesses), images.classes)

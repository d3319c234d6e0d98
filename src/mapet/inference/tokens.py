"""What a network says of an image, by place: class token, patches, and what it pools them to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mapet.errors import MapetError


@dataclass(frozen=True)
class Tokens:
    """Features of ``B`` images after the network's last norm (for models with ``fc_norm``, before it).

    Attributes:
        pooled: ``(B, D)``, what the network's own classifier reads.
        cls: ``(B, D)``, the class token; None where there is none.
        patches: ``(B, P, D)`` in raster order.
        grid: rows and columns of patches.
    """

    pooled: Tensor
    cls: Tensor | None
    patches: Tensor
    grid: tuple[int, int]

    def choose(self, kind: str) -> Tensor:
        """Return ``(B, D)`` features: ``pooled``, ``class``, ``mean`` (over patches), or ``class+mean`` side by side.

        Raises:
            MapetError: for another kind, or the class token of a network without one.
        """
        if kind == "pooled":
            return self.pooled
        if kind == "mean":
            return self.patches.mean(dim=1)
        if kind not in ("class", "class+mean"):
            raise MapetError(f"unknown features {kind!r}; take pooled, class, mean or class+mean")
        if self.cls is None:
            raise MapetError(f"features {kind!r} need a class token, which this model lacks; take pooled or mean")
        return self.cls if kind == "class" else torch.cat([self.cls, self.patches.mean(dim=1)], dim=-1)


def read_tokens(network: Any, images: Tensor) -> Tokens:
    """Run a timm network, without its classifier, on normalised ``(B, C, H, W)`` images."""
    features = network.forward_features(images)
    pooled = network.forward_head(features, pre_logits=True)
    if features.ndim == 4:
        if getattr(network, "output_fmt", "NCHW") == "NCHW":
            features = features.permute(0, 2, 3, 1)
        return Tokens(pooled, None, features.flatten(1, 2), (features.shape[1], features.shape[2]))
    prefix = network.num_prefix_tokens
    rows, columns = network.patch_embed.dynamic_feat_size(images.shape[-2:])
    cls = features[:, 0] if getattr(network, "cls_token", None) is not None else None
    return Tokens(pooled, cls, features[:, prefix:], (rows, columns))

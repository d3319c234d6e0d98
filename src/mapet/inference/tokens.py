"""Features of an image: pooled, of the class token, and of each patch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mapet.errors import MapetError


@dataclass(frozen=True)
class Tokens:
    """Features of ``B`` images after the network's last norm (for models with ``fc_norm``, before it).

    Attributes:
        pooled: ``(B, D)``, the input of the network's own classifier.
        cls: ``(B, D)``, the class token; None for a network without one.
        patches: ``(B, P, D)`` in raster order; None if the features do not lie on one grid.
        grid: rows and columns of patches; None if ``patches`` is None.
        architecture: of the network, for messages.
    """

    pooled: Tensor
    cls: Tensor | None = None
    patches: Tensor | None = None
    grid: tuple[int, int] | None = None
    architecture: str = "this model"

    def choose(self, kind: str) -> Tensor:
        """Return one kind of features.

        Args:
            kind: ``pooled``, ``class``, ``mean`` (over patches) or ``class+mean`` (side by side), which are
                ``(B, D)``; or ``patches``, ``(B, P, D)``.

        Raises:
            MapetError: if the network does not have it.
        """
        if kind == "pooled":
            return self.pooled
        parts = []
        if kind.startswith("class"):
            parts.append(self._require(self.cls, kind, "a class token"))
        if kind != "class":
            patches = self._require(self.patches, kind, "a grid of patches")
            parts.append(patches if kind == "patches" else patches.mean(dim=1))
        return torch.cat(parts, dim=-1)

    def _require(self, part: Tensor | None, kind: str, what: str) -> Tensor:
        if part is None:
            others = "pooled features" if self.patches is None else "pooled or mean features"
            raise MapetError(f"{kind} features need {what}, which {self.architecture} lacks; take {others}")
        return part


def read_tokens(network: Any, images: Tensor) -> Tokens:
    """Run a timm network, without its classifier, on normalised ``(B, C, H, W)`` images.

    Every timm network has pooled features. Patches are returned if ``forward_features`` gives one feature map, or if
    the tokens after the prefix form a grid.
    """
    features = network.forward_features(images)
    pooled = network.forward_head(features, pre_logits=True)
    name = network.pretrained_cfg["architecture"]
    if not isinstance(features, Tensor):
        return Tokens(pooled, architecture=name)
    if features.ndim == 4:
        if getattr(network, "output_fmt", "NCHW") == "NCHW":
            features = features.permute(0, 2, 3, 1)
        return Tokens(pooled, None, features.flatten(1, 2), (features.shape[1], features.shape[2]), name)
    prefix = getattr(network, "num_prefix_tokens", 0)
    cls = features[:, 0] if prefix and getattr(network, "cls_token", None) is not None else None
    measure = getattr(getattr(network, "patch_embed", None), "dynamic_feat_size", None)
    grid = measure(images.shape[-2:]) if measure else (0, 0)
    if prefix + grid[0] * grid[1] != features.shape[1]:  # a network that merges tokens on the way
        return Tokens(pooled, cls, architecture=name)
    return Tokens(pooled, cls, features[:, prefix:], (grid[0], grid[1]), name)

"""VQ-KD: the tokenizer of BEiT v2 (arXiv 2208.06366), published or trained here with ``VQKDObjective``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError
from mapet.models.tensors import check_fit, read_tensors
from mapet.models.vit import build_vit
from mapet.tokenizers.base import Tokenizer, resized, with_channels
from mapet.tokenizers.kmeans import nearest_centroid
from mapet.tokenizers.weights import fetch_weights

HEAD_WIDTH = 64  # of the published networks, whose files do not tell


class VQKD(Tokenizer):
    """Ids are nearest codes, by cosine, of a Vision Transformer's patch tokens projected to a few dimensions.

    The network is upstream's (``beit2/modeling_vqkd.py`` of microsoft/unilm): a plain ViT with a class token and
    LayerNorm of epsilon 1e-6 on the patch tokens, then ``Linear, Tanh, Linear``. The defaults are the published one.

    Codes live in the buffer ``codebook`` ``(V, code_dim)``, at length 1; before training they are NaN.

    Args:
        image_size: side of the square input in pixels; other views are resized to it.
        patch_size: side of a patch in pixels.
        embed_dim: ``D``, channels of the ViT.
        depth: blocks of the ViT.
        num_heads: of its attention.
        vocab_size: ``V``.
        code_dim: width of a code.
        mean: of the input normalisation, one value per channel; the published ones read [-1, 1].
        std: likewise.

    Raises:
        MapetError: if patches do not tile the image, or heads do not divide the channels.
    """

    kind = "vqkd"

    codebook: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        vocab_size: int = 8192,
        code_dim: int = 32,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        if len(mean) != len(std):
            raise MapetError(f"mean has {len(mean)} values but std has {len(std)}; give one of each per channel")
        encoder = patch_transformer(image_size, patch_size, len(mean), embed_dim, depth, num_heads)
        super().__init__(encoder.patch_embed.grid_size, vocab_size, image_size, len(mean))
        self._config = {
            "image_size": image_size,
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "vocab_size": vocab_size,
            "code_dim": code_dim,
            "mean": list(mean),
            "std": list(std),
        }
        self.encoder = encoder
        self.projection = tanh_projection(embed_dim, code_dim)
        self.register_buffer("codebook", torch.full((vocab_size, code_dim), float("nan")))
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @classmethod
    def from_published(cls, source: str | Path | None) -> Self:
        """Read a file in BEiT v2's layout, such as ``vqkd_encoder_base_decoder_3x768x12_clip``.

        Sizes are those of its tensors, at 64 channels a head. Decoder, teacher and statistics are left out, and
        codes are scaled to length 1, which upstream's are but for rounding.

        Args:
            source: see ``fetch_weights``; also a checkpoint of upstream's training script. There is no default: their
                authors' address is signed and expires.

        Raises:
            MapetError: if the file cannot be had or read, lacks a tensor or has one of another shape, or its encoder
                has more parts than the published ones.
        """
        if source is None:
            raise MapetError(
                "the published VQ-KD weights have no lasting address; pass yours with --teacher-weights, e.g. the file "
                "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth of BEiT v2"
            )
        path, origin = fetch_weights(source)
        found, _ = read_tensors(path)
        tokenizer = cls(**_architecture(found, source))
        wanted = _published_state(tokenizer)
        check_fit(found, wanted, source, "a VQ-KD tokenizer")
        strange = [name for name in found if name.startswith(("encoder.", "encode_task_layer.")) and name not in wanted]
        if strange:
            raise MapetError(
                f"weights {source} do not fit a VQ-KD tokenizer: its encoder has no {strange[0]!r} ({len(strange)} "
                "unknown); pass a file with the layout of the published ones"
            )
        for name, tensor in wanted.items():
            tensor.copy_(found[name])
        tokenizer.codebook.copy_(F.normalize(tokenizer.codebook, dim=-1))
        tokenizer.origin = origin
        return tokenizer.eval()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._config)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(B, C, S, S)`` images, normalised with ``mean`` and ``std``, to what is compared with the codes.

        Returns:
            ``(B, P, code_dim)`` of length 1, in the precision of the weights whatever autocast says, as upstream.
        """
        patches = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        with torch.autocast(images.device.type, enabled=False):
            return F.normalize(self.projection(patches.type_as(self.codebook)), dim=-1)

    def assign(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids, and 1 - cosine of feature and code."""
        images = with_channels(resized(images, self.input_size), self.channels)
        features = self((images - self.mean) / self.std)
        ids, squared = nearest_centroid(features, self.codebook)
        # |z - c|^2 = 2 - 2 z c for vectors of length 1.
        return ids, squared / 2


def patch_transformer(
    image_size: int, patch_size: int, channels: int, embed_dim: int, depth: int, num_heads: int
) -> VisionTransformer:
    """Build the plain ViT that encoder and decoder of VQ-KD are, initialised as upstream."""
    return build_vit(
        "vit_base_patch16_224",
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        fix_init=True,
    )


def tanh_projection(embed_dim: int, width: int) -> nn.Sequential:
    """Build the two layers that follow encoder and decoder, initialised as upstream."""
    first, second = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, width)
    for layer in (first, second):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.Tanh(), second)


def _architecture(found: Mapping[str, Tensor], source: str | Path) -> dict[str, Any]:
    """Return the constructor's arguments that the shapes of published tensors tell."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name in found and found[name].ndim == axes:
            return tuple(found[name].shape)
        problem = f"has {found[name].ndim} axes instead of {axes}" if name in found else "is missing"
        raise MapetError(f"weights {source} do not fit a VQ-KD tokenizer: {name!r} {problem}")

    embed_dim, channels, patch_size, _ = shape("encoder.patch_embed.proj.weight", 4)
    positions = shape("encoder.pos_embed", 3)[1]
    vocab_size, code_dim = shape("quantize.embedding.weight", 2)
    side = isqrt(max(0, positions - 1))
    if positions != 1 + side**2 or not side:
        raise MapetError(
            f"weights {source} do not fit a VQ-KD tokenizer: 'encoder.pos_embed' has {positions} positions, which are "
            "no class token and square of patches"
        )
    if embed_dim % HEAD_WIDTH:
        raise MapetError(
            f"weights {source} do not fit a VQ-KD tokenizer: 'encoder.patch_embed.proj.weight' has {embed_dim} "
            f"channels, which are no multiple of the {HEAD_WIDTH} of a head"
        )
    blocks = {name.split(".")[2] for name in found if name.startswith("encoder.blocks.")}
    return {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": max(1, len(blocks)),
        "num_heads": embed_dim // HEAD_WIDTH,
        "vocab_size": vocab_size,
        "code_dim": code_dim,
        "mean": [0.5] * channels,
        "std": [0.5] * channels,
    }


def _published_state(tokenizer: VQKD) -> dict[str, Tensor]:
    """Return the tokenizer's own tensors, to be written to, under their names in a published file."""
    state = {}
    for name, tensor in tokenizer.state_dict().items():
        # Upstream's norm is in the place for pooled features, and applied to each patch.
        name = name.replace("encoder.norm.", "encoder.fc_norm.").replace("projection.", "encode_task_layer.")
        if name.endswith("qkv.bias"):
            query, key, value = tensor.chunk(3)
            key.zero_()  # upstream has none; it would move all scores of a query alike
            state[name.replace("qkv.bias", "q_bias")] = query
            state[name.replace("qkv.bias", "v_bias")] = value
        else:
            state["quantize.embedding.weight" if name == "codebook" else name] = tensor
    return state

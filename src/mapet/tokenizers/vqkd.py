"""VQ-KD: the tokenizer of BEiT v2 (arXiv 2208.06366), with published weights or trained with ``VQKDTask``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError
from mapet.models.networks import build_vit
from mapet.models.tensors import check_fit, fetch_tensors
from mapet.tokenizers.base import Tokenizer, resized, with_channels
from mapet.tokenizers.kmeans import nearest_centroid

HEAD_WIDTH = 64  # channels of an attention head of the published networks; not recorded in their files


class VQKD(Tokenizer):
    """A tokenizer whose ids are the nearest codes, by cosine, of a ViT's patch tokens projected to few dimensions.

    The network is upstream's (``beit2/modeling_vqkd.py`` of microsoft/unilm): a plain ViT with a class token and
    LayerNorm of epsilon 1e-6 on the patch tokens, then ``Linear, Tanh, Linear``. The defaults are the published sizes.

    The buffer ``codebook`` ``(V, code_dim)`` holds codes of length 1; it is NaN before training.

    Args:
        image_size: side of the square input in pixels.
        patch_size: side of a patch in pixels.
        embed_dim: ``D``, channels of the ViT.
        depth: blocks of the ViT.
        num_heads: attention heads of the ViT.
        vocab_size: ``V``.
        code_dim: width of a code.
        mean: mean of the input normalisation, one value per channel; the published networks read [-1, 1].
        std: standard deviation of the input normalisation, one value per channel.

    Raises:
        MapetError: if the ViT cannot be built with these sizes.
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
        sizes = dict(
            image_size=image_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads
        )
        encoder = patch_transformer(channels=len(mean), **sizes)
        super().__init__(encoder.patch_embed.grid_size, vocab_size, image_size, len(mean))
        codes = {"vocab_size": vocab_size, "code_dim": code_dim}
        self.config = {**sizes, **codes, "mean": list(mean), "std": list(std)}
        self.encoder = encoder
        self.projection = tanh_projection(embed_dim, code_dim)
        self.register_buffer("codebook", torch.full((vocab_size, code_dim), float("nan")))
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @classmethod
    def from_published(cls, source: str | Path | None) -> VQKD:
        """Read a file in the layout of BEiT v2, such as ``vqkd_encoder_base_decoder_3x768x12_clip``.

        The shapes of the tensors decide the sizes, with 64 channels per head. Decoder, teacher and statistics are not
        read. Codes are scaled to length 1; upstream's codes have length 1 up to rounding.

        Args:
            source: see ``fetch_weights``; also a checkpoint of upstream's training script. There is no default, because
                the authors' URL is signed and expires.

        Raises:
            MapetError: if the file cannot be read, or is not of a VQ-KD tokenizer.
        """
        if source is None:
            raise MapetError(
                "the published VQ-KD weights have no permanent URL; pass a local file with --teacher-weights, e.g. "
                "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth of BEiT v2"
            )
        found, origin = fetch_tensors(source)
        try:
            tokenizer = _published_architecture(found)
        except (KeyError, ValueError) as error:
            raise MapetError(
                f"the weights of {source} do not fit a VQ-KD tokenizer ({error}); pass the published weights"
            ) from error
        wanted = _published_tensors(tokenizer)
        check_fit(found, wanted, source, "a VQ-KD tokenizer", prefixes=("encoder.", "encode_task_layer."))
        for name, tensor in wanted.items():
            tensor.copy_(found[name])
        tokenizer.codebook.copy_(F.normalize(tokenizer.codebook, dim=-1))
        tokenizer.origin = origin
        return tokenizer.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the features that are compared with the codes.

        Args:
            images: ``(B, C, S, S)``, normalised with ``mean`` and ``std``.

        Returns:
            ``(B, P, code_dim)`` of length 1, in the precision of the weights even under autocast, as upstream.
        """
        patches = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        with torch.autocast(images.device.type, enabled=False):
            return F.normalize(self.projection(patches.type_as(self.codebook)), dim=-1)

    def assign(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids, and 1 - cosine of feature and code as distance."""
        images = with_channels(resized(images, self.input_size), self.channels)
        ids, squared = nearest_centroid(self((images - self.mean) / self.std), self.codebook)
        # |z - c|^2 = 2 - 2 z c for vectors of length 1.
        return ids, squared / 2


def patch_transformer(**sizes: Any) -> VisionTransformer:
    """Build the plain ViT used as encoder and as decoder, initialised as upstream; see ``build_vit`` for the sizes."""
    return build_vit("vit_base_patch16_224", fix_init=True, **sizes)


def tanh_projection(embed_dim: int, width: int) -> nn.Sequential:
    """Build the two linear layers that follow the encoder or decoder, initialised as upstream."""
    first, second = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, width)
    for layer in (first, second):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.Tanh(), second)


def _published_architecture(found: Mapping[str, Tensor]) -> VQKD:
    """Build the tokenizer, with random weights, whose sizes are those of the tensors of a published file.

    Raises:
        KeyError, ValueError: if a tensor is missing or has another number of axes.
    """
    embed_dim, _, patch_size, _ = found["encoder.patch_embed.proj.weight"].shape
    _, positions, _ = found["encoder.pos_embed"].shape
    vocab_size, code_dim = found["quantize.embedding.weight"].shape
    image_size = isqrt(positions - 1) * patch_size
    depth = len({name.split(".")[2] for name in found if name.startswith("encoder.blocks.")})
    return VQKD(image_size, patch_size, embed_dim, depth, embed_dim // HEAD_WIDTH, vocab_size, code_dim)


def _published_tensors(tokenizer: VQKD) -> dict[str, Tensor]:
    """Return the tokenizer's tensors, which are written in place, by their names in a published file."""
    tensors = {}
    for name, tensor in tokenizer.state_dict().items():
        # Upstream's norm has the name of a norm of pooled features, but is applied to each patch.
        name = name.replace("encoder.norm.", "encoder.fc_norm.").replace("projection.", "encode_task_layer.")
        if name.endswith("qkv.bias"):
            query, key, value = tensor.chunk(3)
            key.zero_()  # upstream has no bias of keys; it would change no attention weight
            tensors[name.replace("qkv.bias", "q_bias")] = query
            tensors[name.replace("qkv.bias", "v_bias")] = value
        else:
            tensors["quantize.embedding.weight" if name == "codebook" else name] = tensor
    return tensors

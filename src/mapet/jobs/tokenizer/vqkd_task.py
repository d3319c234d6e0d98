"""Training of a VQ-KD tokenizer: vector-quantised knowledge distillation (BEiT v2, arXiv 2208.06366, section 2.2)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mapet.errors import MapetError
from mapet.objectives.task import Output, Task
from mapet.tokenizers.kmeans import nearest_centroid
from mapet.tokenizers.vqkd import VQKD, patch_transformer, tanh_projection

# A code is dead when it was not hit in so many times its equal share of patches, one in V.
DEAD_AFTER_SHARES = 100


class VQKDTask(Task):
    """Reconstruct a teacher's patch features from nothing but the codes of a tokenizer, which so learns its codes.

    The loss is the mean of ``1 - cos(reconstruction, teacher)`` and the commitment ``|sg(code) - z|^2 / code_dim``
    (upstream's ``mse_loss`` at its weight of 1) of the encoder's features ``z`` at length 1. Gradients pass from code
    to ``z`` unchanged (straight-through). The decoder is a ViT like the encoder's, over the map of codes.

    Codes are no parameters. In training mode, each forward pass moves them as upstream's ``NormEMAVectorQuantizer``:
    ``code <- unit(decay * code + (1 - decay) * unit(sum of the z it was nearest to))`` over the batches of all
    processes, which must be of one size. It departs from upstream in two points:

    - The first codes are random features ``z`` of the first batch, without k-means: the encoder is random as well.
    - A code that was nearest to none of the last ``100 V`` patches is moved onto a random feature of the batch.
      Upstream leaves it where it is, out of reach of an encoder that has moved on.

    A tokenizer that has codes already, loaded or published, keeps them as a start.

    Args:
        tokenizer: to be trained, in place.
        target_dim: ``d``, width of the teacher's features.
        decoder_depth: blocks of the decoder; the published ones have 1 or 3.
        decay: of the codes.

    Attributes:
        idle: ``(V,)`` int64 buffer: how many patches were seen since a code was last hit.
    """

    idle: Tensor

    def __init__(self, tokenizer: VQKD, target_dim: int, decoder_depth: int = 3, decay: float = 0.99) -> None:
        super().__init__()
        embed_dim, code_dim = tokenizer.config["embed_dim"], tokenizer.config["code_dim"]
        self.tokenizer = tokenizer
        self.decoder = patch_transformer(
            tokenizer.grid[0], 1, code_dim, embed_dim, decoder_depth, tokenizer.config["num_heads"]
        )
        self.projection = tanh_projection(embed_dim, target_dim)
        self.target_dim, self.decay = target_dim, decay
        self.register_buffer("idle", torch.zeros(tokenizer.vocab_size, dtype=torch.long))

    def no_weight_decay(self) -> set[str]:
        """Parameters that optimisers should not shrink: position embeddings and class tokens."""
        parts = {"tokenizer.encoder": self.tokenizer.encoder, "decoder": self.decoder}
        return {f"{part}.{name}" for part, vit in parts.items() for name in vit.no_weight_decay()}

    def outcome(self) -> nn.Module:
        """Return the tokenizer."""
        return self.tokenizer

    def forward(self, images: Tensor, targets: Tensor) -> Output:
        """Reconstruct the teacher's features.

        Args:
            images: ``(B, C, S, S)``, normalised with the tokenizer's mean and std.
            targets: ``(B, P, d)`` teacher features on the tokenizer's grid, in raster order.

        Returns:
            ``loss``; ``cosine`` of reconstruction and teacher, mean over patches; ``codes_used``: share of the
            vocabulary that the batch hits, over all processes in training mode.
        """
        features = self.tokenizer(images)
        expected = (*features.shape[:2], self.target_dim)
        if targets.shape != expected:
            raise MapetError(
                f"the teacher's features have shape {tuple(targets.shape)}, but {len(images)} images of this tokenizer "
                f"need {expected}"
            )
        points, codebook = features.detach().flatten(0, 1), self.tokenizer.codebook
        with torch.autocast(images.device.type, enabled=False):
            if self.training and codebook.isnan().any():
                codebook.copy_(_sample(points, len(codebook)))
            ids = nearest_centroid(points, codebook)[0]
            codes = codebook[ids].view_as(features)
            counts = torch.bincount(ids, minlength=len(codebook))
            if self.training:
                _sum_over_processes(counts)
                self._move_codes(points, ids, counts)

        reconstruction = self.decode(features + (codes - features).detach()).type_as(features)
        cosine = F.cosine_similarity(reconstruction, targets.type_as(features), dim=-1).mean()
        return {
            "loss": 1 - cosine + F.mse_loss(features, codes),
            "cosine": cosine.detach(),
            "codes_used": (counts > 0).float().mean(),
        }

    def decode(self, codes: Tensor) -> Tensor:
        """Map ``(B, P, code_dim)`` codes in raster order to ``(B, P, d)`` features."""
        tokens = self.decoder.forward_features(codes.mT.unflatten(-1, self.tokenizer.grid))
        return self.projection(tokens[:, self.decoder.num_prefix_tokens :])  # type: ignore[no-any-return]

    @torch.no_grad()
    def _move_codes(self, points: Tensor, ids: Tensor, counts: Tensor) -> None:
        """Follow this process's ``(n, code_dim)`` points; ``counts`` are those of all processes."""
        codebook = self.tokenizer.codebook
        sums = torch.zeros_like(codebook).index_add_(0, ids, points)
        _sum_over_processes(sums)
        moved = F.normalize(codebook.lerp(F.normalize(sums, dim=-1), 1 - self.decay), dim=-1)
        hit = counts > 0
        codebook.copy_(torch.where(hit[:, None], moved, codebook))

        self.idle.add_(counts.sum()).masked_fill_(hit, 0)
        dead = self.idle >= DEAD_AFTER_SHARES * len(codebook)
        if dead.any():
            codebook[dead] = _sample(points, int(dead.sum()))
            self.idle.masked_fill_(dead, 0)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sum_over_processes(values: Tensor) -> None:
    """Sum in place."""
    if _distributed():
        dist.all_reduce(values)


def _sample(points: Tensor, count: int) -> Tensor:
    """Draw ``count`` of all processes' ``(n, d)`` points, the same on each; one twice only if there are too few."""
    if _distributed():
        parts = [torch.empty_like(points) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, points)
        points = torch.cat(parts)
    if len(points) >= count:
        drawn = points[torch.randperm(len(points), device=points.device)[:count]]
    else:
        drawn = points[torch.randint(len(points), (count,), device=points.device)]
    if _distributed():
        dist.broadcast(drawn, src=0)  # each process has its own state of the generator
    return drawn

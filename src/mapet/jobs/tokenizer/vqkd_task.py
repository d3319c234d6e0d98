"""Training of a VQ-KD tokenizer: vector-quantised knowledge distillation (BEiT v2, arXiv 2208.06366, section 2.2)."""

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, gather, reduce
from torch import Tensor, nn

from mapet.objectives.task import Output, Task
from mapet.tokenizers.kmeans import nearest_centroid
from mapet.tokenizers.vqkd import VQKD, patch_transformer, tanh_projection

# A code is dead if none of so many times V patches had it.
DEAD_AFTER_SHARES = 100


class VQKDTask(Task):
    """Reconstruct a teacher's patch features from the codes of a tokenizer, and so learn the codes.

    The loss is the mean of ``1 - cos(reconstruction, teacher)`` plus the commitment ``|sg(code) - z|^2 / code_dim``
    (upstream's ``mse_loss`` with weight 1) of the encoder's features ``z`` of length 1. Gradients pass from code to
    ``z`` unchanged (straight-through). The decoder is a ViT like the encoder, over the map of codes.

    Codes are no parameters. In training mode each forward pass moves them, as upstream's ``NormEMAVectorQuantizer``:
    ``code <- unit(decay * code + (1 - decay) * unit(sum of the z nearest to it))`` over the batches of all processes,
    which must have the same size. There are two differences to upstream:

    - The first codes are random features ``z`` of the first batch, without k-means: the encoder is random as well.
    - A code that none of the last ``100 V`` patches had is moved to a random feature of the batch. Upstream leaves it
      where it is, where the encoder no longer reaches it.

    If the tokenizer has codes already, loaded or published, training begins with them.

    Args:
        tokenizer: the tokenizer, which is trained in place.
        target_dim: ``d``, width of the teacher's features.
        decoder_depth: blocks of the decoder; the published decoders have 1 or 3.
        decay: decay of the codes' moving average.

    Attributes:
        idle: ``(V,)`` int64 buffer: number of patches since a code was last used.
    """

    idle: Tensor

    def __init__(self, tokenizer: VQKD, target_dim: int, decoder_depth: int = 3, decay: float = 0.99) -> None:
        super().__init__()
        config = tokenizer.config
        self.tokenizer, self.decay = tokenizer, decay
        self.decoder = patch_transformer(
            image_size=tokenizer.grid[0],
            patch_size=1,
            channels=config["code_dim"],
            embed_dim=config["embed_dim"],
            depth=decoder_depth,
            num_heads=config["num_heads"],
        )
        self.projection = tanh_projection(config["embed_dim"], target_dim)
        self.register_buffer("idle", torch.zeros(tokenizer.vocab_size, dtype=torch.long))

    def no_weight_decay(self) -> set[str]:
        """Return the names of position embeddings and class tokens."""
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
            ``loss``; ``cosine``: mean cosine similarity of reconstruction and teacher; ``codes_used``: share of the
            codes that the batch uses, over all processes in training mode.
        """
        features = self.tokenizer(images)
        points, codebook = features.detach().flatten(0, 1), self.tokenizer.codebook
        with torch.autocast(images.device.type, enabled=False):
            if self.training and codebook.isnan().any():
                codebook.copy_(_sample(points, len(codebook)))
            ids = nearest_centroid(points, codebook)[0]
            codes = codebook[ids].view_as(features)
            counts = torch.bincount(ids, minlength=len(codebook))
            if self.training:
                counts = reduce(counts, "sum")
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
        """Move the codes towards ``(n, code_dim)`` points of this process; ``counts`` are those of all processes."""
        codebook = self.tokenizer.codebook
        sums = reduce(torch.zeros_like(codebook).index_add_(0, ids, points), "sum")
        moved = F.normalize(codebook.lerp(F.normalize(sums, dim=-1), 1 - self.decay), dim=-1)
        used = counts > 0
        codebook.copy_(torch.where(used[:, None], moved, codebook))

        self.idle.add_(counts.sum()).masked_fill_(used, 0)
        dead = self.idle >= DEAD_AFTER_SHARES * len(codebook)
        if dead.any():
            codebook[dead] = _sample(points, int(dead.sum()))
            self.idle.masked_fill_(dead, 0)


def _sample(points: Tensor, count: int) -> Tensor:
    """Draw ``count`` of the ``(n, d)`` points of all processes, the same on each process; repeated if n < count."""
    points = gather(points)
    if len(points) >= count:
        drawn = points[torch.randperm(len(points), device=points.device)[:count]]
    else:
        drawn = points[torch.randint(len(points), (count,), device=points.device)]
    return broadcast(drawn)  # type: ignore[no-any-return]  # processes have different random states

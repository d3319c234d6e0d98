"""MAE: masked autoencoders (He et al., 2111.06377)."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError
from mapet.models.attention import apply_blocks, make_blocks
from mapet.objectives.base import Objective, check_counts, mask_vector
from mapet.objectives.masking import Mask
from mapet.objectives.patches import gather_rows, sincos_positions
from mapet.objectives.targets import Target


class MAE(Objective):
    """Encode the visible patches alone; predict the others with a decoder that is thrown away.

    Section 3 of the paper:

    - *Masking*: patches are sampled uniformly, 75 % are removed.
    - *Encoder*: the ViT on visible patches only, without mask vectors.
    - *Decoder*: narrow blocks on all patches: the encoded ones, and a shared mask vector at every missing one, with
      fixed sine-cosine positions.
    - *Target*: by default the pixels of each missing patch, normalised by their own mean and standard deviation; mean
      squared error on missing patches only.

    It departs from the authors' code in the encoder, which is every objective's: its positions are learned, its
    initial weights are timm's, and it may have stochastic depth.

    Args:
        backbone, target, mask_ratio, masking: see ``Objective``.
        decoder_depth: blocks of the decoder.
        decoder_dim: ``d``, their width.
        decoder_heads: their attention heads.
    """

    default_masking = "random"
    default_mask_ratio = 147 / 196
    default_targets = "pixels"

    positions: Tensor

    def __init__(
        self,
        backbone: VisionTransformer,
        target: Target | None = None,
        mask_ratio: float | None = None,
        masking: str | None = None,
        *,
        decoder_depth: int = 8,
        decoder_dim: int = 512,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__(backbone, target or self.pixels(backbone), mask_ratio, masking)
        check_counts(decoder_depth=decoder_depth, decoder_dim=decoder_dim, decoder_heads=decoder_heads)
        if decoder_dim % decoder_heads:
            raise MapetError(f"decoder_dim {decoder_dim} is not divisible by decoder_heads {decoder_heads}")
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.mask_token = mask_vector(decoder_dim)
        self.decoder_embed = nn.Linear(backbone.embed_dim, decoder_dim)
        self.decoder = make_blocks(decoder_depth, decoder_dim, decoder_heads, norm_layer=norm)
        self.decoder_norm = norm(decoder_dim)
        self.head = nn.Linear(decoder_dim, self.target.width)
        for module in (self.decoder_embed, *self.decoder.modules(), self.head):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Class and register tokens have no place in the image.
        positions = F.pad(sincos_positions(self.grid, decoder_dim), (0, 0, self.prefix, 0))
        self.register_buffer("positions", positions, persistent=False)

    def read_targets(self, images: Tensor, mask: Mask) -> Tensor:
        """Return the decoded missing patches; see ``Objective``."""
        context = self.with_prefix(mask.context)
        latent = self.decoder_embed(self.encode(gather_rows(self.embed_tokens(images), context)))

        # The decoder sees the tokens in visiting order: positions travel with them.
        missing = self.mask_token.to(latent.dtype).expand(len(images), self.targets, -1)
        order = torch.cat([context, mask.target + self.prefix], dim=1)
        positions = gather_rows(self.positions.expand(len(images), -1, -1), order)
        decoded = apply_blocks(self.decoder, torch.cat([latent, missing], dim=1) + positions, self.targets)
        return self.decoder_norm(decoded)  # type: ignore[no-any-return]

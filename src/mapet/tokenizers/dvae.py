"""The tokenizer of DALL-E, a discrete VAE, which BEiT and its successors predict. It needs transformers."""

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mapet.errors import MapetError
from mapet.models.tensors import check_fit, fetch_tensors
from mapet.tokenizers.base import Tokenizer, resized, with_channels

# Meta's conversion of OpenAI's encoder to float32; the decoder is not needed.
PUBLISHED_WEIGHTS = "hf-hub:facebook/flava-image-codebook/pytorch_model.bin"

STRIDE = 8  # three max-pools by 2

# Keeps pixels off 0 and 1, where the logit-Laplace likelihood is infinite: epsilon of DALL-E (Ramesh et al. 2021,
# appendix A.3) and of its released code.
LOGIT_LAPLACE_EPS = 0.1


class DVAE(Tokenizer):
    """A tokenizer whose ids are the likeliest codes of DALL-E's encoder: one of 8192 per 8 x 8 pixels.

    The network is ``transformers.FlavaImageCodebook``. It expects mapped pixels (``FlavaImageProcessor`` maps them, the
    network does not), so they are mapped here. It is convolutional and reads images of any multiple of 8 pixels. BEiT
    and FLAVA read 112 pixels, for a student with 14 x 14 patches, and resize with Lanczos; here it is bicubic.

    Args:
        input_size: side in pixels of the encoder's input; ``grid`` has an eighth of it in rows and columns.
        vocab_size: ``V``.
        hidden_size: channels of the first layer; the last layer has 8 times as many.
        blocks_per_group: residual blocks between two poolings.

    Raises:
        MapetError: if ``input_size`` is not a multiple of 8, or transformers is not installed.
    """

    kind = "dvae"

    def __init__(
        self, input_size: int = 112, vocab_size: int = 8192, hidden_size: int = 256, blocks_per_group: int = 2
    ) -> None:
        if input_size < STRIDE or input_size % STRIDE:
            raise MapetError(f"the dVAE cannot read images of {input_size} pixels; choose a multiple of {STRIDE}")
        side = input_size // STRIDE
        super().__init__((side, side), vocab_size, input_size)
        sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size}
        self.config = {"input_size": input_size, **sizes, "blocks_per_group": blocks_per_group}
        flava = _import_transformers()
        architecture = flava.FlavaImageCodebookConfig(**sizes, num_blocks_per_group=blocks_per_group)
        self.encoder = flava.FlavaImageCodebook(architecture)  # frozen by its configuration

    @classmethod
    def from_published(cls, source: str | Path | None = None, input_size: int = 112) -> Self:
        """Build the tokenizer with published weights.

        Args:
            source: a file, a URL or ``hf-hub:OWNER/REPOSITORY/FILE`` with the state dict of a ``FlavaImageCodebook``
                or of a whole FLAVA; the shapes of the tensors decide ``hidden_size`` and ``vocab_size``. None downloads
                Meta's file, 215 MB.
            input_size: see the class.

        Raises:
            MapetError: if the weights cannot be read or do not fit, or transformers is not installed.
        """
        _import_transformers()  # before the download
        source = PUBLISHED_WEIGHTS if source is None else source
        tensors, origin = fetch_tensors(source)
        state = {name.removeprefix("image_codebook."): tensor for name, tensor in tensors.items()}
        shown_by = {"hidden_size": "blocks.input.bias", "vocab_size": "blocks.output.conv.bias"}
        sizes = {size: state[name].numel() for size, name in shown_by.items() if name in state}
        with torch.device("meta"):  # no memory and no random numbers, whatever sizes the file has
            tokenizer = cls(input_size, **sizes)
        wanted = tokenizer.encoder.state_dict()
        check_fit(state, wanted, source, "the dVAE as transformers.FlavaImageCodebook names its tensors")
        tokenizer.encoder.load_state_dict({name: state[name].float() for name in wanted}, assign=True)
        tokenizer.origin = origin
        return tokenizer.eval()

    def assign(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the likeliest codes, and minus the logarithm of their probability as distance."""
        images = with_channels(resized(images, self.input_size), self.channels)
        logits = self.encoder(map_pixels(images))
        ids = logits.argmax(dim=1)
        return ids.flatten(1), F.cross_entropy(logits, ids, reduction="none").flatten(1)


def map_pixels(images: Tensor) -> Tensor:
    """Map [0, 1] to [0.1, 0.9], as DALL-E's ``map_pixels`` and FLAVA's image processor do."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * images + LOGIT_LAPLACE_EPS


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MapetError(
            f"the dVAE tokenizer needs transformers ({error}); install it: pip install 'mapet[dvae]'"
        ) from error
    return transformers

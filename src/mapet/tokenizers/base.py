"""The base class of all visual tokenizers."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import rgb_to_grayscale

from mapet.errors import MapetError

Grid = tuple[int, int]


class Tokenizer(nn.Module):
    """A network that maps an image to prediction targets: one id in ``[0, vocab_size)`` per patch.

    A subclass defines ``kind``, ``config`` and ``assign``, and is listed in ``TOKENIZERS``.

    Args:
        grid: rows and columns of patches; ``P`` is their product.
        vocab_size: ``V``, the number of ids.
        input_size: side in pixels of the square images that the tokenizer reads; images of other sizes are resized.
        channels: channels of the images.

    Attributes:
        config: arguments of ``from_config``; can be written as JSON.
        origin: source of the weights and the SHA-256 of their file; not part of ``content_hash``.
    """

    kind: ClassVar[str]
    config: dict[str, Any]

    def __init__(self, grid: Grid, vocab_size: int, input_size: int, channels: int = 3) -> None:
        super().__init__()
        self.grid: Grid = (int(grid[0]), int(grid[1]))
        self.vocab_size, self.input_size, self.channels = vocab_size, input_size, channels
        self.origin: dict[str, str] = {}

    def __repr__(self) -> str:
        rows, columns = self.grid
        images = f"{self.channels} x {self.input_size} x {self.input_size}"
        return f"<{type(self).__name__}: {self.vocab_size} ids, {rows} x {columns} patches of {images} images>"

    def assign(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the id of each patch, and the distance between each patch and the code of its id.

        Args:
            images: ``(B, C, H, W)`` float32 in [0, 1].

        Returns:
            ids ``(B, P)`` int64 and distances ``(B, P)`` in the tokenizer's own measure.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(chain(self.parameters(), self.buffers())).device

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the tokenizer; its weights are to be loaded from a state dict."""
        return cls(**config)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` images in [0, 1] to ``(B, P)`` int64 ids in raster order."""
        return self.encode_with_distance(images)[0]

    @torch.no_grad()
    def encode_with_distance(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids of ``encode`` and the ``(B, P)`` distances between patches and their codes."""
        with full_precision(images.device):
            return self.assign(images.float())

    @property
    def content_hash(self) -> str:
        """SHA-256 of everything that decides the ids: tokenizers with the same hash return the same ids."""
        return hash_content([self.kind, self.config], self)


def hash_content(config: Any, module: nn.Module) -> str:
    """Return the SHA-256 of a configuration that can be written as JSON, and of a module's tensors."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def full_precision(device: torch.device, *, tf32: bool = False) -> Iterator[None]:
    """Compute in float32, without autocast: ids must not depend on the precision of the training.

    Args:
        device: of the computation.
        tf32: let NVIDIA GPUs multiply in TF32, several times as fast: float32 with 10 bits of mantissa.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    # flags() sets all flags, to False by default: the flags that must stay are passed on.
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    before = matmul.allow_tf32
    with torch.autocast(device.type, enabled=False), cudnn.flags(**kept, allow_tf32=tf32):
        try:
            matmul.allow_tf32 = tf32
            yield
        finally:
            matmul.allow_tf32 = before


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Convert ``(B, 1, H, W)`` images to 3 channels, or ``(B, 3, H, W)`` images to 1.

    Raises:
        MapetError: for other numbers of channels.
    """
    check_convertible(images.shape[1], channels)
    if images.shape[1] == channels:
        return images
    return rgb_to_grayscale(images, num_output_channels=channels)  # type: ignore[no-any-return]


def check_convertible(found: int, wanted: int) -> None:
    """Refuse numbers of channels other than grey and RGB, between which there is no conversion.

    Raises:
        MapetError: if the numbers differ and one of them is neither 1 nor 3.
    """
    if found != wanted and not {found, wanted} <= {1, 3}:
        raise MapetError(f"images of {found} channel(s) cannot be converted to the {wanted} that are read")


def resized(images: Tensor, size: int) -> Tensor:
    """Resize ``(B, C, H, W)`` images in [0, 1] to ``size`` x ``size`` pixels with bicubic interpolation."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)

"""The check that what a network computes is finite."""

from collections.abc import Sequence

from torch import Tensor

from mapet.errors import MapetError


def check_finite(values: Tensor, keys: Sequence[str], what: str) -> None:
    """Raise MapetError if the ``(B, ...)`` values of a batch contain NaN or infinity.

    Args:
        values: computed for ``B`` images.
        keys: of these images, for the message.
        what: the values are, for the message.
    """
    finite = values.isfinite().reshape(len(values), -1).all(dim=1)
    if not finite.all():
        raise MapetError(
            f"{what} of image {keys[int(finite.long().argmin())]!r} contains NaN or infinity; pass --precision no (for "
            "mapet embed also --dtype float32), or use other weights"
        )

"""Colour jitter: drawn for each image in a loading process, applied to a batch on the training device."""

import torch
from torch import Tensor
from torchvision.transforms.v2 import ColorJitter

BRIGHTNESS, CONTRAST, SATURATION = range(3)  # torchvision's numbers
GREY = (0.2989, 0.587, 0.114)  # shares of red, green and blue, as torchvision's rgb_to_grayscale
AT_ONCE = 2**17  # values that a CPU processes together: they fit into its cache


def draw_jitter(jitter: ColorJitter, seed: int) -> Tensor:
    """Draw what torchvision's ``ColorJitter`` would do to an image; torch's default generator is seeded.

    Returns:
        ``(3, 2)``: an operation and its factor in each row, in the order of their application.
    """
    torch.default_generator.manual_seed(seed)
    drawn = jitter.make_params([])
    factors = drawn["brightness_factor"], drawn["contrast_factor"], drawn["saturation_factor"]
    order = [number for number in drawn["fn_idx"].tolist() if number <= SATURATION]
    return torch.tensor([(number, float(factors[number])) for number in order])


def jittered(images: Tensor, jitter: Tensor) -> Tensor:
    """Return images with other colours: each operation blends an image with black, its mean grey, or its grey version.

    Only images of 3 channels have a grey version; others keep their saturation, and their mean is that of all channels.

    The result is torchvision's ``ColorJitter`` within 1e-6. No operation waits for the device.

    Args:
        images: ``(B, C, H, W)`` float32 in [0, 1].
        jitter: ``(B, 3, 2)``, see ``draw_jitter``.
    """
    result, many = images.clone(), max(1, AT_ONCE // images[0].numel()) if images.is_cpu else len(images)
    for part, steps in zip(result.split(many), jitter.split(many), strict=True):
        for step in steps.unbind(1):
            kind, factor = step[:, :, None, None, None].unbind(1)
            grey = _grey(part)
            mean = grey.mean(dim=(-2, -1), keepdim=True).mean(dim=1, keepdim=True) * (kind == CONTRAST)
            other = grey.mul_(kind == SATURATION).add_(mean).mul_(1 - factor)
            torch.addcmul(other, part, factor, out=part).clamp_(0, 1)
    return result


def _grey(images: Tensor) -> Tensor:
    """Return the grey version of RGB images, ``(B, 1, H, W)``; a copy of images with other channels."""
    if images.shape[1] != len(GREY):
        return images.clone()
    grey = GREY[0] * images[:, :1]
    for channel, share in list(enumerate(GREY))[1:]:
        grey.add_(images[:, channel : channel + 1], alpha=share)
    return grey

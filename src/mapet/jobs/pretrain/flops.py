"""Floating-point operations of a run, counted without computing anything."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mapet.jobs.pretrain.config import PretrainConfig
from mapet.jobs.pretrain.settle import initial_backbone
from mapet.objectives.base import Objective
from mapet.objectives.registry import build_objective, build_target


def count_flops(config: PretrainConfig, width: int) -> float:
    """Return the floating-point operations of one image in a run; see ``flops_of_image``.

    They are those of the student; a tokenizer or teacher is not counted.

    Args:
        config: of the run, settled.
        width: number of token ids or width of features.
    """
    with torch.device("meta"):
        backbone = initial_backbone(config)
        target = build_target(config.objective, config.targets, backbone, width, config.feature_loss)
        keys = config.mask_ratio, config.masking, config.objective_args
        objective = build_objective(config.objective, backbone, target, *keys)
        given = torch.zeros(1, objective.patches, width)
        if config.targets == "ids":
            given = given[..., 0].long()
    return flops_of_image(objective, given)


def flops_of_image(objective: Objective, given: Tensor) -> float:
    """Return the floating-point operations of one image, forward and backward, as torch counts them.

    Nothing is computed.

    Args:
        objective: on the meta device.
        given: its target values of one image, on the meta device.
    """
    embed = objective.backbone.patch_embed
    images = torch.zeros(1, embed.proj.in_channels, *embed.img_size, device="meta")
    # Some maskings depend on random values, which the meta device does not have.
    mask = objective.draw_mask(1, torch.device("cpu"))
    mask = type(mask)(mask.context.to("meta"), mask.target.to("meta"))
    # FlopCounterMode does not count torch's fused attention for CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(images, given, mask)["loss"].backward()
    return float(counter.get_total_flops())

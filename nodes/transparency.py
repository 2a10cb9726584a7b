"""Transparency as ComfyUI has it beside a picture: a MASK, 1 where nothing is seen."""

from __future__ import annotations

import torch
from torch import Tensor

from ..infdit.conditioning import upscale_alpha
from ..infdit.upscale import check_values


def from_mask(mask: Tensor, name: str) -> Tensor:
    """ComfyUI's MASK, (B, h, w) or (h, w) of any size, on any device → (B, h, w) float32 in 0..1 on the CPU.

    Raises:
        ValueError: what is no mask; its input is called `name`.
    """
    if not isinstance(mask, Tensor) or not (mask.is_floating_point() or mask.dtype == torch.bool):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} of {kind} must be of floating point in 0..1: connect a node that gives a MASK")
    if mask.dim() not in (2, 3) or 0 in mask.shape:
        raise ValueError(f"{name} of shape {tuple(mask.shape)} must be (batch, height, width), of at least one pixel")
    mask = mask.float().cpu()
    check_values(mask, name)
    return mask.reshape(-1, *mask.shape[-2:]).clamp(0, 1)


def with_transparency(pictures: Tensor, mask: Tensor | None) -> Tensor:
    """Pictures (B, h, w, 3 or 4) with what a mask says as their fourth channel; without one as they are.

    Load Image gives a mask of zeros, of 64×64, for what has no transparency: then nothing is added either.

    Args:
        pictures: float32 on the CPU.
        mask: (B or 1, any h, any w) or (h, w), 1 where nothing is seen.

    Raises:
        ValueError: a mask that does not fit the pictures.
    """
    masks = None if mask is None else from_mask(mask, "transparency")
    if masks is None or not masks.any():
        return pictures
    if len(masks) not in (1, len(pictures)):
        raise ValueError(
            f"transparency is a batch of {len(masks)} and image one of {len(pictures)}: it must be as many, or one; "
            "connect the mask of the node that gave the pictures"
        )
    alpha, size = 1 - masks[:, None], pictures.shape[1:3]
    if alpha.shape[-2:] != size:
        alpha = upscale_alpha(alpha, (size[0], size[1]))
    return torch.cat((pictures[..., :3], alpha.movedim(1, -1).expand(len(pictures), -1, -1, -1)), -1)

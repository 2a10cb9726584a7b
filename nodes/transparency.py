"""Transparency as ComfyUI has it beside a picture: a MASK, 1 where nothing is seen."""

from __future__ import annotations

from torch import Tensor, cat

from ..infdit.conditioning import upscale_alpha
from .comfy_page import from_image


def with_transparency(pictures: Tensor, mask: Tensor | None) -> Tensor:
    """Pictures (B, h, w, 3 or 4) with what a mask says as their fourth channel; without one as they are.

    Load Image gives a mask of zeros, of 64×64, for what has no transparency: then nothing is added either.

    Args:
        pictures: float32 on the CPU.
        mask: (B or 1, any h, any w) or (h, w), 1 where nothing is seen.

    Raises:
        ValueError: a mask that does not fit the pictures.
    """
    masks = None if mask is None else from_image(mask)
    if masks is None or not masks.any():
        return pictures
    if masks.dim() == 2:
        masks = masks[None]
    if masks.dim() != 3 or len(masks) not in (1, len(pictures)):
        raise ValueError(
            f"transparency of shape {tuple(masks.shape)} must be ({len(pictures)} or 1, height, width): connect the "
            "mask of the node that gave the pictures"
        )
    if not masks.isfinite().all():
        raise ValueError("transparency holds values that are not finite: an earlier node made NaN or inf")
    alpha, size = 1 - masks.clamp(0, 1)[:, None], pictures.shape[1:3]
    if alpha.shape[-2:] != size:
        alpha = upscale_alpha(alpha, (size[0], size[1]))
    return cat((pictures[..., :3], alpha.movedim(1, -1).expand(len(pictures), -1, -1, -1)), -1)

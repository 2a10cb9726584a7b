"""Transparency: the colour under it, and its own enlargement."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def visible_colour(image: Tensor) -> Tensor:
    """(B, h, w, 3 or 4) → (B, 3, h, w): the colours, those under full transparency taken from around it."""
    pixels = image.movedim(-1, 1)
    rgb, alpha = pixels[:, :3], pixels[:, 3:]
    return fill_transparent(rgb, alpha) if alpha.shape[1] else rgb


def fill_transparent(rgb: Tensor, alpha: Tensor) -> Tensor:
    """Give pixels that are fully transparent the colour of what is visible around them.

    Their stored colour is arbitrary, mostly black, and would bleed into visible edges as a dark fringe when the
    picture is enlarged. A pyramid of alpha-weighted means is built and read back where alpha is 0 (push-pull).

    Args:
        rgb: (B, 3, h, w); alpha: (B, 1, h, w) in 0..1. A picture without any visible pixel stays as it is.
    """
    if not (alpha == 0).any():
        return rgb
    means, weights = [rgb * alpha], [alpha]
    while max(means[-1].shape[-2:]) > 1:
        means, weights = ([*xs, F.avg_pool2d(xs[-1], 2, ceil_mode=True)] for xs in (means, weights))
    colour = means[-1] / weights[-1]
    for mean, weight in zip(means[-2::-1], weights[-2::-1], strict=True):
        coarse = F.interpolate(colour, size=mean.shape[-2:], mode="bilinear", align_corners=False)
        colour = torch.where(weight > 0, mean / weight, coarse)
    visible = alpha.amax((-2, -1), keepdim=True) > 0  # else there is nothing around, and 0/0 everywhere
    return torch.where((alpha > 0) | ~visible, rgb, colour)


def upscale_alpha(alpha: Tensor, size: tuple[int, int]) -> Tensor:
    """Lanczos to (height, width): alpha (B, 1, h, w) in 0..1 in and out."""
    planes = [Image.fromarray(plane.numpy()) for plane in alpha[:, 0].float().cpu()]  # mode F: float32
    resized = [np.array(plane.resize((size[1], size[0]), Image.Resampling.LANCZOS)) for plane in planes]
    return torch.from_numpy(np.stack(resized))[:, None].clamp(0, 1)

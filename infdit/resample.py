"""One aligned resampler: the upscaled and the low-resolution picture from one continuous picture.

Antialiased bicubic (Keys, a = −0.5) as weights of a few taps per axis. Output pixel i of a picture that is resampled
by `ratio` source pixels per target pixel, `factor` target pixels at a time, has its centre at (i + ½)·factor·ratio.
So pixel i of the low-resolution picture (factor 4) lies in the middle of pixels 4i … 4i+3 of the upscaled one
(factor 1) at every target size, which resizing each by itself would not give. The same holds for the padding to the
right of and below the target, where the picture's edge is repeated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import LR_FACTOR


def conditioning_pictures(image: Tensor, size: tuple[int, int], padded: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What Inf-DiT is conditioned on (INFDIT.md section 4).

    Where `size` is a multiple of 4 both equal torch's antialiased bicubic `interpolate` up to rounding.

    Args:
        image: (B, 3, h, w) in [-1, 1].
        size: height and width of the target.
        padded: height and width of the grid of whole blocks that covers it, multiples of 4.

    Returns:
        lr (B, 3, H/4, W/4) and lr_upscaled (B, 3, H, W), clipped to [-1, 1], at the padded size.
    """
    lr, up = (_resample(image, size, padded, factor) for factor in (LR_FACTOR, 1))
    return lr, up.clamp(-1, 1)


def _resample(image: Tensor, size: tuple[int, int], padded: tuple[int, int], factor: int) -> Tensor:
    for axis, target, length in zip((-2, -1), size, padded, strict=True):
        taps, weights = _taps(image.shape[axis], target, length, factor)
        shape = [-1, 1] if axis == -2 else [-1]
        terms = zip(taps.to(image.device).unbind(1), weights.to(image).unbind(1), strict=True)
        image = sum(
            (image.index_select(axis, tap) * weight.view(shape) for tap, weight in terms),
            start=image.new_zeros(()),
        )
    return image


def _taps(source: int, target: int, padded: int, factor: int) -> tuple[Tensor, Tensor]:
    """Source pixels (n, taps) and their weights (n, taps), float64, of n = padded/factor output pixels."""
    ratio = source / target
    step = ratio * factor  # source pixels from one output pixel to the next
    stretch = max(step, 1.0)  # antialiasing: when shrinking, the kernel is as wide as the output pixels are far apart
    centre = (torch.arange(padded // factor, dtype=torch.float64)[:, None] + 0.5) * step
    taps = (centre - 2 * stretch).floor() + torch.arange(math.ceil(4 * stretch) + 1)
    # as torch does, the picture's own pixels leave out what lies beyond its edge; those of the padding repeat the edge
    used = ((taps >= 0) & (taps < source)) | (centre >= source)
    weights = _cubic((taps + 0.5 - centre) / stretch) * used
    return taps.clamp(0, source - 1).long(), weights / weights.sum(1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = −0.5 (Keys 1981, equation 15)."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))

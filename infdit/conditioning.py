"""What the network is conditioned on, and what it is not given: the picture at two sizes, and its transparency.

One aligned resampler: antialiased bicubic (Keys, a = −0.5) as weights of a few taps per axis, of one continuous
picture. Pixel i of an image that is resampled by `ratio` has its centre at (i + ½)·ratio. So pixel i of the
low-resolution picture, whose ratio is 4 times the upscaled one's, lies in the middle of pixels 4i … 4i+3 of that at
every target size, which resizing each by itself would not give. The same holds for the padding to the right of and
below the target, where the picture's edge is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .config import LR_FACTOR


def conditioning_pictures(image: Tensor, size: tuple[int, int], padded: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What Inf-DiT is conditioned on.

    Where `size` is a multiple of 4 both equal torch's antialiased bicubic `interpolate` up to rounding.

    Args:
        image: (B, 3, h, w) in [-1, 1].
        size: height and width of the target.
        padded: height and width of the grid of whole blocks that covers it, multiples of 4.

    Returns:
        lr (B, 3, H/4, W/4) and lr_upscaled (B, 3, H, W), clipped to [-1, 1], at the padded size.
    """
    (h, w), (height, width) = size, padded
    ratios = image.shape[-2] / h, image.shape[-1] / w
    lr = _window(image, [LR_FACTOR * ratio for ratio in ratios], (0, height // LR_FACTOR), (0, width // LR_FACTOR))
    up = image.new_empty((*image.shape[:2], height, width))
    for channel, plane in zip(up.unbind(1), image.split(1, 1), strict=True):
        # the same and much faster; in float64, for torch places the taps in the precision of the picture
        channel[..., :h, :w] = F.interpolate(plane.double(), size, mode="bicubic", antialias=True)[:, 0]
    up[..., h:, :w] = _window(image, ratios, (h, height), (0, w))
    up[..., :, w:] = _window(image, ratios, (0, height), (w, width))
    return lr, up.clamp_(-1, 1)


def _window(image: Tensor, ratios: Sequence[float], rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Rows and columns from … to … of an image that is resampled by (vertical, horizontal) ratios."""
    for axis, ratio, (first, end) in zip((-2, -1), ratios, (rows, columns), strict=True):
        image = resample(image, axis, ratio, first, end - first)
    return image


def resample(image: Tensor, axis: int, ratio: float, first: int, count: int) -> Tensor:
    """Pixels first … first + count − 1 of an image that is resampled along one axis.

    Args:
        image: (B, c, h, w), floating point.
        axis: -2 or -1.
        ratio: source pixels from one of the resampled image's pixels to the next.
        first, count: pixels that are wanted; those beyond the source's end see its edge repeated.
    """
    taps, weights = _taps(image.shape[axis], ratio, first, count)
    image = image if axis == -2 else image.transpose(-2, -1).contiguous()  # whole rows are picked, which is fast
    result = image.new_zeros((*image.shape[:2], count, image.shape[-1]))
    weights = weights.to(image.dtype).to(image.device)  # in two steps: MPS has no float64
    for tap, weight in zip(taps.to(image.device).unbind(1), weights.unbind(1), strict=True):
        result.addcmul_(image.index_select(-2, tap), weight[:, None])
    return result if axis == -2 else result.transpose(-2, -1)


def _taps(source: int, ratio: float, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Source pixels (count, taps) and their weights (count, taps), float64."""
    stretch = max(ratio, 1.0)  # antialiasing: when shrinking, the kernel is as wide as the output pixels are far apart
    centre = (torch.arange(first, first + count, dtype=torch.float64, device="cpu")[:, None] + 0.5) * ratio
    taps = (centre - 2 * stretch).floor() + torch.arange(math.ceil(4 * stretch) + 1, device="cpu")
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


def visible_colour(image: Tensor) -> Tensor:
    """(B, h, w, 3 or 4) → (B, 3, h, w): the colours, those under full transparency taken from around it."""
    pixels = image.movedim(-1, 1)
    return fill_transparent(pixels[:, :3], pixels[:, 3:]) if pixels.shape[1] == 4 else pixels


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

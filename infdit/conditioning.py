"""What the network is conditioned on, and what it is not given: the picture at two sizes, and its transparency.

One aligned resampler: antialiased bicubic (Keys, a = −0.5) as weights of a few taps per axis, of one continuous
picture. Pixel i of an image that is resampled by `ratio` has its centre at (i + ½)·ratio. So pixel i of the
low-resolution picture, whose ratio is 4 times the upscaled one's, lies in the middle of pixels 4i … 4i+3 of that at
every target size, which resizing each by itself would not give. The same holds for the padding to the right of and
below the target, where the picture's edge is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LR_FACTOR

GREY_REACH = 4  # pixels of the picture given, within which any colour lets a bridge have some
PIECE = 128  # of the larger picture's pixels each way: small for fast memory and a quick stop, large for products


@dataclass(frozen=True)
class Kernel:
    """How much a pixel counts at a distance of x output pixels: `weigh(x)`, 0 from `reach` on."""

    weigh: Callable[[Tensor], Tensor]
    reach: int


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = −0.5 (Keys 1981, equation 15)."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


BICUBIC = Kernel(_cubic, 2)
LANCZOS = Kernel(lambda x: torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), torch.zeros_like(x)), 3)


def conditioning_pictures(
    image: Tensor, size: tuple[int, int], padded: tuple[int, int], told: Callable[[int], None] = lambda rows: None,
    empty: Callable[[tuple[int, ...]], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What Inf-DiT is conditioned on.

    Where `size` is a multiple of 4 both equal torch's antialiased bicubic `interpolate` up to rounding.

    Args:
        image: (B, 3, h, w) in [-1, 1].
        size: height and width of the target.
        padded: height and width of the grid of whole blocks that covers it, multiples of 4.
        told: is called with the rows of the larger picture that were made, every few milliseconds, sometimes with 0.
        empty: makes room for both on the CPU, in place of memory.

    Returns:
        lr (B, 3, H/4, W/4) and lr_upscaled (B, 3, H, W), clipped to [-1, 1], at the padded size.
    """
    ratios = image.shape[-2] / size[0], image.shape[-1] / size[1]
    small, large = (
        None if empty is None else empty((*image.shape[:2], *(side // factor for side in padded)))
        for factor in (LR_FACTOR, 1)
    )
    lr = resample(
        image,
        (LR_FACTOR * ratios[0], LR_FACTOR * ratios[1]),
        range(padded[0] // LR_FACTOR),
        range(padded[1] // LR_FACTOR),
        told=lambda rows: told(0),
        into=small,
    )
    return lr, resample(image, ratios, range(padded[0]), range(padded[1]), (-1, 1), told=told, into=large)


def resample(
    image: Tensor, ratios: tuple[float, float], rows: range, columns: range,
    bounds: tuple[float, float] = (-math.inf, math.inf), kernel: Kernel = BICUBIC,
    told: Callable[[int], None] = lambda rows: None, into: Tensor | None = None,
) -> Tensor:
    """Some rows and columns of an image that is resampled by (vertical, horizontal) ratios.

    A pixel is a sum of few of the source's, and pixels side by side share most of them. So pieces of the result are
    two small products of matrices. They are computed in float64, whose products no setting of PyTorch makes coarser.

    Args:
        image: (B, c, h, w), floating point.
        ratios: source pixels from one of the resampled image's pixels to the next.
        rows, columns: that are wanted; those beyond the source's end see its edge repeated.
        bounds: to which values are clipped.
        kernel: weights by distance.
        told: is called with the number of rows after each strip of them.
        into: takes the result, in place of a new tensor.

    Returns:
        (B, c, rows, columns), like the image.
    """
    result = image.new_empty((*image.shape[:2], len(rows), len(columns))) if into is None else into
    height, width = (max(8, int(PIECE / max(ratio, 1))) for ratio in ratios)  # of a piece
    across = [kernel_matrix(image.shape[-1], ratios[1], piece, kernel) for piece in _pieces(columns, width)]
    left, right = min(taps.start for taps, _ in across), max(taps.stop for taps, _ in across)
    for piece, strip in zip(_pieces(rows, height), result.split(height, -2), strict=True):
        taps, weights = kernel_matrix(image.shape[-2], ratios[0], piece, kernel)
        source = weights @ image[..., taps.start : taps.stop, left:right].to("cpu", torch.float64)
        for (taps, weights), part in zip(across, strip.split(width, -1), strict=True):
            part.copy_(source[..., taps.start - left : taps.stop - left] @ weights.mT)
        strip.clamp_(*bounds)
        told(len(piece))
    return result


def _pieces(pixels: range, size: int) -> list[range]:
    return [pixels[i : i + size] for i in range(0, len(pixels), size)]


def kernel_matrix(source: int, ratio: float, pixels: range, kernel: Kernel) -> tuple[range, Tensor]:
    """The source pixels that these are made of, and the weights (pixels, source pixels), float64."""
    stretch = max(ratio, 1.0)  # antialiasing: when shrinking, the kernel is as wide as the output pixels are far apart
    reach = kernel.reach * stretch
    centre = (torch.arange(pixels.start, pixels.stop, dtype=torch.float64, device="cpu")[:, None] + 0.5) * ratio
    taps = (centre - reach).floor() + torch.arange(math.ceil(2 * reach) + 1, dtype=torch.float64, device="cpu")
    # as torch does, the picture's own pixels leave out what lies beyond its edge; those of the padding repeat the edge
    used = ((taps >= 0) & (taps < source)) | (centre >= source)
    weights = kernel.weigh((taps + 0.5 - centre) / stretch) * used
    first, last = ((pixel + 0.5) * ratio - reach for pixel in (pixels.start, pixels.stop - 1))
    first, last = (min(max(tap, 0), source - 1) for tap in (math.floor(first), math.floor(last) + math.ceil(2 * reach)))
    matrix = weights.new_zeros((len(pixels), last + 1 - first))
    matrix.scatter_add_(1, taps.clamp(first, last).long() - first, weights)
    return range(first, last + 1), matrix / weights.sum(1, keepdim=True)


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


def without_colour(colour: Tensor) -> Tensor | None:
    """(1, 3, h, w) → (1, 1, h, w), true where R = G = B as far as GREY_REACH pixels around; None if that is nowhere."""
    coloured = (colour.amax(1, keepdim=True) != colour.amin(1, keepdim=True)).float()
    grey = F.max_pool2d(coloured, 2 * GREY_REACH + 1, 1, GREY_REACH) == 0
    return grey if grey.any() else None


def take_colour(strip: Tensor, grey: Tensor, top: int, height: int) -> None:
    """Make what should be grey exactly so, in place, which a network is only nearly.

    Args:
        strip: (1, 3, n, W), rows of a result of this height from `top` on.
        grey: (1, 1, h, w), see `without_colour`.
    """
    rows = torch.arange(top, top + strip.shape[-2], dtype=torch.int64, device="cpu") * grey.shape[-2] // height
    columns = torch.arange(strip.shape[-1], dtype=torch.int64, device="cpu") * grey.shape[-1] // strip.shape[-1]
    where = grey[:, 0, rows][..., columns]
    mean = strip.mean(1)
    for channel in strip.unbind(1):
        channel.copy_(torch.where(where, mean, channel))


def upscale_alpha(
    alpha: Tensor, size: tuple[int, int], told: Callable[[int], None] = lambda rows: None, into: Tensor | None = None
) -> Tensor:
    """Lanczos to (height, width): alpha (B, 1, h, w) in 0..1 in, and float32 on the CPU out; see `resample`."""
    ratios = alpha.shape[-2] / size[0], alpha.shape[-1] / size[1]
    return resample(alpha.float().cpu(), ratios, range(size[0]), range(size[1]), (0, 1), LANCZOS, told, into)

"""What CLIP sees of a picture: a square of its middle, or all of it on a square of nothing.

crop  short side → 224, centre 224×224: as published; of a panorama only the middle is seen
pad   long side → 224, centred, the rest 0 after (p − mean) ÷ std: all of it is seen, smaller

The padding is CLIP's mean colour because that is 0 once standardised, and CLIP's patch convolution has no bias: a
patch of padding adds nothing of its own to its token but the place where it is. Repeated edges would add streaks
that the picture does not have, over up to nearly all of the square, and CLIP would be told of streaks. Models that
show CLIP whole pictures (LLaVA's) pad with the same colour.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)

View = Literal["crop", "pad"]
_SIDE_THAT_FITS: dict[str, Callable[[int, int], int]] = {"crop": min, "pad": max}
VIEWS: tuple[str, ...] = tuple(_SIDE_THAT_FITS)

_ROWS = 32  # of a resize matrix at a time: each then spans only the pixels near them


def preprocess(image: Tensor, side: int = 224, view: View = "crop") -> Tensor:
    """One side to `side` by antialiased bicubic, centre crop or padding, CLIP's mean and standard deviation.

    "crop" equals torchvision's Resize(side, BICUBIC), CenterCrop(side), Normalize on tensors. Only what it keeps
    is computed: resized whole, a strip of 1×10000 pixels would fill gigabytes.

    Args:
        image: (B, 3, h, w) in [-1, 1], from 1×1 up.
        side: of the result, pixels.
        view: "crop" or "pad"; of a square picture they are the same.

    Returns:
        (B, 3, side, side), float32 (float64 from float64); padding is 0.

    Raises:
        ValueError: not a batch of RGB images in floating point, or another view.
    """
    if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape[2:] or not image.is_floating_point():
        raise ValueError(
            f"image is {image.dtype} {tuple(image.shape)}, must be floating point (B, 3, h, w): scale it to [-1, 1]"
        )
    if view not in VIEWS:
        raise ValueError(f"view is {view!r}, must be one of {', '.join(VIEWS)}")
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    fitted = _SIDE_THAT_FITS[view](*image.shape[2:])
    padding = {}
    for axis in sorted((2, 3), key=lambda axis: -image.shape[axis]):  # first where most is left out
        size = max(int(side * image.shape[axis] / fitted), 1)  # rounds down, as torchvision does
        kept = min(size, side)
        image = _resize(image, axis, size, first=round((size - kept) / 2), count=kept)  # half to even, likewise
        before = (side - kept) // 2
        padding[axis] = (before, side - kept - before)
    mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return F.pad((image / 2 + 0.5 - mean) / std, padding[3] + padding[2])


def _resize(image: Tensor, axis: int, size: int, first: int, count: int) -> Tensor:
    """Pixels first…first+count−1 of the image resized to `size` along rows (axis 2) or columns (axis 3)."""
    pieces: list[Tensor] = []
    for begin in range(first, first + count, _ROWS):
        start, weights = _resize_weights(image.shape[axis], size, begin, min(_ROWS, first + count - begin))
        weights = weights.to(image.dtype).to(image.device)  # in two steps: MPS has no float64
        source = image.narrow(axis, start, weights.shape[1])
        pieces.append(weights @ source if axis == 2 else source @ weights.T)
    return torch.cat(pieces, axis)


def _resize_weights(length: int, size: int, first: int, count: int) -> tuple[int, Tensor]:
    """Antialiased bicubic (a = −0.5) from `length` to `size` pixels: rows first…first+count−1 of its matrix.

    Row i weighs source pixel j by k((j + ½ − (i + ½)·s) / max(s, 1)), s = length/size, made to sum to 1.

    Returns:
        The first source pixel in reach, and (count, pixels in reach) in float64.
    """
    scale = length / size
    reach = 2 * max(scale, 1.0)  # of the kernel, in source pixels
    start = max(int((first + 0.5) * scale - reach), 0)
    stop = min(int((first + count - 0.5) * scale + reach) + 1, length)
    centre = (torch.arange(first, first + count, dtype=torch.float64) + 0.5) * scale  # (count)
    pixel = torch.arange(start, stop, dtype=torch.float64) + 0.5
    d = (pixel - centre[:, None]).abs() / max(scale, 1.0)  # (count, pixels)
    near = (1.5 * d - 2.5) * d**2 + 1
    far = ((2.5 - 0.5 * d) * d - 4) * d + 2
    weights = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    return start, weights / weights.sum(dim=1, keepdim=True)

"""How large a result is, and by way of which sizes a picture comes there. Integers only.

A pass enlarges each side by at most 4, which is what the network was made for. More takes several passes, one run all
the same: the first ones grow by 4, for there the network invents most, and the last one by what is left.

A model that was asked for nothing but 4, or 2 and 4, makes what grows by less too sharp. It is asked for the next of
them all the same, and what it made is made smaller.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from itertools import pairwise

from .config import MAX_SCALE

MOST_SCALE = 16  # of a run
MEGAPIXEL = 1024 * 1024  # pixels, as in ComfyUI's own nodes

Size = tuple[int, int]  # height, width


def target_size(height: int, width: int, scale: float, size: Size | None = None) -> Size:
    """(height, width) that a picture of height × width becomes; sides are rounded half up.

    Raises:
        ValueError: a scale or size outside what can be done.
    """
    if size is None:
        if not 1 <= scale <= MOST_SCALE:
            raise ValueError(f"scale {scale} must be at least 1 and at most {MOST_SCALE}")
        return math.floor(height * scale + 0.5), math.floor(width * scale + 0.5)
    size = operator.index(size[0]), operator.index(size[1])
    for name, side, target in (("height", height, size[0]), ("width", width, size[1])):
        if not side <= target <= MOST_SCALE * side:
            raise ValueError(
                f"{name} {target} must be between the picture's {side} and {MOST_SCALE} times it, {MOST_SCALE * side}"
            )
    return size


def growth(way: str, value: float, height: int, width: int) -> float:
    """How many times larger a side becomes if a picture keeps its shape.

    way: "longest" or "shortest", value is the pixels of that side; or "megapixels", value is MEGAPIXELs of the result.
    """
    if way == "megapixels":
        return math.sqrt(max(value, 0) * MEGAPIXEL / (height * width))
    return value / {"longest": max, "shortest": min}[way](height, width)


def bounds(way: str, height: int, width: int, digits: int) -> tuple[float, float]:
    """The least and the most that `growth` may be given as its value; of megapixels so many digits behind the point."""
    if way == "megapixels":
        unit, area = 10**digits, height * width / MEGAPIXEL
        return math.ceil(area * unit) / unit, math.floor(MOST_SCALE**2 * area * unit) / unit
    side = {"longest": max, "shortest": min}[way](height, width)
    return side, MOST_SCALE * side


def passes(source: Size, target: Size) -> list[Size]:
    """The sizes that a picture takes one after another, `target` the last of them; one where that is enough."""
    sizes = [target]
    while any(last > MAX_SCALE * side for last, side in zip(target, source, strict=True)):
        source = min(MAX_SCALE * source[0], target[0]), min(MAX_SCALE * source[1], target[1])
        sizes.insert(-1, source)
    return sizes


def passes_by(scales: Collection[int], source: Size, target: Size) -> list[tuple[Size, Size, int]]:
    """The same for a model that was asked for these scales alone: sizes that are computed, made of each, the scale.

    Here the first pass grows by what is left beside factors of the greatest: that is as good, and less to compute.
    """
    most, sizes = max(scales), [target]

    def fits(scale: int, side: Size, size: Size) -> bool:
        return all(after <= scale * before for before, after in zip(side, size, strict=True))

    while not fits(most, source, sizes[0]):
        height, width = (max(side, -(-first // most)) for side, first in zip(source, sizes[0], strict=True))
        sizes.insert(0, (height, width))
    found = list[tuple[Size, Size, int]]()
    for before, size in pairwise([source, *sizes]):  # what stays as large adds detail, and is computed as it is
        scale = min(scale for scale in scales if fits(scale, before, size))
        found.append((size if size == before else (scale * before[0], scale * before[1]), size, scale))
    return found

"""How large the result becomes: four ways to say it, one input for all nodes that need it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..infdit.upscale import MAX_SCALE
from .schema import SLIDER

MAX_SIDE = 65536  # pixels
MEGAPIXEL = 1024 * 1024  # pixels, as in ComfyUI's own nodes
WAYS = SCALE, SIDES, LONGEST, MEGAPIXELS = "scale by", "width and height", "longest side", "megapixels"

Size = Mapping[str, Any]  # a DynamicCombo's value: the choice under the input's own name, and the choice's inputs


def size_input() -> io.Input:
    """The input `size`."""
    return io.DynamicCombo.Input(
        "size",
        options=[
            io.DynamicCombo.Option(SCALE, [_scale_input()]),
            io.DynamicCombo.Option(SIDES, [_side_input("width"), _side_input("height", default=0)]),
            io.DynamicCombo.Option(LONGEST, [_longest_side_input()]),
            io.DynamicCombo.Option(MEGAPIXELS, [_megapixels_input()]),
        ],
        tooltip="How to say how large the result becomes. Each side grows by at most 4: for more, use the node twice.",
    )


def _scale_input() -> io.Input:
    return io.Float.Input(
        "scale", default=4.0, min=1.01, max=float(MAX_SCALE), step=0.01, display_mode=SLIDER,
        tooltip="How many times larger each side becomes. The model is trained for up to 4.",
    )


def _side_input(name: str, default: int = 4096) -> io.Input:
    other = "height" if name == "width" else "width"
    return io.Int.Input(
        name, default=default, min=0, max=MAX_SIDE,
        tooltip=f"Pixels of the result. 0: what keeps the picture's proportions at the {other} given. If both are "
        "given the picture is stretched to them.",
    )


def _longest_side_input() -> io.Input:
    return io.Int.Input(
        "longest_side", default=4096, min=1, max=MAX_SIDE,
        tooltip="Pixels of the result's longer side; the other one keeps the proportions.",
    )


def _megapixels_input() -> io.Input:
    return io.Float.Input(
        "megapixels", default=16.0, min=0.01, max=float(MAX_SIDE**2 // MEGAPIXEL), step=0.01,
        tooltip="Pixels of the result in millions, counted as 1024×1024 as in ComfyUI's own nodes; proportions are "
        "kept. 16 is 4096×4096.",
    )


def result_size(size: Size | None, height: int, width: int) -> tuple[int, int]:
    """(height, width) that a picture of height × width becomes.

    Raises:
        ValueError: smaller than the picture, or more than 4 times it.
    """
    if size is None or size.get("size") not in WAYS:  # one that is not known never comes here: ComfyUI leaves it out
        raise ValueError(f"size must be one of {', '.join(WAYS)}, with its inputs: choose one of them")
    target = _target(size, height, width)
    picture, result = f"{width}×{height}", f"{target[1]}×{target[0]}"
    if target[0] > MAX_SCALE * height or target[1] > MAX_SCALE * width:
        most = f"{MAX_SCALE * width}×{MAX_SCALE * height}"
        raise ValueError(
            f"{result} is more than {MAX_SCALE} times the picture's {picture}: ask for {most} at most, and use the "
            "node twice for more"
        )
    if target == (height, width) or target[0] < height or target[1] < width:
        raise ValueError(
            f"{result} is not larger than the picture's {picture}: ask for more, or leave this node out (Upscale Image "
            "makes pictures smaller)"
        )
    return target


def _target(size: Size, height: int, width: int) -> tuple[int, int]:
    """(height, width) that is asked for; rounded half up, as `infdit` does."""
    if size["size"] == SIDES:
        new_height, new_width = int(size["height"]), int(size["width"])
        if not new_height and not new_width:
            raise ValueError("width and height of the result are both 0: give at least one of them")
        down, across = new_height / height, new_width / width
        factors = down or across, across or down
    elif size["size"] == LONGEST:
        factors = (size["longest_side"] / max(height, width),) * 2
    elif size["size"] == MEGAPIXELS:
        factors = (math.sqrt(size["megapixels"] * MEGAPIXEL / (height * width)),) * 2
    else:
        factors = (size["scale"],) * 2
    new_height, new_width = (math.floor(s * f + 0.5) for s, f in zip((height, width), factors, strict=True))
    return max(1, new_height), max(1, new_width)

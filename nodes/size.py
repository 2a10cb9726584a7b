"""How large the result becomes: four ways to say it, one input for all nodes that need it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..infdit.sizes import MAX_SCALE, MEGAPIXEL, MOST_SCALE, bounds, growth
from .schema import SLIDER, number

MAX_SIDE = 65536  # pixels
MAX_MEGAPIXELS = MAX_SIDE**2 // MEGAPIXEL
SCALE, SIDES, LONGEST, MEGAPIXELS = "scale by", "width and height", "longest side", "megapixels"
WAYS = {SCALE: ["scale"], SIDES: ["width", "height"], LONGEST: ["longest_side"], MEGAPIXELS: ["megapixels"]}
CHOOSE = (
    f"size must be chosen on the node, as one of {', '.join(WAYS)}: links can give only its numbers; in a prompt for "
    'the API its keys are flat, as "size": "scale by", "size.scale": 4'
)

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
        tooltip=f"How to say how large the result becomes. Each side grows by at most {MOST_SCALE}; what is beyond "
        f"{MAX_SCALE} is done in passes, as one run.",
    )


def _scale_input() -> io.Input:
    return io.Float.Input(
        "scale", display_name=f"scale (up to ×{MOST_SCALE})", default=4.0, min=1.0, max=float(MOST_SCALE), step=0.01,
        display_mode=SLIDER,
        tooltip="How many times larger each side becomes. Models are trained for 4: more is done in passes, and less, "
        "by the bundled model, as 4 that is then made smaller, which takes as long. 1 keeps the size.",
    )


def _side_input(name: str, default: int = 2048) -> io.Input:
    other = "height" if name == "width" else "width"
    return io.Int.Input(
        name, default=default, min=0, max=MAX_SIDE,
        tooltip=f"Pixels of the result. 0: what keeps the picture's proportions at the {other} given. If both are "
        "given the picture is stretched to them.",
    )


def _longest_side_input() -> io.Input:
    return io.Int.Input(
        "longest_side", default=2048, min=1, max=MAX_SIDE,
        tooltip="Pixels of the result's longer side; the other one keeps the proportions.",
    )


def _megapixels_input() -> io.Input:
    return io.Float.Input(
        "megapixels", default=4.0, min=0.01, max=float(MAX_MEGAPIXELS), step=0.01,
        tooltip="Pixels of the result in millions, counted as 1024×1024 as in ComfyUI's own nodes; proportions are "
        "kept. 4 is 2048×2048, 16 is 4096×4096.",
    )


def result_size(size: Size | None, height: int, width: int) -> tuple[int, int]:
    """(height, width) that a picture of height × width becomes; rounded half up, as `infdit` does.

    Raises:
        ValueError: smaller than the picture, or too large; with the number that works, by its widget's name.
    """
    way = size.get("size") if isinstance(size, Mapping) else None
    if not isinstance(size, Mapping) or not isinstance(way, str) or way not in WAYS:
        raise ValueError(CHOOSE)  # ComfyUI leaves out what it does not know: a link, a nested value
    given = {name: number(size.get(name), f"size.{name}", 0, MAX_SIDE) for name in WAYS[way]}
    if way == SIDES:
        given = {name: value for name, value in given.items() if value}
        if not given:
            raise ValueError("width and height of the result are both 0: give at least one of them")
    for name, value in given.items():
        _check(name, value, height, width)
    down, across = _factors(way, given, height, width)
    return math.floor(height * down + 0.5), math.floor(width * across + 0.5)


def _factors(way: str, given: Mapping[str, float], height: int, width: int) -> tuple[float, float]:
    """How many times (higher, wider) the result is."""
    if way == SIDES:
        down, across = given.get("height", 0) / height, given.get("width", 0) / width
        return down or across, across or down
    value = next(iter(given.values()))
    ways = {LONGEST: "longest", MEGAPIXELS: "megapixels"}
    value = growth(ways[way], value, height, width) if way in ways else value
    return value, value


def _check(name: str, value: float, height: int, width: int) -> None:
    """Whether a widget's value is within what the picture can become."""
    least, most = _limits(name, height, width)
    picture = f"{width}×{height}"  # the number to type comes early: the line on the node is short
    if least > most:
        raise ValueError(f"{name} cannot say what a picture of {picture} becomes: choose another way to say its size")
    if value > most:
        raise ValueError(
            f"{name} {value:.10g} is too large: type {most:.10g} at most, {MOST_SCALE} times the picture's {picture}"
        )
    if value < least:
        raise ValueError(
            f"{name} {value:.10g} is too small: type {least:.10g} at least, for the picture has {picture} already; "
            "Upscale Image makes pictures smaller"
        )


def _limits(name: str, height: int, width: int) -> tuple[float, float]:
    """The least and the most that a widget may say, to the digits that it shows."""
    if name == "scale":
        return 1, MOST_SCALE
    if name == "megapixels":
        least, most = bounds("megapixels", height, width, 2)
        return least, min(most, MAX_MEGAPIXELS)
    side = {"width": width, "height": height, "longest_side": max(height, width)}[name]
    return side, min(MOST_SCALE * side, MAX_SIDE)

"""How straight a model draws: edges and thin lines at every angle, whose true course is known in closed form.

    stairs   RMS distance, in pixels, of an edge's half-level crossings from the edge as it was drawn
    beads    standard deviation of the ink across a thin line from row to row, over its mean

The eye sees both before anything else, and PSNR hardly sees them. Pictures are drawn by area at four times the size,
shrunk to a quarter by Pillow's bicubic in 8 bits, as `quality` does, and enlarged again by each contender.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from infdit.config import LR_FACTOR
from infdit.model import InfDiT
from infdit.upscale import upscale

Floats = NDArray[np.float64]
SIDE = 128  # pixels of a drawing
FINE = 8  # drawn points per pixel along each axis
EDGE = 16  # pixels of the border that no score looks at
ANGLES = tuple(math.radians(a) for a in (0, 4, 9, 14, 20, 27, 33, 39, 45))  # of the normal; each in another quadrant
LINE_WIDTH = 6.0  # pixels: a pixel and a half of the low-resolution picture
RADIUS = 40.0  # pixels of the circle
INK, PAPER = 40.0, 220.0
Enlarge = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


def distance(angle: float, size: int = SIDE) -> Floats:
    """Signed distance (n, n), in pixels, of points FINE to a pixel from a line through the middle with this normal."""
    along = (np.arange(size * FINE) + 0.5) / FINE - size / 2
    return along[None, :] * math.cos(angle) + along[:, None] * math.sin(angle)


def radius(size: int = SIDE) -> Floats:
    """Distance (n, n) from the middle, in pixels."""
    along = (np.arange(size * FINE) + 0.5) / FINE - size / 2
    return np.hypot(along[None, :], along[:, None])


def drawn(inside: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """INK where `inside`, PAPER elsewhere, by area: (h, w, 3) uint8 without colour."""
    h, w = (side // FINE for side in inside.shape)
    covered = inside.reshape(h, FINE, w, FINE).mean((1, 3))
    grey = np.rint(PAPER + (INK - PAPER) * covered).astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1)


def crossings(rows: Floats) -> Floats:
    """Where each row (n, w) first crosses the middle between INK and PAPER, in pixels from its left edge; else nan."""
    level = (INK + PAPER) / 2
    above = rows > level
    change = above[:, 1:] != above[:, :-1]
    at = change.argmax(1)
    r = np.arange(len(rows))
    left, right = rows[r, at], rows[r, at + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = at + 0.5 + (level - left) / (right - left)
    return np.where(change.any(1), found, np.nan)


def edge_stairs(picture: NDArray[np.uint8], angle: float) -> float:
    """Of an edge with this normal, 0 to 45 degrees from the horizontal, in pixels."""
    y = picture.astype(np.float64).mean(-1)[EDGE:-EDGE, EDGE:-EDGE]
    rows = np.arange(len(y)) + 0.5 + EDGE - SIDE / 2
    found = crossings(y) + EDGE - SIDE / 2
    off = found * math.cos(angle) + rows * math.sin(angle)
    return float(np.sqrt(np.nanmean((off - np.nanmean(off)) ** 2)))


def circle_stairs(picture: NDArray[np.uint8]) -> float:
    """Of the circle of RADIUS, along rows of its left half that are not nearly tangent, in pixels."""
    y = picture.astype(np.float64).mean(-1)[:, : SIDE // 2]
    rows = np.arange(SIDE) + 0.5 - SIDE / 2
    use = np.abs(rows) < RADIUS * 0.7
    found = np.hypot(crossings(y)[use] - SIDE / 2, rows[use])
    return float(np.sqrt(np.nanmean((found - np.nanmean(found)) ** 2)))


def line_beads(picture: NDArray[np.uint8]) -> float:
    """Of a line of LINE_WIDTH whose normal is 0 to 45 degrees from the horizontal."""
    y = picture.astype(np.float64).mean(-1)
    ink = (PAPER - y[EDGE:-EDGE]).sum(1)
    return float(ink.std() / ink.mean())


def measure(enlarge: Enlarge) -> dict[str, float]:
    """`stairs` and `beads`, means over ANGLES, and `circle`, the stairs of a circle."""

    def result(inside: NDArray[np.bool_], turns: int) -> NDArray[np.uint8]:
        """What becomes of a drawing that is enlarged when turned."""
        return np.rot90(enlarge(shrunk(np.rot90(drawn(inside), turns))), -turns)

    edges = [(turns, angle, distance(angle)) for turns, angle in enumerate(ANGLES)]
    stairs = [edge_stairs(result(d < 0, turns), angle) for turns, angle, d in edges]
    beads = [line_beads(result(np.abs(d) < LINE_WIDTH / 2, turns)) for turns, _, d in edges]
    circle = circle_stairs(result(radius() < RADIUS, 0))
    return {"stairs": float(np.mean(stairs)), "circle": circle, "beads": float(np.mean(beads))}


def shrunk(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """To a quarter, as `quality` does."""
    h, w = (side // LR_FACTOR for side in picture.shape[:2])
    return np.asarray(Image.fromarray(picture).resize((w, h), Image.Resampling.BICUBIC))


def bicubic(low: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pillow's."""
    h, w = (side * LR_FACTOR for side in low.shape[:2])
    return np.asarray(Image.fromarray(low).resize((w, h), Image.Resampling.BICUBIC))


def by_model(model: InfDiT) -> Enlarge:
    """A model at its defaults."""

    def enlarge(low: NDArray[np.uint8]) -> NDArray[np.uint8]:
        result = upscale(model, torch.from_numpy(low.astype(np.float32) / 255)[None], float(LR_FACTOR))
        return (result[0] * 255 + 0.5).to(torch.uint8).numpy()

    return enlarge


def report(contenders: Sequence[tuple[str, Enlarge]]) -> Iterator[str]:
    """A table of `measure`, the drawings themselves first."""
    yield f"{'drawn lines':24}{'stairs px':>10}{'circle px':>10}{'beads %':>10}"
    for name, enlarge in contenders:
        found = measure(enlarge)
        yield f"{name:24}{found['stairs']:>10.3f}{found['circle']:>10.3f}{100 * found['beads']:>10.2f}"

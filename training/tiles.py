"""Pictures to learn from a teacher: small pictures as users have them, and what the teacher makes of them.

Tile i of a seed is a function of the pictures, the seed and i alone: a low-resolution picture of SIDE pixels, and what
it was made from where that exists. A teacher needs no larger original, so a third of the tiles are pieces of pictures
that were made smaller by less than four, or not at all: soft, as generators' pictures are.

The teacher's answers are kept on disk under the digest of what was asked, so each is computed once, by whichever
process or session first comes to it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from infdit.conditioning import conditioning_pictures
from infdit.draft import draft, sweep
from infdit.seams import LUMA

from . import drawings, teachers
from .data import Crops
from .degrade import SCALE, damage

SIDE = 64  # low-resolution pixels
DRAWN, WITH_ORIGINAL = 0.15, 0.53  # shares of tiles; the rest are pieces without an original
EDGE = 4  # low-resolution pixels of a tile's border that no crop has: there the teacher did not see enough
FIRST, EACH_STEP = 512, 1  # tiles that there are before the first step, and that every step adds
GREY = 0.15  # share of tiles without colour, as grey photographs and scans are
_KERNELS = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BOX, Image.Resampling.BILINEAR)
_SHARES = (0.6, 0.2, 0.1, 0.1)


@dataclass(frozen=True)
class Tile:
    """low (SIDE, SIDE, 3) uint8; original (4·SIDE, 4·SIDE, 3) uint8 or None; drawn: by code, so without noise."""

    low: np.ndarray
    original: np.ndarray | None
    drawn: bool
    grey: bool


def tile(pictures: Sequence[np.ndarray], seed: int, index: int, damaged: float = 0.0) -> Tile:
    """Tile `index` of a seed; a share of those with originals is `damaged` on its way down."""
    rng = np.random.default_rng([seed, index])
    kernel = _KERNELS[rng.choice(len(_KERNELS), p=_SHARES)]
    kind, whole = rng.random(), SCALE * SIDE
    grey = bool(rng.random() < GREY)
    if kind < DRAWN:
        original = drawings.draw(whole, rng)
    else:
        picture = pictures[int(rng.integers(len(pictures)))]
        most = min(picture.shape[:2])
        if kind < DRAWN + WITH_ORIGINAL:
            side = whole if rng.random() < 0.6 else int(rng.integers(whole, most + 1))
            original = _resized(_piece(picture, side, rng), whole, Image.Resampling.BICUBIC)
        else:
            factor = 1.0 if rng.random() < 0.3 else math.exp(rng.uniform(0, math.log(SCALE)))
            low = _resized(_piece(picture, round(SIDE * factor), rng), SIDE, kernel)
            return Tile(_grey(low) if grey else low, None, False, grey)
    original = _grey(original) if grey else original
    low = _resized(original, SIDE, kernel)
    if rng.random() < damaged:
        low = damage(original, kernel, rng)
        low = _grey(low) if grey else low
    return Tile(low, original, kind < DRAWN, grey)


def _piece(picture: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    top, left = (int(rng.integers(length - side + 1)) for length in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def _resized(picture: np.ndarray, side: int, kernel: Image.Resampling) -> np.ndarray:
    if picture.shape[0] == side:
        return np.ascontiguousarray(picture)
    return np.asarray(Image.fromarray(picture).resize((side, side), kernel))


def _grey(picture: np.ndarray) -> np.ndarray:
    """R = G = B = luma, (h, w, 3) uint8."""
    return np.repeat(np.rint(picture @ LUMA)[..., None].astype(np.uint8), 3, -1)


class Answers:
    """A teacher's answers, (4·SIDE, 4·SIDE, 3) uint8, kept in a folder.

    Args:
        teacher: file of its weights, see `teachers`.
        folder: where answers are kept; made if it is not there.
    """

    def __init__(self, teacher: Path, folder: Path) -> None:
        self._teacher, self._folder = teacher, folder / teachers.digest(teacher)
        self._folder.mkdir(parents=True, exist_ok=True)
        sweep(self._folder)
        self._network: torch.nn.Module | None = None

    def __call__(self, tile: Tile) -> np.ndarray:
        """The answer to a tile; grey for a grey one."""
        file = self._folder / f"{hashlib.sha256(tile.low.tobytes()).hexdigest()[:24]}.png"
        if not file.exists():
            answer = self._ask(tile.low)
            with draft(file) as part:
                Image.fromarray(_grey(answer) if tile.grey else answer).save(part, "PNG", compress_level=1)
                part.replace(file)
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))

    def _ask(self, low: np.ndarray) -> np.ndarray:
        if self._network is None:
            self._network = teachers.load(self._teacher)
        x = torch.from_numpy(low.copy()).movedim(-1, 0)[None].float() / 255
        with torch.inference_mode():
            y = self._network(x)[0].movedim(0, -1)
        return (y.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


@dataclass(frozen=True)
class Tiles:
    """Crops of tiles, with a teacher's answers as what is to be learned.

    pictures: (h, w, 3) uint8; answers: of the teacher; count: tiles in all, of which the first steps use few, so that
    training need not wait for answers; original: weight of the original beside the answer where there is one, of which
    nobody is asked at 1; damaged: see `tile`; consistent: answers are made to be, when small again, what was asked;
    doubled: share of crops that are to become twice as large and not four times. Of drawn tiles the original alone is
    learned: it has no noise.
    """

    pictures: Sequence[np.ndarray]
    answers: Answers
    count: int
    original: float = 0.0
    damaged: float = 0.0
    consistent: bool = False
    doubled: float = 0.0

    def draw(self, count: int, size: int, seed: tuple[int, int, int]) -> Crops:
        """`count` crops of `size` pixels, turned and mirrored, for (seed, step, part)."""
        rng = np.random.default_rng(list(seed))
        there = min(self.count, FIRST + EACH_STEP * seed[1])
        tiles = [tile(self.pictures, seed[0], int(rng.integers(there)), self.damaged) for _ in range(count)]
        pieces = [self._crop(each, size, rng) for each in tiles]
        return Crops(*(torch.cat(x) for x in zip(*pieces, strict=True)))

    def _crop(self, tile: Tile, size: int, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        """(1, 3, size, size) of what is to be learned and of `up`, (1, 3, size/4, size/4) of `lr`, (1,) of scales."""
        twice = self.doubled > 0 and rng.random() < self.doubled
        goal, low = map(_signed, self._twice(tile, rng) if twice else (self._goal(tile), tile.low))
        turns, mirrored = int(rng.integers(4)), rng.random() < 0.5
        goal, low = (_turned(x, turns, mirrored) for x in (goal, low))
        whole = (goal.shape[-2], goal.shape[-1])
        lr, up = conditioning_pictures(low, whole, whole)
        room = (whole[0] - size) // SCALE
        edge = min(EDGE, room // 2)
        top, left = (int(rng.integers(edge, room - edge + 1)) for _ in range(2))

        def cut(x: torch.Tensor, scale: int) -> torch.Tensor:
            side = size // SCALE * scale
            return x[..., top * scale : top * scale + side, left * scale : left * scale + side]

        return cut(goal, SCALE), cut(up, SCALE), cut(lr, 1), torch.tensor([2 if twice else SCALE])

    def _twice(self, tile: Tile, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """What is to be learned of a picture half as large, and that picture: an original's half, or half an answer."""
        if tile.original is None:
            return _resized(self.answers(tile), 2 * SIDE, Image.Resampling.BICUBIC), tile.low
        return tile.original, _resized(tile.original, 2 * SIDE, _KERNELS[rng.choice(len(_KERNELS), p=_SHARES)])

    def _goal(self, tile: Tile) -> np.ndarray:
        if tile.original is not None and (tile.drawn or self.original == 1):
            return tile.original
        answer = self.answers(tile)
        if self.consistent:
            answer = _consistent(answer, tile.low)
        if tile.original is None or not self.original:
            return answer
        return answer + np.float32(self.original) * (tile.original.astype(np.float32) - answer)


def _consistent(answer: np.ndarray, low: np.ndarray) -> np.ndarray:
    """An answer whose bicubic downscale is `low`, nearly: what is missing is enlarged and added, twice."""
    y, x = _signed(answer), _signed(low)
    size = (y.shape[-2], y.shape[-1])
    for _ in range(2):
        small = F.interpolate(y, x.shape[-2:], mode="bicubic", antialias=True)
        y = y + F.interpolate(x - small, size, mode="bicubic", antialias=True)
    return ((y[0].movedim(0, -1).clamp(-1, 1) + 1) * 127.5).numpy()


def _signed(picture: np.ndarray) -> torch.Tensor:
    """(h, w, 3) in 0..255 → (1, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(picture.astype(np.float32)).movedim(-1, 0)[None] / 127.5 - 1


def _turned(x: torch.Tensor, turns: int, mirrored: bool) -> torch.Tensor:
    x = torch.rot90(x, turns, (-2, -1))
    return x.flip(-1) if mirrored else x

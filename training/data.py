"""Crops of a folder of pictures; which crop comes when is a function of (seed, step, part) and of nothing else.

Files whose names differ only in a trailing _00, _12 or _v0 are crops of one photograph. Photographs are held out
whole, so that validation never sees a neighbour of what was trained on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infdit.conditioning import conditioning_pictures

from .degrade import MARGIN, SCALE, clean, degrade

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
SHRINK = 0.25  # share of crops that are taken from the picture made smaller: sharper, with other things in them


@dataclass(frozen=True)
class Crops:
    """A batch. hr (B, 3, h, w) to be learned, up (B, 3, h, w), lr (B, 3, h/4, w/4) in [-1, 1]; scale (B,) of each."""

    hr: Tensor
    up: Tensor
    lr: Tensor
    scale: Tensor


def photograph(path: Path) -> str:
    """The photograph that a crop was cut from: its name without a trailing _00 or _v0."""
    return re.sub(r"_(v\d|\d\d)$", "", path.stem)


def find(folder: Path) -> list[Path]:
    """Pictures of a folder in the order of their names.

    Raises:
        ValueError: there are none.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no pictures: give a folder of {', '.join(sorted(SUFFIXES))}")
    return paths


def split(paths: Sequence[Path], hold_out: int) -> tuple[list[Path], list[Path]]:
    """(training, validation): `hold_out` photographs whole, those whose names have the smallest SHA-256.

    Raises:
        ValueError: nothing would be left to train on.
    """
    names = sorted({photograph(path) for path in paths}, key=lambda name: hashlib.sha256(name.encode()).digest())
    if not 0 < hold_out < len(names):
        raise ValueError(f"{hold_out} photographs cannot be held out of {len(names)}: hold out 1 to {len(names) - 1}")
    held = set(names[:hold_out])
    return [p for p in paths if photograph(p) not in held], [p for p in paths if photograph(p) in held]


def read(paths: Sequence[Path], least: int) -> list[np.ndarray]:
    """Pictures as (h, w, 3) uint8; those with a side under `least` pixels are left out.

    Raises:
        ValueError: none is large enough.
    """
    pictures: list[np.ndarray] = []
    for path in paths:
        with Image.open(path) as image:
            if min(image.size) >= least:
                pictures.append(np.asarray(image.convert("RGB")))
    if not pictures:
        raise ValueError(f"no picture has {least} pixels on both sides: give larger pictures or train on smaller crops")
    return pictures


class Source(Protocol):
    """Where crops come from: a function of (seed, step, part)."""

    def draw(self, count: int, size: int, seed: tuple[int, int, int]) -> Crops:
        """`count` crops of `size` pixels."""
        ...


@dataclass(frozen=True)
class Photographs:
    """Crops of pictures (h, w, 3) uint8, which are themselves what is to be learned."""

    pictures: Sequence[np.ndarray]

    def draw(self, count: int, size: int, seed: tuple[int, int, int]) -> Crops:
        """`count` random crops of `size` pixels, turned and mirrored, with their low-resolution pictures."""
        rng = np.random.default_rng(list(seed))
        whole = size + 2 * MARGIN
        tiles: list[np.ndarray] = []
        small: list[np.ndarray] = []
        for _ in range(count):
            picture = self.pictures[int(rng.integers(len(self.pictures)))]
            side = whole
            if rng.random() < SHRINK:
                side = int(rng.integers(whole, min(*picture.shape[:2], 2 * whole) + 1))
            top, left = (int(rng.integers(length - side + 1)) for length in picture.shape[:2])
            tile = picture[top : top + side, left : left + side]
            if side > whole:
                tile = np.asarray(Image.fromarray(tile).resize((whole, whole), Image.Resampling.BICUBIC))
            tile = np.rot90(tile, int(rng.integers(4)))
            tiles.append(np.ascontiguousarray(tile[:, ::-1] if rng.random() < 0.5 else tile))
            small.append(degrade(tiles[-1], rng))
        return _crops(tiles, small, SCALE)


def centres(pictures: Sequence[np.ndarray], size: int, scale: int = SCALE) -> Crops:
    """The middle of each picture, `size` pixels, with a clean picture of a `scale`-th of its sides."""
    whole = size + 2 * MARGIN
    tiles: list[np.ndarray] = []
    for picture in pictures:
        top, left = ((length - whole) // 2 for length in picture.shape[:2])
        tiles.append(np.ascontiguousarray(picture[top : top + whole, left : left + whole]))
    return _crops(tiles, [clean(tile, scale=scale) for tile in tiles], scale)


def _crops(tiles: list[np.ndarray], small: list[np.ndarray], scale: int) -> Crops:
    """What the network sees, made by the library's resampler with the margin in place, which is then cut off."""
    hr, low = (torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (tiles, small))
    size = (hr.shape[-2], hr.shape[-1])
    lr, up = conditioning_pictures(low, size, size)

    def inner(x: Tensor, margin: int) -> Tensor:
        return x[..., margin:-margin, margin:-margin].contiguous()

    return Crops(inner(hr, MARGIN), inner(up, MARGIN), inner(lr, MARGIN // SCALE), torch.full((len(hr),), scale))

"""Low-resolution pictures as users have them: mostly clean downscales, some blurred, noisy or compressed.

An artist's picture comes from a generator or out of an editor's downscale, seldom out of a camera: so four in five are
clean. All arithmetic is Pillow's, 8 bits in and out, which is what files hold.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

SCALE = 4
MARGIN = 4 * SCALE  # high-resolution pixels around a crop, so that its border is resampled like its middle
DAMAGED = 0.2  # share of pictures that are not clean
_FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.BOX, Image.Resampling.LANCZOS)
_SHARES = (0.7, 0.2, 0.1)


def clean(
    tile: np.ndarray, resampling: Image.Resampling = Image.Resampling.BICUBIC, scale: int = SCALE
) -> np.ndarray:
    """(h, w, 3) uint8 → (h/scale, w/scale, 3) uint8 by an antialiased filter."""
    h, w = tile.shape[:2]
    return np.asarray(Image.fromarray(tile).resize((w // scale, h // scale), resampling))


def degrade(tile: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(h, w, 3) uint8 → (h/4, w/4, 3) uint8, by a random filter and sometimes with random mild damage."""
    resampling = _FILTERS[rng.choice(len(_FILTERS), p=_SHARES)]
    return damage(tile, resampling, rng) if rng.random() < DAMAGED else clean(tile, resampling)


def damage(tile: np.ndarray, resampling: Image.Resampling, rng: np.random.Generator) -> np.ndarray:
    """(h, w, 3) uint8 → (h/4, w/4, 3) uint8, with some of mild blur, noise, JPEG or WebP."""
    if rng.random() < 0.5:
        blur = ImageFilter.GaussianBlur(SCALE * rng.uniform(0.1, 0.5))
        tile = np.asarray(Image.fromarray(tile).filter(blur))
    small = clean(tile, resampling)
    if rng.random() < 0.4:
        noisy = small + rng.normal(0, rng.uniform(0.5, 4), small.shape)
        small = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    if rng.random() < 0.7:
        file = io.BytesIO()
        kind = "JPEG" if rng.random() < 0.7 else "WEBP"
        Image.fromarray(small).save(file, kind, quality=int(rng.integers(65, 97)))
        small = np.asarray(Image.open(file).convert("RGB"))
    return small

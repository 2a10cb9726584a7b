"""A picture in memory, and the error of one that is on no disk or cannot be."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger(__package__)
MOST_DPI = 1e5  # beyond, a file only claims it


class PictureError(ValueError):
    """A picture that cannot be read or written: which file, what is wrong, the way out, in one sentence."""


@dataclass(frozen=True)
class Picture:
    """Pixels and what a file of them needs to look the same.

    Args:
        pixels: (h, w, 3) or (h, w, 4), float32, 0..1, as the file has them (not linear light); alpha straight.
        icc_profile: the ICC profile of these pixels, of a grey space where `grey`, else RGB; None means sRGB.
        grey: whether the picture has no colour and is written as L or LA (the mean of the three channels).
        note: written into a PNG, see `read_note`; ASCII.
        bits: of a channel, which are written where the format can hold so many: 8, 16, or 32 for floats.
        exif, xmp, dpi: what else the file says of the picture, upright; empty or None where it says nothing.
    """

    pixels: torch.Tensor
    icc_profile: bytes | None
    grey: bool
    note: str = ""
    bits: int = 8
    exif: bytes = b""
    xmp: bytes = b""
    dpi: tuple[float, float] | None = None


@contextlib.contextmanager
def damage_explained(path: Path, problem: str, remedy: str) -> Iterator[None]:
    """Whatever Pillow raises on a damaged file or a full disk, as a PictureError of one sentence."""
    try:
        yield
    except PictureError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(reason.split()).rstrip(".") or type(error).__name__
        raise PictureError(f"{path}: {problem} ({reason}); {remedy}.") from error

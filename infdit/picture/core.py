"""A picture, and the one error that everything about picture files raises."""

from __future__ import annotations

import contextlib
import logging
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

log = logging.getLogger(__package__)

# what a plugin can raise on a damaged file, and an encoder on a full disk
DAMAGE = (
    Image.DecompressionBombError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


class PictureError(ValueError):
    """A picture that cannot be read or written: which file, what is wrong, the way out, in one sentence."""


@dataclass(frozen=True)
class Picture:
    """Pixels and what a file of them needs to look the same.

    Args:
        pixels: (h, w, 3) or (h, w, 4), float32, 0..1, as the file has them (not linear light); alpha straight.
        icc_profile: the ICC profile of these pixels, of a grey space where `grey`, else RGB; None means sRGB.
        grey: whether the picture has no colour and is written as L or LA (the mean of the three channels).
    """

    pixels: torch.Tensor
    icc_profile: bytes | None
    grey: bool


@contextlib.contextmanager
def damage_explained(path: Path, problem: str, remedy: str) -> Iterator[None]:
    """Whatever Pillow raises on a damaged file, as a PictureError of one sentence."""
    try:
        yield
    except PictureError:
        raise
    except DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(reason.split()).rstrip(".") or type(error).__name__
        raise PictureError(f"{path}: {problem} ({reason}); {remedy}.") from error



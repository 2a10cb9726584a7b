"""ICC profiles: whether one fits, what a picture is in sRGB, and the profile that says so."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import cast

from PIL import Image, ImageCms

from .picture import log

_BLACK_POINT = cast("ImageCms.Flags", 0x2000)  # Flags.BLACKPOINTCOMPENSATION, a name Pillow 10.0 does not have
_BAD_PROFILE = (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError)  # ImportError: no LittleCMS


def fitting_profile(path: Path, icc: bytes | None, grey: bool) -> bytes | None:
    """The profile if it is one for such a picture, else None, with a warning."""
    if not icc:
        return None
    try:
        ImageCms.ImageCmsProfile(io.BytesIO(icc))
        fits = icc[16:20] == (b"GRAY" if grey else b"RGB ")
    except _BAD_PROFILE:
        fits = False
    if not fits:
        kind = "grey" if grey else "RGB"
        log.warning("%s: the ICC profile is left out: it cannot be read or is not for %s pictures", path, kind)
    return icc if fits else None


def to_srgb(icc: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """A function from pictures of this mode to RGB in sRGB, or RGBA from LA or RGBA; None if the profile has none."""
    colours = mode.removesuffix("A")
    try:
        # relative colorimetric with the black point moved: what photographers' tools do when they convert
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(icc)),
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            colours,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            _BLACK_POINT,
        )
    except _BAD_PROFILE:
        return None

    def convert(image: Image.Image) -> Image.Image:
        converted = cast("Image.Image", ImageCms.applyTransform(image.convert(colours), transform))
        if mode != colours:
            converted.putalpha(image.getchannel("A"))
        return converted

    return convert


def srgb_profile() -> bytes:
    """A profile that says sRGB, always the same bytes."""
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    icc[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)  # the time of making, else no two runs write the same
    return bytes(icc)

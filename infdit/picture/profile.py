"""ICC profiles: whether one fits, what a picture is in sRGB, and the profile that says so."""

from __future__ import annotations

import io
import struct
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


def to_srgb(image: Image.Image, icc: bytes) -> Image.Image | None:
    """The picture as RGB in sRGB, or RGBA from LA or RGBA; None if the profile cannot do that."""
    # Relative colorimetric with the black point moved: what photographers' tools do when they convert.
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colour = image if alpha is None else image.convert(image.mode[:-1])
    try:
        converted = ImageCms.profileToProfile(
            colour,
            ImageCms.ImageCmsProfile(io.BytesIO(icc)),
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=_BLACK_POINT,
        )
    except _BAD_PROFILE:
        return None
    if converted is not None and alpha is not None:
        converted.putalpha(alpha)
    return converted


def srgb_profile() -> bytes:
    """A profile that says sRGB, always the same bytes."""
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    icc[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)  # the time of making, else no two runs write the same
    return bytes(icc)

"""ICC profiles: which one a file needs, and the way to sRGB where it can have none."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import cast

from PIL import Image, ImageCms
from PIL.ImageFile import ImageFile

from .core import log

_NO_LCMS = (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError)

_COLOUR_SPACES = {True: "GRAY", False: "RGB "}  # of an ICC profile, by Picture.grey
_BLACK_POINT = cast("ImageCms.Flags", 0x2000)  # Flags.BLACKPOINTCOMPENSATION, a name Pillow 10.0 does not have



def embedded_profile(image: ImageFile) -> bytes | None:
    icc = image.info.get("icc_profile")
    return icc if isinstance(icc, bytes) and icc else None


def colour_space(icc: bytes) -> str | None:
    """"RGB ", "GRAY", "CMYK", …, or None if the profile cannot be read."""
    try:
        ImageCms.ImageCmsProfile(io.BytesIO(icc))
    except _NO_LCMS:
        return None
    return icc[16:20].decode("latin-1")


def fitting_profile(path: Path, icc: bytes | None, grey: bool) -> bytes | None:
    if icc is None or colour_space(icc) == _COLOUR_SPACES[grey]:
        return icc
    kind = "grey" if grey else "RGB"
    log.warning("%s: the ICC profile is left out: it cannot be read or is not for %s pictures", path, kind)
    return None


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
    except _NO_LCMS:
        return None
    if converted is not None and alpha is not None:
        converted.putalpha(alpha)
    return converted


def srgb_profile() -> bytes:
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    icc[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)  # the time of making, else no two runs write the same
    return bytes(icc)



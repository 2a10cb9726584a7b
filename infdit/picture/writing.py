"""Picture files out: whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..draft import draft, sweep
from .notes import KEYWORD, LARGEST
from .reading import Picture, PictureError, damage_explained, fitting_profile, log, srgb_profile, to_srgb

_BAND = 256  # rows rounded at a time, so that writing needs no second float copy of a large picture


class TargetError(PictureError):
    """A place that cannot be written, for this picture or another; `reason` says why."""

    def __init__(self, path: Path, reason: str, remedy: str = "choose another folder or make room") -> None:
        super().__init__(f"{path}: cannot be written ({reason}); {remedy}.")
        self.reason = reason


@dataclass(frozen=True)
class _Writer:
    """What a format can hold, and how we write it."""

    name: str
    max_side: int = 2**31 - 1
    max_bytes: int | None = None  # of uncompressed pixels
    alpha: bool = True
    grey_profile: bool = True
    max_profile: int = 2**31 - 1  # bytes
    options: dict[str, object] = field(default_factory=dict)


_PNG, _TIFF = (
    _Writer("PNG", max_profile=LARGEST - 1),
    _Writer("TIFF", max_bytes=2**32 - 2**25),
)  # less: room for tags and a profile
_BMP = _Writer("BMP", max_bytes=2**32 - 2**16, alpha=False, grey_profile=False, max_profile=0)
# 65500, not the 65535 of the file format: the limit of libjpeg
_JPEG = _Writer("JPEG", max_side=65500, alpha=False, max_profile=255 * 65519, options={"quality": 95, "subsampling": 0})
# lossless: WebP's lossy mode halves the resolution of colour; exact: keeps colours under alpha 0
_WEBP = _Writer("WEBP", max_side=16383, grey_profile=False, options={"lossless": True, "exact": True})
_WRITERS = {".png": _PNG, ".jpg": _JPEG, ".jpeg": _JPEG, ".webp": _WEBP, ".tif": _TIFF, ".tiff": _TIFF, ".bmp": _BMP}


def write_picture(path: Path, picture: Picture) -> None:
    """Writes a picture in the format of the suffix: PNG, JPEG (quality 95, 4:4:4), WebP (lossless), TIFF or BMP.

    Values are clipped to 0..1 and rounded half up to 8 bits. The file appears whole or not at all.

    Raises:
        PictureError: for a suffix or size the format cannot have, values that are not numbers, a failing disk.
    """
    path = Path(path)
    check_target(path, picture)
    sweep(path.parent)
    with place_for(path) as write:
        write(picture)


@contextlib.contextmanager
def place_for(path: Path) -> Iterator[Callable[[Picture], None]]:
    """A place for a picture, found before the picture is made: a function that writes it, whole or not at all.

    Raises:
        TargetError: in the folder nothing can be written, now or later.
        PictureError (when written): as `write_picture`.
    """
    with contextlib.ExitStack() as held:
        with target_explained(path):
            part = held.enter_context(draft(path))
        yield lambda picture: _write(part, path, picture)


def _write(part: Path, path: Path, picture: Picture) -> None:
    writer = _WRITERS[path.suffix.lower()]
    image, icc = _with_profile(path, Image.fromarray(_bytes(path, picture, writer)), picture, writer)
    with damage_explained(path, "cannot be written", "try another format"), target_explained(path):
        image.save(part, format=writer.name, icc_profile=icc or b"", **_note(picture, writer), **writer.options)
        part.replace(path)


def _note(picture: Picture, writer: _Writer) -> dict[str, PngInfo]:
    if writer is not _PNG or not picture.note:
        return {}
    info = PngInfo()
    info.add_text(KEYWORD, picture.note)
    return {"pnginfo": info}


@contextlib.contextmanager
def target_explained(path: Path) -> Iterator[None]:
    """Whatever the system raises while something is written, as a TargetError."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # Pillow's own, not the system's
            raise
        raise TargetError(path, error.strerror or str(error)) from error


def check_target(path: Path, picture: Picture) -> None:
    """Refuse what `write_picture` could not write, before the picture is made: only the shape of its pixels counts.

    Raises:
        PictureError: for a suffix, a size or a folder that cannot be.
    """
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        problem = f"has the ending {path.suffix}, which" if path.suffix else "has no ending, which"
        raise PictureError(f"{path}: the name {problem} says no format; use one of {' '.join(_WRITERS)}.")
    pixels = picture.pixels
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or 0 in pixels.shape or not pixels.is_floating_point():
        raise PictureError(
            f"{path}: a picture is floats (height, width, 3 or 4), at least one pixel, "
            f"not {pixels.dtype} {tuple(pixels.shape)}; reshape it."
        )
    height, width = pixels.shape[:2]
    if max(height, width) > writer.max_side:
        raise PictureError(
            f"{path}: {width}×{height} is too large for {writer.name}, whose sides are at most {writer.max_side}; "
            "save as .png."
        )
    size = height * width * ((1 if picture.grey else 3) + (pixels.shape[2] == 4 and writer.alpha))
    if writer.max_bytes and size > writer.max_bytes:
        raise PictureError(
            f"{path}: {width}×{height} is too large for {writer.name}, which holds at most 4 GiB; save as .png."
        )
    if not path.parent.is_dir():
        raise PictureError(f"{path}: its folder is not there; make it first.")
    if path.is_dir():
        raise PictureError(f"{path}: this is a folder; choose another name.")


def _bytes(path: Path, picture: Picture, writer: _Writer) -> NDArray[np.uint8]:
    """(h, w), (h, w, 2), (h, w, 3) or (h, w, 4): L, LA, RGB or RGBA."""
    bands, covered = [], True
    for band in picture.pixels.detach().split(_BAND):
        band = band.to("cpu", torch.float32)
        if not band.isfinite().all():
            raise PictureError(f"{path}: the picture has values that are not finite numbers; try another dtype.")
        band = band.clamp(0, 1)
        colour, alpha = band[..., :3], band[..., 3:]
        if alpha.shape[2] and not writer.alpha:
            covered = covered and bool((alpha == 1).all())
            colour, alpha = colour * alpha + (1 - alpha), alpha[..., :0]
        if picture.grey:
            colour = colour.mean(2, keepdim=True)
        bands.append((torch.cat([colour, alpha], 2) * 255 + 0.5).floor().to(torch.uint8).numpy())
    if not covered:
        log.warning("%s: %s has no transparency; the picture is laid over white", path, writer.name)
    values = np.concatenate(bands)
    return values[..., 0] if values.shape[2] == 1 else values


def _with_profile(
    path: Path, image: Image.Image, picture: Picture, writer: _Writer
) -> tuple[Image.Image, bytes | None]:
    """The image and the profile to write with it, converted to sRGB where the format has no place for the profile."""
    icc = fitting_profile(path, picture.icc_profile, picture.grey)
    if icc is None or (len(icc) <= writer.max_profile and (writer.grey_profile or not picture.grey)):
        return image, icc
    if len(icc) > writer.max_profile > 0:
        log.warning("%s: the ICC profile is too large for %s, and the colours become sRGB", path, writer.name)
    converted = to_srgb(image, icc)
    if converted is None:
        log.warning("%s: %s cannot hold the ICC profile, and it is left out", path, writer.name)
        return image, None
    if writer.max_profile:
        return converted, srgb_profile()
    return (converted.convert("L") if picture.grey else converted), None

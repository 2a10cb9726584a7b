"""Picture files out: whole or not at all."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..draft import draft, put, sweep
from .notes import KEYWORD, LARGEST
from .picture import Picture, PictureError, damage_explained, log
from .png import write_png
from .profile import fitting_profile, srgb_profile, to_srgb
from .tiff import CLASSIC, EXIF_PARTS, has_bigtiff, write_tiff

_BAND = 64  # rows rounded at a time, so that writing needs no second copy of a large picture
DEPTHS = (8, 16, 32)  # bits of a channel; 32 are floats
_MOST_EXIF = 65533 - 6  # bytes, in JPEG


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
    max_bytes: float = math.inf  # of uncompressed pixels
    bits: tuple[int, ...] = (8,)
    alpha: bool = True
    grey_profile: bool = True
    max_profile: int = 2**31 - 1  # bytes
    options: dict[str, object] = field(default_factory=dict)


_PNG = _Writer("PNG", bits=(8, 16), max_profile=LARGEST - 1)
_TIFF = _Writer("TIFF", bits=DEPTHS)
_BMP = _Writer("BMP", max_bytes=2**32 - 2**16, alpha=False, grey_profile=False, max_profile=0)
# 65500, not the 65535 of the file format: the limit of libjpeg
_JPEG = _Writer("JPEG", max_side=65500, alpha=False, max_profile=255 * 65519, options={"quality": 95, "subsampling": 0})
# lossless: WebP's lossy mode halves the resolution of colour; exact: keeps colours under alpha 0
_WEBP = _Writer("WEBP", max_side=16383, grey_profile=False, options={"lossless": True, "exact": True})
_WRITERS = {".png": _PNG, ".jpg": _JPEG, ".jpeg": _JPEG, ".webp": _WEBP, ".tif": _TIFF, ".tiff": _TIFF, ".bmp": _BMP}


def write_picture(path: Path, picture: Picture) -> None:
    """Writes a picture in the format of the suffix: PNG, JPEG (quality 95, 4:4:4), WebP (lossless), TIFF or BMP.

    Values are clipped to 0..1 and rounded half up to the picture's bits, or to 8 where the format has no more; TIFF
    holds floats too. The file appears whole or not at all.

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
    with damage_explained(path, "cannot be written", "try another format"), target_explained(path):
        part.parent.mkdir(exist_ok=True)  # on a disk without locks another process may have swept it away
        with part.open("w+b") as file:  # a full disk may be told only when it is closed
            _encode(path, file, picture, writer)
        put(part, path)


def _encode(path: Path, file: IO[bytes], picture: Picture, writer: _Writer) -> None:
    """Write the bytes of a file: PNG and TIFF by bands, the rest by Pillow."""
    icc = fitting_profile(path, picture.icc_profile, picture.grey)
    held = icc is None or (len(icc) <= writer.max_profile and (writer.grey_profile or not picture.grey))
    bits = depth_of(path, picture.bits) if held else 8
    (height, width), channels = picture.pixels.shape[:2], _channels(picture, writer)
    bands = _bands(path, picture, writer, bits)
    if not held:
        channels, bands, icc = _in_srgb(path, channels, bands, icc or b"", writer)
    if writer is _PNG:
        write_png(file, (height, width), channels, bits, bands, _png_chunks(picture, icc))
    elif writer is _TIFF:
        dtype = np.dtype({8: "u1", 16: "u2", 32: "f4"}[bits])
        write_tiff(file, (height, width, channels), dtype, bands, _tiff_tags(picture, icc), picture.dpi)
    else:
        _image(bands).save(file, format=writer.name, icc_profile=icc or b"", **_about(path, picture), **writer.options)


def depth_of(path: Path, bits: int) -> int:
    """Bits of a channel that a file of this name gets: as many as given, or the most that its format has."""
    return max(min(bits, one) for one in _WRITERS[path.suffix.lower()].bits)


def _channels(picture: Picture, writer: _Writer) -> int:
    return (1 if picture.grey else 3) + (picture.pixels.shape[2] == 4 and writer.alpha)


def _png_chunks(picture: Picture, icc: bytes | None) -> Iterator[tuple[bytes, bytes]]:
    if icc:
        yield b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)
    if picture.dpi:
        yield b"pHYs", b"".join(round(side / 0.0254).to_bytes(4, "big") for side in picture.dpi) + b"\1"
    if picture.exif:
        yield b"eXIf", picture.exif.removeprefix(b"Exif\0\0")
    if picture.xmp:
        yield b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + picture.xmp
    if picture.note:
        yield b"tEXt", f"{KEYWORD}\0{picture.note}".encode("latin-1")


def _tiff_tags(picture: Picture, icc: bytes | None) -> dict[int, Any]:
    """By number: what `Picture.exif` says, a dict where it is a directory of its own, the profile and XMP."""
    exif = Image.Exif()
    exif.load(picture.exif)
    tags = {n: exif.get_ifd(n) if n in EXIF_PARTS else value for n, value in exif.items()}
    tags = {n: value.encode("latin-1") if isinstance(value, str) else value for n, value in tags.items()}
    return tags | {n: value for n, value in ((34675, icc), (700, picture.xmp)) if value}


def _about(path: Path, picture: Picture) -> dict[str, Any]:
    """What Pillow is told of a picture beside its pixels."""
    about: dict[str, Any] = {"exif": picture.exif, "xmp": picture.xmp, "dpi": picture.dpi}
    for name, most in (("exif", _MOST_EXIF), ("xmp", 65504)):
        if path.suffix.lower() in (".jpg", ".jpeg") and len(about[name]) > most:
            log.warning("%s: its %s is too large for JPEG and is left out", path, name.upper())
            del about[name]
    return {name: value for name, value in about.items() if value}


@contextlib.contextmanager
def target_explained(path: Path) -> Iterator[None]:
    """Whatever the system raises while something is written, as a TargetError."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # Pillow's own, not the system's
            raise
        reason = error.strerror or str(error)
        if path.parent.exists():
            raise TargetError(path, reason) from error
        raise TargetError(path, reason, "make its folder first, or choose another") from error


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
    size = height * width * _channels(picture, writer) * depth_of(path, picture.bits) // 8
    if size > writer.max_bytes:
        raise PictureError(
            f"{path}: {width}×{height} is too large for {writer.name}, which holds at most 4 GiB; save as .png."
        )
    if writer is _TIFF and size > CLASSIC and not has_bigtiff():
        raise PictureError(f"{path}: TIFF above 4 GiB takes Pillow 11.2 or later; update it, or save as .png.")
    if not path.parent.is_dir():
        raise PictureError(f"{path}: its folder is not there; make it first.")
    if path.is_dir():
        raise PictureError(f"{path}: this is a folder; choose another name.")


def _bands(path: Path, picture: Picture, writer: _Writer, bits: int) -> Iterator[NDArray[Any]]:
    """(n, w, 1 to 4) at a time, of uint8, uint16 or float32: L, LA, RGB or RGBA."""
    covered, white = True, 2**bits - 1
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
        band = torch.cat([colour, alpha], 2).numpy()
        yield band if bits == 32 else (band * white + 0.5).astype(f"u{bits // 8}")
    if not covered:
        log.warning("%s: %s has no transparency; the picture is laid over white", path, writer.name)


def _image(bands: Iterator[NDArray[np.uint8]]) -> Image.Image:
    values = np.concatenate(list(bands))
    return Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)


def _in_srgb(
    path: Path, channels: int, bands: Iterator[NDArray[np.uint8]], icc: bytes, writer: _Writer
) -> tuple[int, Iterator[NDArray[np.uint8]], bytes | None]:
    """Bands converted to sRGB, for the format has no place for their profile; their channels, what profile they get."""
    if len(icc) > writer.max_profile > 0:
        log.warning("%s: the ICC profile is too large for %s, and the colours become sRGB", path, writer.name)
    convert = to_srgb(icc, ("L", "LA", "RGB", "RGBA")[channels - 1])
    if convert is None:
        log.warning("%s: %s cannot hold the ICC profile, and it is left out", path, writer.name)
        return channels, bands, None
    grey = channels < 3 and not writer.max_profile
    images = (convert(_image(iter([band]))) for band in bands)
    arrays = (np.asarray(image.convert("L") if grey else image) for image in images)
    shaped = (array.reshape(*array.shape[:2], -1) for array in arrays)
    return (1 if grey else channels + 2 * (channels < 3)), shaped, srgb_profile() if writer.max_profile else None

"""TIFF by rows, of any depth and size; and reading, by tifffile, what Pillow cannot: floats and deep planes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffTags
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from .picture import PictureError

if TYPE_CHECKING:
    from types import ModuleType

CLASSIC = 2**32 - 2**25  # bytes of pixels in a file of 32-bit offsets, less room for the rest
_BEYOND = 1e-3  # of 0..1: what rounding may leave there
_RGB, _GREY = 2, 1  # photometric interpretations
_ICC, _XMP, _ORIENTATION, _STRIP, _SIZE = 34675, 700, 274, 273, 279
_SMALL, _BIG = b"II*\0\x08\0\0\0", b"II+\0\x08\0\0\0\x10" + bytes(7)  # how files begin
_DEFLATED = (8, 32946)  # compressions
EXIF_PARTS = (0x8769, 0x8825)  # directories of their own: EXIF, and where it was taken
Said = tuple[object, tuple[float, float] | None]  # XMP and dpi


def _tifffile(path: Path, why: str) -> ModuleType:
    try:
        import tifffile
    except ImportError:
        raise PictureError(
            f"{path}: {why} takes the package tifffile, which is not installed; pip install tifffile, or use .png."
        ) from None
    return tifffile


def read_tiff(path: Path, file: BinaryIO) -> tuple[NDArray[np.float32], int, bool, bytes | None, Said]:
    """(h, w, 3 or 4) in 0..1, upright; bits, whether it is grey, its ICC profile, XMP and dpi.

    Raises:
        PictureError: of a kind or with values that cannot be shown faithfully. Whatever tifffile raises on damage.
    """
    tifffile = _tifffile(path, "TIFF of this kind (floats, deep colours in planes)")
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        dtype, samples = np.dtype(page.dtype), int(page.samplesperpixel)
        height, width, most = int(page.imagelength), int(page.imagewidth), 2 * (Image.MAX_IMAGE_PIXELS or 0)
        if most and height * width > most:
            raise PictureError(f"{path}: it has more than {most:,} pixels, the most that are read; cut it into parts.")
        if dtype.str[1:] not in ("f2", "f4", "f8", "u2") or page.photometric not in (_GREY, _RGB) or samples > 4:
            kind = getattr(page.photometric, "name", page.photometric)
            raise PictureError(f"{path}: TIFF of {samples} × {dtype} {kind} cannot be read; save it as .png.")
        _check_unpacked(path, file, page)
        values = page.asarray()
        values = values.reshape(samples, height, width).transpose(1, 2, 0) if page.planarconfig == 2 else values
        values = values.reshape(height, width, samples).astype(np.float32)
        tags = {number: page.tags[number].value for number in (_ICC, _XMP, _ORIENTATION) if number in page.tags}
        alpha, unit = list(page.extrasamples), page.tags[296].value if 296 in page.tags else 2
        dpi = page.get_resolution("inch") if 282 in page.tags and unit != 1 else None  # 1: no unit, a shape only
    if dtype.kind == "u":
        values /= 65535
    if not np.isfinite(values).all():
        raise PictureError(f"{path}: it has values that are not finite numbers (NaN or inf); make it again without.")
    low, high = float(values.min()), float(values.max())
    if low < -_BEYOND or high > 1 + _BEYOND:
        raise PictureError(
            f"{path}: its values go from {low:.3g} to {high:.3g}, and only 0 to 1, black to white, are kept; "
            "scale them to that."
        )
    pixels = _upright(_with_alpha(values.clip(0, 1), alpha), tags.get(_ORIENTATION, 1))
    bits = 8 * dtype.itemsize if dtype.kind == "u" else 32
    return pixels, bits, samples < 3, tags.get(_ICC), (tags.get(_XMP, b""), dpi)


def exif_of(file: BinaryIO) -> Image.Exif:
    """What a TIFF says of its picture, of which nothing is read yet."""
    file.seek(0)
    head = file.read(16)
    big = b"+" in head[:4]
    start = ImageFileDirectory_v2(head if big else head[:8])
    exif = Image.Exif()
    exif.bigtiff, exif.endian = big, "<" if start.prefix == b"II" else ">"
    exif.load_from_fp(file, start.next)
    return exif


def _check_unpacked(path: Path, file: BinaryIO, page: Any) -> None:  # noqa: ANN401 - tifffile's
    """Refuse strips that unpack to more than their pixels take, which tifffile by itself would have in memory."""
    if page.compression not in (1, *_DEFLATED) and find_spec("imagecodecs") is None:  # which heeds the size
        problem = "its compression takes the package imagecodecs, which is not installed"
        raise PictureError(f"{path}: {problem}; pip install imagecodecs, or save as 16-bit .png.")
    most = 2 * math.prod(page.chunks) * page.dtype.itemsize  # twice: some programs fill up
    for at, size in zip(page.dataoffsets, page.databytecounts, strict=True) if page.compression in _DEFLATED else ():
        file.seek(at)
        if len(zlib.decompressobj().decompress(file.read(size), most + 1)) > most:
            raise PictureError(f"{path}: parts of it unpack to more than its pixels take; save it again as .png.")


def _with_alpha(values: NDArray[np.float32], extra: list[int]) -> NDArray[np.float32]:
    """(h, w, 1 to 4) → (h, w, 3 or 4), straight alpha; further samples that are none are left out."""
    channels = values.shape[2]
    colour = values[..., :3] if channels > 2 else values[..., [0, 0, 0]]
    if channels in (1, 3) or not extra or extra[0] not in (1, 2):
        return np.ascontiguousarray(colour)
    alpha = values[..., -1:]
    if extra[0] == 1:  # multiplied in
        colour = np.divide(colour, alpha, out=np.zeros_like(colour), where=alpha > 0).clip(0, 1)
    return np.concatenate((colour, alpha), 2)


def _upright(pixels: NDArray[np.float32], orientation: int) -> NDArray[np.float32]:
    """As TIFF's tag says: 5 to 8 have rows for columns, and then some sides are exchanged."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    down, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels[:: -1 if down else 1, :: -1 if right else 1])


def has_bigtiff() -> bool:
    """Whether this Pillow writes it: 11.2 and later do."""
    return len(ImageFileDirectory_v2(_BIG).tobytes()) == 16  # two counts of 8 bytes


def write_tiff(
    file: IO[bytes], shape: tuple[int, int, int], dtype: np.dtype, bands: Iterable[NDArray[Any]],
    tags: Mapping[int, Any], dpi: tuple[float, float] | None,
) -> None:
    """Write (h, w, 1 to 4) that come in bands of rows, of uint8, uint16 or float32, as BigTIFF above 4 GiB.

    tags: of what is said beside the picture, by number; a dict is a directory of its own, as EXIF's are.
    """
    (height, width, samples), size = shape, math.prod(shape) * dtype.itemsize
    big = size > CLASSIC
    said = ImageFileDirectory_v2(_BIG if big else _SMALL)
    said.tagtype.update({_ICC: TiffTags.UNDEFINED} | dict.fromkeys((_STRIP, _SIZE), 16 if big else TiffTags.LONG))
    said.update(tags)
    said.update({
        256: width, 257: height, 258: (8 * dtype.itemsize,) * samples, 259: 1, 262: _RGB if samples > 2 else _GREY,
        277: samples, 278: height, _SIZE: size,
        _STRIP: 0,  # all rows in one, behind what is said: Pillow adds where that ends
    })  # fmt: skip
    if samples in (2, 4):
        said[338] = 2  # alpha that is not multiplied in
    if dtype.kind == "f":
        said[339] = (3,) * samples
    if dpi:
        said.update({282: dpi[0], 283: dpi[1], 296: 2})
    said.save(file)
    for band in bands:
        file.write(np.ascontiguousarray(band, dtype.newbyteorder("<")).data)

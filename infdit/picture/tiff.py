"""TIFF that Pillow can neither read nor write, by tifffile: floats, deep planes, 16 bits out, files above 4 GiB."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .picture import MOST_DPI, PictureError

if TYPE_CHECKING:
    from types import ModuleType

_LARGEST = 2**32 - 2**25  # bytes of pixels in a file of 32-bit offsets, less room for the rest
_BEYOND = 1e-3  # of 0..1: what rounding may leave there
_RGB, _GREY = 2, 1  # photometric interpretations
_ICC, _XMP, _ORIENTATION = 34675, 700, 274
Said = tuple[bytes, tuple[float, float] | None]  # XMP and dpi


def has_tifffile() -> bool:
    """Whether the package is installed."""
    try:
        import tifffile  # noqa: F401
    except ImportError:
        return False
    return True


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
        try:
            values = page.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            problem = "its compression takes the package imagecodecs, which is not installed"
            raise PictureError(f"{path}: {problem}; pip install imagecodecs, or save as 16-bit .png.") from None
        values = values.reshape(samples, height, width).transpose(1, 2, 0) if page.planarconfig == 2 else values
        values = values.reshape(height, width, samples).astype(np.float32)
        tags = {number: page.tags[number].value for number in (_ICC, _XMP, _ORIENTATION) if number in page.tags}
        alpha, unit = list(page.extrasamples), page.tags[296].value if 296 in page.tags else 2
        dpi = page.get_resolution("inch") if 282 in page.tags and unit != 1 else None  # 1: no unit, a shape only
        dpi = dpi if dpi and all(0 < side < MOST_DPI for side in dpi) else None
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
    return pixels, 8 * dtype.itemsize if dtype.kind == "u" else 32, samples < 3, tags.get(_ICC), (_bytes(tags), dpi)


def _bytes(tags: dict[int, Any]) -> bytes:
    xmp = tags.get(_XMP, b"")
    return xmp if isinstance(xmp, bytes) and len(xmp) < 2**20 else b""


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


def write_tiff(
    path: Path, file: IO[bytes], shape: tuple[int, int, int], dtype: np.dtype, bands: Iterable[NDArray], rows: int,
    tags: list[tuple[int, int, int, object]], dpi: tuple[float, float] | None,
) -> None:
    """Write (h, w, 1 to 4) that come in bands of so many rows, as BigTIFF above 4 GiB.

    tags: (number, type, count, value) each.
    """
    big = np.prod(shape, dtype=object) * dtype.itemsize > _LARGEST
    with _tifffile(path, "such a TIFF").TiffWriter(file, bigtiff=big) as tiff:
        tiff.write(
            (band.tobytes() for band in bands), shape=shape if shape[2] > 1 else shape[:2], dtype=dtype,
            photometric="rgb" if shape[2] > 2 else "minisblack", planarconfig="contig" if shape[2] > 1 else None,
            extrasamples=["unassalpha"] if shape[2] in (2, 4) else None, rowsperstrip=rows, compression=None,
            metadata=None, software=False, extratags=[(*tag, True) for tag in tags],
            **({"resolution": dpi, "resolutionunit": "INCH"} if dpi else {}),
        )  # fmt: skip

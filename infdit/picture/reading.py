"""Picture files in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from .core import DAMAGE, Picture, PictureError, damage_explained, log
from .profiles import colour_space, embedded_profile, fitting_profile, srgb_profile, to_srgb

# The plugins are called directly: Image.open would try fifty formats (one of them starts Ghostscript), and it
# refuses pictures over 2·MAX_IMAGE_PIXELS, a limit that could be moved only for the whole process.
_DECODERS: dict[re.Pattern[bytes], type[ImageFile]] = {
    re.compile(rb"\x89PNG\r\n\x1a\n"): PngImageFile,
    re.compile(rb"\xff\xd8\xff"): JpegImageFile,
    re.compile(rb"RIFF....WEBPVP8", re.DOTALL): WebPImageFile,
    re.compile(rb"II[*+]\0|MM\0[*+]"): TiffImageFile,
    re.compile(rb"BM"): BmpImageFile,
    re.compile(rb"GIF8[79]a"): GifImageFile,
    re.compile(rb"P[1-6f][\s#]"): PpmImageFile,
}
try:
    from PIL.AvifImagePlugin import AvifImageFile
except ImportError:  # Pillow before 11.3
    pass
else:
    _DECODERS[re.compile(rb"....ftypavi[fs]", re.DOTALL)] = AvifImageFile

SUFFIXES: frozenset[str] = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
_UNOPENED = ("cannot be opened", "check the path and its permissions")
_READABLE = "PNG, JPEG, WebP, TIFF, BMP, GIF, PPM or AVIF"
_PIXELS_FACTOR = 4  # of Image.MAX_IMAGE_PIXELS: who upscales brings big pictures on purpose

_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_PHOTOMETRIC, _ORIENTATION = 256, 257, 258, 262, 274
_TARGET_MODES = {"1": "L", "L": "L", "LA": "LA", "La": "LA", "RGBA": "RGBA", "PA": "RGBA"}  # all others: RGB
_GREY_16 = {"I", "I;16", "I;16B", "I;16L", "I;16N"}


def find_pictures(inputs: Iterable[Path]) -> list[Path]:
    """The pictures that files and folders name, each once, in the order given; a folder's sorted by name.

    Of a folder, only what lies directly in it, ends in one of SUFFIXES and is not hidden. Of a file named by
    itself the contents count, not the suffix.

    Raises:
        PictureError: for a missing path, a file that is no picture, a folder without pictures.
    """
    found: dict[Path, Path] = {}
    for given in map(Path, inputs):
        with damage_explained(given, *_UNOPENED):
            for path in _pictures_at(given):
                found.setdefault(path.absolute(), path)
    return list(found.values())


def read_picture(path: Path) -> Picture:
    """Reads the first picture of a file: upright, right colours, 0..1.

    Grey of 16 bits keeps its precision; colour of 16 bits is read as 8, with a warning.

    Raises:
        PictureError: if the file is missing, damaged, too large, or of a kind that cannot be shown faithfully.
    """
    path = Path(path)
    decoder = _decoder(path)
    with (
        damage_explained(path, "is damaged or of a kind that cannot be read", "save it again as .png"),
        path.open("rb") as file,
    ):
        samples, icc = _decoded(path, decoder(file))
    grey = samples.shape[2] < 3
    if grey:
        samples = np.concatenate([samples[..., :1]] * 3 + [samples[..., 1:]], axis=2)
    pixels = torch.from_numpy(np.ascontiguousarray(samples))
    return Picture(pixels, fitting_profile(path, icc, grey), grey)


def _pictures_at(given: Path) -> list[Path]:
    if not given.is_dir():
        _decoder(given)
        return [given]
    named = [p for p in given.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    paths = sorted(p for p in named if p.is_file())
    if not paths:
        endings = " ".join(sorted(SUFFIXES))
        raise PictureError(f"{given}: there is no picture in this folder; put files there that end in {endings}.")
    return paths


def _decoder(path: Path) -> type[ImageFile]:
    """By the first bytes: names lie more often than headers."""
    with damage_explained(path, *_UNOPENED):
        if not path.exists():
            raise PictureError(f"{path}: there is no such file; check the path.")
        if not path.is_file():
            raise PictureError(f"{path}: this is no file; name a picture file.")
        with path.open("rb") as file:
            start = file.read(16)
    if not start:
        raise PictureError(f"{path}: the file is empty; save the picture again.")
    for magic, decoder in _DECODERS.items():
        if magic.match(start):
            return decoder
    raise PictureError(f"{path}: this is no picture that can be read; save it as {_READABLE}.")


def _decoded(path: Path, image: ImageFile) -> tuple[NDArray[np.float32], bytes | None]:
    """Upright samples (h, w, 1..4), 0..1, of L, LA, RGB or RGBA, and the profile of these, unchecked."""
    _check_size(path, image)
    raw = _raw_mode(image)  # before loading, which forgets it
    _check_samples(path, image, raw)
    _load(image)
    if image.mode in _GREY_16:
        samples, icc = _grey_samples(path, image, raw), embedded_profile(image)
    else:
        samples, icc = _as_shown(path, image, raw)
    alpha = _colour_key(image, raw)
    if alpha is not None:
        samples = np.concatenate([samples, alpha], axis=2)
    return _upright(samples, _orientation(path, image)), icc


def _check_size(path: Path, image: ImageFile) -> None:
    most = Image.MAX_IMAGE_PIXELS and _PIXELS_FACTOR * Image.MAX_IMAGE_PIXELS
    pixels = image.width * image.height
    if most and pixels > most:
        raise PictureError(
            f"{path}: {image.width}×{image.height} are {pixels:,} pixels, and at most {most:,} are read; "
            "cut the picture into parts."
        )


def _raw_mode(image: ImageFile) -> str:
    """How the file stores a pixel ("RGB;16B"), or "" where the plugin does not say."""
    args = image.tile[0][3] if image.tile else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _check_samples(path: Path, image: ImageFile, raw: str) -> None:
    """Refuses floats, warns of what is left out: further frames, low bytes of 16-bit colour."""
    if image.mode == "F":
        raise PictureError(
            f"{path}: its 32-bit float values have no fixed white, and 8 or 16 bits are read; save it as 16-bit .png."
        )
    if getattr(image, "is_animated", False):
        log.warning("%s: the file holds several pictures; only the first is read", path)
    if image.mode in _GREY_16:
        return
    deep = ";16" in raw
    if isinstance(image, TiffImageFile):
        deep = max(image.tag_v2.get(_TIFF_BITS, (1,))) > 8
        if deep and len(raw) == 1:  # uncompressed planes, which Pillow reads as if they had 8 bits
            raise PictureError(f"{path}: 16-bit TIFF in separate planes cannot be read; save it as .png.")
    elif isinstance(image, PpmImageFile):
        args = image.tile[0][3]
        deep = isinstance(args, tuple) and len(args) == 2 and args[1] > 255
    if deep:
        log.warning("%s: 16 bits a channel are read as 8", path)


def _load(image: ImageFile) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if isinstance(image, TiffImageFile) and limit and image.width * image.height > limit:
        # The TIFF plugin asks for Pillow's limit again, unless it finds its memory allocated.
        stored = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_HEIGHT]
        image.im = Image.new(image.mode, stored).im
    image.load()


def _grey_samples(path: Path, image: ImageFile, raw: str) -> NDArray[np.float32]:
    """(h, w, 1), 0..1, from grey of more than 8 bits. Pillow's own convert("L") would clip it at 255."""
    values = np.asarray(image)
    white = 4095 if raw == "I;12" else 65535
    if raw.startswith("I;32") or raw.endswith("S"):  # 32 bits or signed: the white is whatever the author meant
        least, most = int(values.min()), int(values.max())
        if least < 0 or most > white:
            raise PictureError(
                f"{path}: its values {least}..{most} are outside 0..{white}, black to white; save it as 16-bit .png."
            )
        log.warning("%s: integers of unknown range are read as 16 bits, white %d", path, white)
    samples: NDArray[np.float32] = values[..., None].astype(np.float32)
    samples /= white
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0:
        np.subtract(1, samples, out=samples)  # white is zero: Pillow heeds that up to 8 bits
    return samples


def _samples(image: Image.Image) -> NDArray[np.float32]:
    """(h, w, 1..4), 0..1, from L, LA, RGB or RGBA."""
    values = np.asarray(image).astype(np.float32)
    values /= 255
    return values.reshape(image.height, image.width, -1)


def _as_shown(path: Path, image: ImageFile, raw: str) -> tuple[NDArray[np.float32], bytes | None]:
    """Samples of L, LA, RGB or RGBA from any mode of 8 bits, and their profile."""
    icc = embedded_profile(image)
    if image.mode == "CMYK" and icc is not None:
        shown = to_srgb(image, icc) if colour_space(icc) == "CMYK" else None
        if shown is not None:
            return _samples(shown), srgb_profile()
        log.warning("%s: its ICC profile cannot be used; the CMYK colours are converted without it", path)
        icc = None
    if image.mode == "LAB":  # its colours are absolute, whatever profile lies beside them
        return _samples(image.convert("RGB")), srgb_profile()
    target = _TARGET_MODES.get(image.mode, "RGB")
    if image.mode == "P" and "transparency" in image.info:
        target = "RGBA"
    if raw.startswith("LA;16"):  # read as RGBA with three equal channels
        target = "LA"
    return _samples(image if image.mode == target else image.convert(target)), icc


def _colour_key(image: ImageFile, raw: str) -> NDArray[np.float32] | None:
    """(h, w, 1) alpha of a file that declares one grey or one colour transparent (PNG's tRNS chunk), else None."""
    key = image.info.get("transparency")
    if key is None or image.mode not in _GREY_16 | {"1", "L", "RGB"}:
        return None
    key = np.atleast_1d(np.asarray(key))
    if image.mode == "1":
        key = key > 0  # 0 or 1 in Pillow 10, 0 or 255 later
    elif raw in ("L;2", "L;4"):
        key = key * {"L;2": 85, "L;4": 17}[raw]  # the key is in the file's bits, the pixels no longer are
    elif raw.startswith("RGB;16"):
        key = key >> 8
    values = np.asarray(image).reshape(image.height, image.width, -1)
    return (values != key).any(axis=2, keepdims=True).astype(np.float32)


def _orientation(path: Path, image: ImageFile) -> int:
    """1..8 as EXIF counts: how the camera was held."""
    if isinstance(image, TiffImageFile):
        return 1  # Pillow has turned it upright (10.0 leaves the tag in place all the same)
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except DAMAGE as error:
        log.warning("%s: its EXIF data cannot be read (%s); the picture is taken as upright", path, error)
        return 1
    return value if isinstance(value, int) else 1


def _upright(samples: NDArray[np.float32], orientation: int) -> NDArray[np.float32]:
    if orientation in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return samples



"""Picture files in, and what writing needs of them too: the picture, its error, ICC profiles."""

from __future__ import annotations

import contextlib
import io
import logging
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SUBIFD, TiffImageFile

from .notes import strip_notes

log = logging.getLogger(__package__)

SUFFIXES: frozenset[str] = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
# not all that Pillow knows, for one of them starts Ghostscript; AVIF last, for Pillow before 11.3 lacks it
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF")
_GREY_16 = {"I", "I;16", "I;16B", "I;16L", "I;16N"}
_NEW_SUBFILE, _OLD_SUBFILE = 254, 255  # TIFF's tags for what a picture is of others in its file
_BLACK_POINT = cast("ImageCms.Flags", 0x2000)  # Flags.BLACKPOINTCOMPENSATION, a name Pillow 10.0 does not have
_BAD_PROFILE = (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError)  # ImportError: no LittleCMS


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
    """

    pixels: torch.Tensor
    icc_profile: bytes | None
    grey: bool
    note: str = ""


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


def find_pictures(inputs: Iterable[Path], recursive: bool = False, leave: Path | None = None) -> list[Path]:
    """The pictures that files and folders name, each once, in the order given; a folder's sorted by name.

    Of a folder, only what lies directly in it, ends in one of SUFFIXES and is not hidden; a warning tells the rest.
    Of a file named by itself the contents count, not the suffix. recursive: of folders in folders too, links and the
    folder `leave` apart.

    Raises:
        PictureError: for a missing path, a file that is no picture, a folder without pictures.
    """
    found: dict[Path, Path] = {}
    for given in map(Path, inputs):
        paths = _pictures_at(given, recursive, leave)
        if not paths:
            endings = " ".join(sorted(SUFFIXES))
            raise PictureError(f"{given}: there is no picture in this folder; put files there that end in {endings}.")
        for path in paths:
            found.setdefault(path.absolute(), path)
    return list(found.values())


def read_picture(path: Path) -> Picture:
    """Reads the first picture of a file: upright, right colours, 0..1.

    Grey of 16 bits keeps its precision; colour of 16 bits is read as 8, with a warning.

    Raises:
        PictureError: if the file is missing, damaged, too large, or of a kind that cannot be shown faithfully.
    """
    path = Path(path)
    with _opened(path) as image:
        stored = _stored_mode(image)  # before loading, which forgets it
        _check_kind(path, image, stored)
        image.load()
        _turn_upright(path, image)
        shown, icc = _as_shown(path, image, stored)
        black, white = _black_and_white(path, image, stored)
        alpha = _colour_key(image, stored)
        samples = np.asarray(shown).astype(np.float32).reshape(shown.height, shown.width, -1)
    samples -= black
    samples /= white - black
    grey = samples.shape[2] < 3
    if grey or alpha is not None:
        colour = [samples[..., :1]] * 3 + [samples[..., 1:]] if grey else [samples]
        samples = np.concatenate(colour if alpha is None else [*colour, alpha], axis=2)
    return Picture(torch.from_numpy(samples), fitting_profile(path, icc, grey), grey)


def _pictures_at(given: Path, recursive: bool, leave: Path | None) -> list[Path]:
    with damage_explained(given, "cannot be opened", "check the path and its permissions"):
        if not given.is_dir():
            with _opened(given):
                return [given]
        there = sorted(given.iterdir())
        named = [p for p in there if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
        paths = [p for p in named if p.is_file()]
        folders = [p for p in there if p.is_dir()]
        within = [p for p in folders if recursive and _is_within(p, leave)]
    others = Counter(
        "hidden" if p.name.startswith(".") else p.suffix.lower() or "no ending"
        for p in there
        if p not in paths and not p.is_dir()
    )
    count = len(folders) - len(within)
    words = [f"{count} folder{'s' * (count > 1)}"] * bool(count)
    words += [f"{count} × {kind}" for kind, count in sorted(others.items())]
    if words and (paths or recursive):
        log.warning("%s: left out: %s", given, ", ".join(words))
    return paths + [path for folder in within for path in _pictures_at(folder, recursive, leave)]


def _is_within(folder: Path, leave: Path | None) -> bool:
    """Whether a folder in a folder is looked into: not what is hidden, leads elsewhere or is to be left."""
    apart = leave is not None and leave.is_dir() and folder.samefile(leave)
    return not (apart or folder.name.startswith(".") or folder.is_symlink())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[ImageFile]:
    """The image in a file, not yet decoded; what Pillow raises while it is open is explained."""
    with damage_explained(path, "cannot be opened", "check the path and its permissions"):
        if not path.is_file():
            raise PictureError(f"{path}: there is no such file; check the path.")
        file = path.open("rb")
    with (
        file,
        damage_explained(path, "is damaged or of a kind that cannot be read", "save it again as .png"),
        warnings.catch_warnings(),
    ):
        # who upscales brings big pictures on purpose, and beyond twice the size warned of Pillow refuses them;
        # filters are the process's before Python 3.14: at worst, threads leave this one warning silent
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield _identified(path, file)


def _identified(path: Path, file: BinaryIO) -> ImageFile:
    """By the contents: names lie more often than headers."""
    if not file.read(1):
        raise PictureError(f"{path}: the file is empty; save the picture again.")
    stripped = strip_notes(file)
    if stripped.damaged:
        log.warning("%s: damaged parts of it are left out: %s", path, ", ".join(stripped.damaged))
    try:
        image = Image.open(stripped.file, formats=_FORMATS)
        if stripped.profile:
            image.info["icc_profile"] = stripped.profile
        return image
    except (UnidentifiedImageError, KeyError):  # KeyError: there is no AVIF in Pillow before 11.3
        raise PictureError(
            f"{path}: cannot be read, for it is damaged or no picture of a known format; "
            "save it as PNG, JPEG, WebP, TIFF, BMP, GIF, PPM or AVIF."
        ) from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise PictureError(
            f"{path}: it has more than {most:,} pixels, the most that are read; cut the picture into parts."
        ) from None


def _stored_mode(image: ImageFile) -> str:
    """How the file stores a pixel, in Pillow's words ("RGB;16B"), or "" where the plugin does not say."""
    args = image.tile[0][3] if image.tile else ""
    first, *others = args if isinstance(args, tuple) else (args,)
    if image.format == "PPM" and others and others[0] > 255:
        return f"{first};16B"
    return first if isinstance(first, str) else ""


def _check_kind(path: Path, image: ImageFile, stored: str) -> None:
    """Refuses what Pillow would show wrongly, warns of what is left out: further frames, low bytes of colour."""
    if image.mode == "F":
        raise PictureError(
            f"{path}: its 32-bit float values have no fixed white, and 8 or 16 bits are read; save it as 16-bit .png."
        )
    # Pillow reads uncompressed planes as if they had 8 bits
    if isinstance(image, TiffImageFile) and len(stored) == 1 and max(image.tag_v2.get(BITSPERSAMPLE, (1,))) > 8:
        raise PictureError(f"{path}: 16-bit TIFF in separate planes cannot be read; save it as .png.")
    if isinstance(image, TiffImageFile) and _is_preview(image):
        raise PictureError(
            f"{path}: only a small preview of the picture in it can be read, as is usual for a camera's raw file; "
            "develop it, or save the large picture as .png."
        )
    # MPO is a camera's JPEG, and what lies behind it a preview or a depth map
    if getattr(image, "is_animated", False) and image.format != "MPO":
        log.warning("%s: the file holds several pictures; only the first is read", path)
    if ";16" in stored and image.mode not in _GREY_16:
        log.warning("%s: 16 bits a channel are read as 8", path)


def _is_preview(image: TiffImageFile) -> bool:
    """Whether the file calls its first picture a reduced copy, and has others."""
    tags = image.tag_v2
    reduced = tags.get(_NEW_SUBFILE, 0) & 1 or tags.get(_OLD_SUBFILE) == 2
    return bool(reduced) and (SUBIFD in tags or getattr(image, "is_animated", False))


def _turn_upright(path: Path, image: ImageFile) -> None:
    if isinstance(image, TiffImageFile):
        return  # Pillow has turned it when it was loaded (10.0 leaves the tag in place all the same)
    try:
        with damage_explained(path, "its EXIF data is damaged", "check that the picture is upright"):
            ImageOps.exif_transpose(image, in_place=True)
    except PictureError as error:
        log.warning("%s", error)


def _as_shown(path: Path, image: ImageFile, stored: str) -> tuple[Image.Image, bytes | None]:
    """The image as L, LA, RGB or RGBA, or as grey of 16 bits if it is, and its profile, unchecked."""
    icc = image.info.get("icc_profile")
    if image.mode in _GREY_16:
        return image, icc  # Pillow's own convert("L") would clip it at 255
    if image.mode == "LAB":  # its colours are absolute, whatever profile lies beside them
        return image.convert("RGB"), srgb_profile()
    if image.mode == "CMYK" and icc:
        shown = to_srgb(image, icc)
        if shown is not None:
            return shown, srgb_profile()
        log.warning("%s: its ICC profile cannot be used; the CMYK colours are converted without it", path)
        icc = None
    # LA of 16 bits is read as RGBA with three equal channels
    grey = image.mode in ("1", "L", "LA", "La") or stored.startswith("LA;16")
    alpha = image.mode in ("LA", "La", "PA", "RGBA") or (image.mode == "P" and "transparency" in image.info)
    target = ("L" if grey else "RGB") + ("A" if alpha else "")
    return (image if image.mode == target else image.convert(target)), icc


def _black_and_white(path: Path, image: ImageFile, stored: str) -> tuple[int, int]:
    """The values that mean black and white."""
    if image.mode not in _GREY_16:
        return 0, 255
    white = 4095 if stored == "I;12" else 65535
    if stored.startswith("I;32") or stored.endswith("S"):  # 32 bits or signed: the white is whatever the author meant
        least, most = cast("tuple[int, int]", image.getextrema())
        if least < 0 or most > white:
            raise PictureError(
                f"{path}: its values {least}..{most} are outside 0..{white}, black to white; save it as 16-bit .png."
            )
        log.warning("%s: integers of unknown range are read as 16 bits, white %d", path, white)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
        return white, 0  # which Pillow heeds up to 8 bits
    return 0, white


def _colour_key(image: ImageFile, stored: str) -> NDArray[np.float32] | None:
    """(h, w, 1) alpha of a file that declares one grey or one colour transparent (PNG's tRNS chunk), else None."""
    key = image.info.get("transparency")
    if key is None or image.mode not in _GREY_16 | {"1", "L", "RGB"}:
        return None
    # the key is in the file's bits, the pixels no longer are
    key = np.atleast_1d(key) * {"L;2": 85, "L;4": 17}.get(stored, 1)
    if stored.startswith("RGB;16"):
        key >>= 8
    if image.mode == "1":
        key = key > 0  # 0 or 1 in Pillow 10, 0 or 255 later
    values = np.asarray(image).reshape(image.height, image.width, -1)
    return (values != key).any(axis=2, keepdims=True).astype(np.float32)


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

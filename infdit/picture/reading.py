"""Picture files in, and what writing needs of them too: the picture, its error, ICC profiles."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL import ImageFile as ImageFileModule
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SUBIFD, TiffImageFile

from .notes import LARGEST, strip_notes
from .picture import MOST_DPI, Picture, PictureError, damage_explained, log
from .profile import fitting_profile, srgb_profile, to_srgb
from .tiff import EXIF_PARTS, exif_of, read_tiff

SUFFIXES: frozenset[str] = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".jpx", ".tga", ".psd", ".qoi"}
    | {".dds", ".ico", ".icns", ".pcx", ".sgi"}
)
# not all that Pillow knows, for one of them starts Ghostscript; TGA behind those whose beginning says what they are;
# AVIF last, for Pillow before 11.3 lacks it
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "PSD", "QOI", "DDS", "ICO", "ICNS", "PCX",
            "SGI", "TGA", "AVIF")  # fmt: skip
# what is read only where somebody has its package: how it begins, of whom, and what has to be imported and called
_PLUGINS = {
    "HEIF": (rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", "pillow-heif", "pillow_heif", "register_heif_opener"),
    "JXL": (rb"\xff\n|\0\0\0\x0cJXL \r\n\x87\n", "pillow-jxl-plugin", "pillow_jxl", ""),
}
_EXR = b"\x76\x2f\x31\x01"
_PLANES = 284  # TIFF's tag
_DESCRIPTION = 270
_KEPT_TAGS = (_DESCRIPTION, 271, 272, 305, 306, 315, 33432)  # what it shows, camera, program, date, artist, copyright

_OF_THE_FILE = (40962, 40963, 40965)  # its sides, and a place in it
_OF_NUMBERS = re.compile(r'\s*(\{.*"shape":|ImageJ=|<\?xml.*<OME\b)', re.DOTALL)  # how arrays lay in the file
_LARGE_XMP = "%s: its XMP is of 1 MiB or more, which readers refuse, and is left out"
_GREY_16 = {"I", "I;16", "I;16B", "I;16L", "I;16N"}
_NEW_SUBFILE, _OLD_SUBFILE = 254, 255  # TIFF's tags for what a picture is of others in its file


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

    PNG and TIFF keep the precision of 16 bits, and TIFF of floats; what else has more than 8 is warned of.

    Raises:
        PictureError: if the file is missing, damaged, too large, or of a kind that cannot be shown faithfully.
    """
    path = Path(path)
    with _remarks_told_once(path), _opened(path) as (image, file):
        if image is None or _for_tifffile(image):
            samples, bits, grey, icc, said = read_tiff(path, file)
            said = _said(path, partial(exif_of, file), *said)
            return Picture(torch.from_numpy(samples), fitting_profile(path, icc, grey), grey, "", bits, *said)
        stored = _stored_mode(image)  # before loading, which forgets it
        low = _low_bytes(image, stored)
        _check_kind(path, image, stored, low is not None)
        image.load()
        _turn_upright(path, image)
        shown, icc = _as_shown(path, image, stored)
        black, white = _black_and_white(path, image, stored)
        samples = np.asarray(shown).astype(np.float32).reshape(shown.height, shown.width, -1)
        if low is not None:
            low.load()
            _turn_upright(path, low)
            below = np.asarray(low if low.mode != "RGBX" else low.convert("RGB"))
            samples, white = samples * 256 + (below[..., 1::2] if samples.shape[2] == 2 else below), 65535
        alpha = _colour_key(image, stored, None if low is None else samples)
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
        said = _said(path, image.getexif, xmp, image.info.get("dpi"))
    samples -= black
    samples /= white - black
    grey = samples.shape[2] < 3
    if grey or alpha is not None:
        colour = [samples[..., :1]] * 3 + [samples[..., 1:]] if grey else [samples]
        samples = np.concatenate(colour if alpha is None else [*colour, alpha], axis=2)
    bits = 8 if {black, white} == {0, 255} else 16
    return Picture(torch.from_numpy(samples), fitting_profile(path, icc, grey), grey, "", bits, *said)


def _pictures_at(given: Path, recursive: bool, leave: Path | None) -> list[Path]:
    with damage_explained(given, "cannot be opened", "check the path and its permissions"):
        if not given.is_dir():
            with _remarks(), _opened(given):
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
def _opened(path: Path) -> Iterator[tuple[ImageFile | None, BinaryIO]]:
    """The image in a file, not yet decoded, None for a TIFF that Pillow does not know, and the file.

    What Pillow raises while it is open is explained.
    """
    with damage_explained(path, "cannot be opened", "check the path and its permissions"):
        if not path.is_file():
            raise PictureError(f"{path}: there is no such file; check the path.")
        file = path.open("rb")
    with file, damage_explained(path, "is damaged or of a kind that cannot be read", "save it again as .png"):
        yield _identified(path, file), file


@contextlib.contextmanager
def _remarks() -> Iterator[list[str]]:
    """What the packages that read files remark of one, which may be a line for each of its tags, printed nowhere."""
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    def show(message: Warning | str, *_: object, **__: object) -> None:
        said.append(str(message))

    logger = logging.getLogger("tifffile")
    logger.addFilter(keep)
    try:
        # filters are the process's before Python 3.14: at worst, threads leave or lose a remark
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            # who upscales brings big pictures on purpose, and beyond twice the size warned of Pillow refuses them
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.showwarning = show
            yield said
    finally:
        logger.removeFilter(keep)


@contextlib.contextmanager
def _remarks_told_once(path: Path) -> Iterator[None]:
    """Says in one sentence what is remarked of a file that is read all the same; what is refused has a reason."""
    with _remarks() as said:
        yield
    if said:
        more = f" (and {len(said) - 1} more)" if len(said) > 1 else ""
        first = textwrap.shorten(said[0], 160, placeholder=" …")
        log.warning("%s: is read, though a part of it is not as it should be: %s%s", path, first, more)


def _identified(path: Path, file: BinaryIO) -> ImageFile | None:
    """By the contents: names lie more often than headers."""
    if not file.read(1):
        raise PictureError(f"{path}: the file is empty; save the picture again.")
    stripped = strip_notes(file)
    if stripped.damaged:
        log.warning("%s: damaged parts of it are left out: %s", path, ", ".join(stripped.damaged))
    if stripped.large_xmp:
        log.warning(_LARGE_XMP, path)
    try:
        image = Image.open(stripped.file, formats=_FORMATS)
        if stripped.profile:
            image.info["icc_profile"] = stripped.profile
        return image
    except (UnidentifiedImageError, KeyError):  # KeyError: there is no AVIF in Pillow before 11.3
        return _of_another_format(path, file)
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise PictureError(
            f"{path}: it has more than {most:,} pixels, the most that are read; cut the picture into parts."
        ) from None


def _of_another_format(path: Path, file: BinaryIO) -> ImageFile | None:
    """What Pillow does not know by itself: an image that a plugin opens, or None for a TIFF."""
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    if head.startswith(_EXR):
        raise PictureError(f"{path}: EXR is not read, for its light has no white to end at; save it as 16-bit .png.")
    for name, (begins, package, module, opener) in _PLUGINS.items():
        if re.match(begins, head, re.DOTALL):
            try:
                plugin = importlib.import_module(module)
            except ImportError:
                raise PictureError(
                    f"{path}: {name} is read by the package {package}, which is not installed; "
                    f"pip install {package}, or save the picture as .png."
                ) from None
            getattr(plugin, opener, lambda: None)()
            return Image.open(file, formats=[name])
    raise PictureError(
        f"{path}: cannot be read, for it is damaged or no picture of a known format; "
        "save it as PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF."
    )


def _stored_mode(image: ImageFile) -> str:
    """How the file stores a pixel, in Pillow's words ("RGB;16B"), or "" where the plugin does not say."""
    args = image.tile[0][3] if image.tile else ""
    first, *others = args if isinstance(args, tuple) else (args,)
    if image.format == "PPM" and others and others[0] > 255:
        return f"{first};16B"
    return first if isinstance(first, str) else ""


def _for_tifffile(image: ImageFile) -> bool:
    """Whether it is TIFF of floats, or of more than 8 bits in planes, of which Pillow reads the high bytes or less."""
    if not isinstance(image, TiffImageFile):
        return False
    return image.mode == "F" or (image.tag_v2.get(_PLANES) == 2 and max(image.tag_v2.get(BITSPERSAMPLE, (1,))) > 8)


def _bits_told(image: ImageFile, stored: str) -> int:
    """Bits of a channel, as far as the plugin tells; of BMP's "BGR;16" they are those of a pixel."""
    if re.match(r"(?!BGR).*;16", stored) or (image.tile and image.tile[0][0] == "SGI16"):
        return 16
    return image.info.get("bit_depth", 8)  # of pillow-heif


def _low_bytes(image: ImageFile, stored: str) -> ImageFile | None:
    """The picture again as what Pillow leaves out of colours of 16 bits, not loaded; None where that cannot be had.

    Pillow has room for 8 bits of a colour and takes the high byte. Asked for the other order of bytes, it takes the
    low one; LA is read as four bytes, of which the second and fourth are the low ones.
    """
    match = re.fullmatch(r"(RGB|RGBA|RGBX|LA);16([BLN])", stored)
    if match is None or image.format not in ("PNG", "TIFF"):
        return None
    ours = {"N": sys.byteorder[0].upper()}.get(match[2], match[2])
    raw = "RGBA" if match[1] == "LA" else f"{match[1]};16{'L' if ours == 'B' else 'B'}"
    low = Image.open(cast(BinaryIO, image.fp), formats=[image.format])
    # in Pillow 10.0 a tile is a plain tuple
    make = getattr(ImageFileModule, "_Tile", lambda *parts: parts)
    args = [tile[3] for tile in low.tile]
    raws = [(raw, *arg[1:]) if isinstance(arg, tuple) else raw for arg in args]
    low.tile = cast(Any, [make(*tile[:3], raw) for tile, raw in zip(low.tile, raws, strict=True)])
    return low


def _check_kind(path: Path, image: ImageFile, stored: str, whole: bool) -> None:
    """Refuses what Pillow would show wrongly, warns of what is left out: further frames, low bytes unless `whole`."""
    if isinstance(image, TiffImageFile) and _is_preview(image):
        raise PictureError(
            f"{path}: only a small preview of the picture in it can be read, as is usual for a camera's raw file; "
            "develop it, or save the large picture as .png."
        )
    if image.mode == "F":
        raise PictureError(f"{path}: floats are read of TIFF only; save it as .tif, or as 16-bit .png.")
    # MPO is a camera's JPEG, and what lies behind it a preview or a depth map; behind PSD's whole lie its layers
    if getattr(image, "is_animated", False) and image.format not in ("MPO", "PSD"):
        log.warning("%s: the file holds several pictures; only the first is read", path)
    bits = _bits_told(image, stored)
    if bits > 8 and image.mode not in _GREY_16 and not whole:
        log.warning("%s: %d bits a channel are read as 8", path, bits)


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
        convert = to_srgb(icc, image.mode)
        if convert is not None:
            return convert(image), srgb_profile()
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


def _colour_key(image: ImageFile, stored: str, deep: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    """(h, w, 1) alpha of a file that declares one grey or one colour transparent (PNG's tRNS chunk), else None.

    deep: the samples in full depth, if they are more than the image has.
    """
    key = image.info.get("transparency")
    if key is None or image.mode not in _GREY_16 | {"1", "L", "RGB"}:
        return None
    # the key is in the file's bits, the pixels no longer are
    key = np.atleast_1d(key) * {"L;2": 85, "L;4": 17}.get(stored, 1)
    if image.mode == "1":
        key = key > 0  # 0 or 1 in Pillow 10, 0 or 255 later
    values = np.asarray(image).reshape(image.height, image.width, -1) if deep is None else deep
    return (values != key).any(axis=2, keepdims=True).astype(np.float32)


def _said(
    path: Path, exif_of: Callable[[], Image.Exif], xmp: object, dpi: Iterable[float] | None
) -> tuple[bytes, bytes, tuple[float, float] | None]:
    """EXIF, XMP and dpi of a picture that is upright now; what cannot be carried is left out, with a warning."""
    exif, kept = b"", Image.Exif()
    try:
        with damage_explained(path, "its EXIF data is damaged", "it is left out"):
            found = exif_of()
            texts = {tag: found[tag] for tag in _KEPT_TAGS if tag in found}
            # as bytes, for Pillow makes "?" of what it has read beyond ASCII
            kept.update({n: text.encode("latin-1") for n, text in texts.items() if isinstance(text, str)
                         and not (n == _DESCRIPTION and _OF_NUMBERS.match(text))})  # fmt: skip
            for part in EXIF_PARTS:
                if said := {tag: value for tag, value in found.get_ifd(part).items() if tag not in _OF_THE_FILE}:
                    kept[part] = said
            exif = kept.tobytes() if kept else b""
    except PictureError as error:
        log.warning("%s", error)
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    # the picture is upright now, and readers of Pillow's kind look here too
    xmp = re.sub(rb"(tiff:Orientation(?:=[\"']|>))\d", rb"\g<1>1", xmp) if isinstance(xmp, bytes) else b""
    if len(xmp) >= LARGEST:
        log.warning(_LARGE_XMP, path)
        xmp = b""
    sides = [float(side) for side in dpi or ()]
    return exif, xmp, (sides[0], sides[1]) if len(sides) == 2 and all(0 < side < MOST_DPI for side in sides) else None

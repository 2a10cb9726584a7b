"""What PNGs say beside their picture: our own note; and without what Pillow stumbles over and viewers do not."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from .png import SIGNATURE

LARGEST = 2**20  # bytes of a profile that Pillow reads, and with it many programs
_MOST = 2**24  # bytes of a profile that we do
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
KEYWORD = "inf-dit"  # of our own text
_XMP = b"XML:com.adobe.xmp\0\0"  # text that may say which side is up


def read_note(path: Path) -> str:
    """Our own note in a PNG; "" if there is none, or it is damaged, or the file is none.

    Raises:
        OSError: a file that cannot be read.
    """
    if not path.is_file():  # a pipe would be waited for without end
        return ""
    with path.open("rb") as file:
        if file.read(8) == SIGNATURE:
            while len(head := file.read(8)) == 8:
                length, kind = struct.unpack(">I4s", head)
                if kind != b"tEXt" or length >= LARGEST:
                    file.seek(length + 4, io.SEEK_CUR)
                    continue
                content, crc = file.read(length), file.read(4)
                keyword, _, text = content.partition(b"\0")
                if keyword == KEYWORD.encode() and crc == zlib.crc32(kind + content).to_bytes(4, "big"):
                    return text.decode("latin-1")
    return ""


@dataclass
class Stripped:
    """A file for Pillow.

    Attributes:
        file: the file given, or its copy in memory without what is left out.
        profile: an ICC profile too large for Pillow.
        damaged: the chunks left out for a wrong checksum, texts apart.
        large_xmp: whether XMP is left out for its size.
    """

    file: BinaryIO
    profile: bytes | None = None
    damaged: list[str] = field(default_factory=list)
    large_xmp: bool = False


def strip_notes(file: BinaryIO) -> Stripped:
    """Leave out of a PNG its texts, a profile beyond Pillow's limit, and ancillary chunks with a wrong checksum.

    What is no PNG, or cut short, is left to Pillow.
    """
    result, kept, place, end = Stripped(file), [], 8, file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(8) == SIGNATURE:
        while place + 12 <= end:
            file.seek(place)
            length, kind = struct.unpack(">I4s", file.read(8))
            after = place + length + 12
            if not (kind[:1].islower() and after <= end and kind != b"fdAT" and _left_out(kind, file, length, result)):
                kept.append((place, after))
            place = after
        if sum(b - a for a, b in kept) + 8 < place:
            file.seek(0)
            whole = io.BytesIO(file.read(8))
            whole.seek(8)
            for a, b in kept:
                file.seek(a)
                whole.write(file.read(b - a))
            result.file = whole
    result.file.seek(0)
    return result


def _left_out(kind: bytes, file: BinaryIO, length: int, result: Stripped) -> bool:
    """Whether a chunk is left out, whose content the file is at."""
    content = file.read(length)
    if struct.unpack(">I", file.read(4))[0] != zlib.crc32(kind + content):
        if kind not in _TEXTS:
            result.damaged.append(kind.decode("latin-1"))
        return True
    if kind == b"iCCP":
        packed = content.partition(b"\0")[2][1:]
        try:
            profile = zlib.decompressobj().decompress(packed, _MOST)
        except zlib.error:
            return False
        if len(profile) >= LARGEST:
            result.profile = profile
            return True
    xmp = kind in _TEXTS and content.startswith(_XMP)
    result.large_xmp |= xmp and length >= LARGEST
    return kind in _TEXTS and not (xmp and length < LARGEST)

"""Picture files put together by hand, by the rules of their formats, and what tests of them share."""

import logging
import random
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

ONE_LEVEL = 1 / 255 + 1e-6
EXACT = 1e-6
Value = int | tuple[int, ...]


# ---------------------------------------------------------------- files made by hand


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, rows: Sequence[bytes], depth: int, colour: int, **chunks: bytes) -> bytes:
    """rows: packed bytes of each row; chunks before IDAT, by name."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header)
    body += b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    body += chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def interlaced(values: np.ndarray) -> bytes:
    """A PNG of RGB, uint8 or uint16, in the seven passes of Adam7."""
    height, width, _ = values.shape
    packed, wide = b"", values.astype(f">u{values.itemsize}")
    passes = (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
    for x, y, right, down in passes:
        packed += b"".join(b"\0" + row.tobytes() for row in wide[y::down, x::right] if row.size)
    header = struct.pack(">IIBBBBB", width, height, 8 * values.itemsize, 2, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")


def psd(values: np.ndarray, bits: int = 8) -> bytes:
    """RGB, as planes without compression; no resources, no layers."""
    height, width, _ = values.shape
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, height, width, bits, 3)
    return head + bytes(14) + np.moveaxis(values, 2, 0).tobytes()


def u16(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def iccp(profile: bytes) -> bytes:
    return b"x\0\0" + zlib.compress(profile)


def exif(orientation: int) -> bytes:
    return b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)


def tiff(tags: Mapping[int, Value], data: bytes, pages: int = 1) -> bytes:
    """Little-endian; tags: {number: value or values}, shorts and longs; every page has the same data."""
    tags = {273: 8, 278: tags[257], 279: len(data), **tags}
    start, head, tail = 8 + len(data), b"", b""
    for page in range(pages):
        entries, extra, room = b"", b"", start + len(tail) + 2 + 12 * len(tags) + 4
        for tag, value in sorted(tags.items()):
            values = value if isinstance(value, tuple) else (value,)
            packed = struct.pack(f"<{len(values)}I", *values)
            if len(values) > 1:
                packed, extra = struct.pack("<I", room + len(extra)), extra + packed
            entries += struct.pack("<HHI", tag, 4, len(values)) + packed
        following = 0 if page == pages - 1 else room + len(extra)
        tail += struct.pack("<H", len(tags)) + entries + struct.pack("<I", following) + extra
    head = b"II*\0" + struct.pack("<I", start)
    return head + data + tail


def tiff_of(
    width: int, height: int, bits: Value, photometric: int, data: bytes, pages: int = 1, **more: Value
) -> bytes:
    named = {"planar": 284, "extra": 338, "format": 339, "palette": 320}
    samples = len(bits) if isinstance(bits, tuple) else 1
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: samples}
    return tiff(tags | {named[name]: value for name, value in more.items()}, data, pages)


def icc(kind: str, space: str, pcs: str, **tags: bytes) -> bytes:
    """A version 2 profile; kind, space and pcs are four letters."""
    common = {
        "desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78),
        "cprt": b"text" + bytes(4) + b"x\0",
        "wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061),
    } | tags
    table, data, start = b"", b"", 128 + 4 + 12 * len(common)
    for name, tag in common.items():
        table += name.encode() + struct.pack(">II", start + len(data), len(tag))
        data += tag + bytes(-len(tag) % 4)
    head = struct.pack(">I4sI", start + len(data), bytes(4), 0x02400000) + (kind + space + pcs).encode()
    head += struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return head + struct.pack(">I", len(common)) + table + data


def lut(inputs: int, table: bytes) -> bytes:
    """mft1: a table of the corners of a cube, the last input changing fastest, between identity curves."""
    outputs, identity = len(table) >> inputs, bytes(range(256))
    matrix = struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536)
    return b"mft1" + bytes(4) + bytes([inputs, outputs, 2, 0]) + matrix + identity * inputs + table + identity * outputs


def cmyk_profile() -> bytes:
    """Cyan is a neutral L* = 128/2.55, full black only L* = 20, anything else white; the paper is yellowish."""
    lightness = [51 if index & 1 else 128 if index & 8 else 255 for index in range(16)]
    seen = lut(4, b"".join(bytes([value, 128, 128]) for value in lightness))
    printed = lut(3, b"".join(bytes([0, 0, 0, 0 if index & 4 else 255]) for index in range(8)))
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 60000, 62000, 40000)
    return icc("prtr", "CMYK", "Lab ", A2B0=seen, B2A0=printed, wtpt=white)


def grey_profile() -> bytes:
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 256)
    return icc("mntr", "GRAY", "XYZ ", kTRC=curve)


def rgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def linear_rgb_profile(**more: bytes) -> bytes:
    """sRGB's primaries, adapted to D50, without its curve; more tags."""
    linear = b"curv" + bytes(4) + struct.pack(">IH", 1, 256)
    columns = {"rXYZ": (28579, 14581, 912), "gXYZ": (25249, 46981, 6362), "bXYZ": (9376, 3974, 46787)}
    tags = {name: b"XYZ " + bytes(4) + struct.pack(">3i", *value) for name, value in columns.items()}
    return icc("mntr", "RGB ", "XYZ ", **tags, rTRC=linear, gTRC=linear, bTRC=linear, **more)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, None, **options)
    return path


def stored(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def assert_one_sentence(error: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and ". " not in text and "; " in text, text
    for word in words:
        assert word in text, text


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut short, longer, or with bits turned: never the same."""
    kind = rng.choice(["cut", "longer", "bit", "bits", "zeros"])
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    if kind == "longer":
        return content + rng.randbytes(rng.randrange(1, 50))
    changed = bytearray(content)
    if kind == "zeros":
        place = rng.randrange(len(content) - 200)
        changed[place : place + 200] = bytes(200)
    for _ in range({"bit": 1, "bits": 9}.get(kind, 0)):
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)

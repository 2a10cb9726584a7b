"""PNG by rows, of 8 or 16 bits, so that a picture larger than memory can be written; and a check of one by pieces."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # the format's number for L, LA, RGB and RGBA
_PIECE = 2**20  # bytes


def write_png(
    file: IO[bytes], size: tuple[int, int], channels: int, bits: int, bands: Iterable[NDArray[np.unsignedinteger]],
    chunks: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Write a picture whose rows come in bands (n, width, channels) of uint8 or uint16.

    Args:
        size: (height, width); channels: 1 to 4, of L, LA, RGB or RGBA; bits: of a channel, 8 or 16.
        chunks: (kind, content) of what is said beside it.
    """
    height, width = size
    file.write(SIGNATURE)
    _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, bits, _COLOURS[channels], 0, 0, 0))
    for kind, content in chunks:
        _chunk(file, kind, content)
    packer, pixel = zlib.compressobj(), channels * bits // 8
    above = np.zeros(width * pixel, np.uint8)
    for band in bands:
        rows = np.ascontiguousarray(band, f">u{bits // 8}").view(np.uint8).reshape(len(band), -1)
        _chunk(file, b"IDAT", packer.compress(_filtered(above, rows, pixel).tobytes()))
        above = rows[-1]
    _chunk(file, b"IDAT", packer.flush())
    _chunk(file, b"IEND", b"")


def _filtered(above: NDArray[np.uint8], rows: NDArray[np.uint8], pixel: int) -> NDArray[np.uint8]:
    """Rows (n, bytes) under a row `above` as the format's filters leave them, (n, 1 + bytes).

    Of Sub, Up and Paeth each row takes the one that leaves the smallest numbers, as the format's authors advise.
    """
    up = np.concatenate((above[None], rows[:-1])).astype(np.int16)
    left, corner = np.zeros_like(up), np.zeros_like(up)
    left[:, pixel:], corner[:, pixel:] = rows[:, :-pixel], up[:, :-pixel]
    to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    near = np.where(to_up <= to_corner, up, corner)
    paeth = np.where((to_left <= to_up) & (to_left <= to_corner), left, near)
    tried = [rows - guess.astype(np.uint8) for guess in (left, up, paeth)]
    best = np.argmin([abs(one.view(np.int8).astype(np.int16)).sum(1) for one in tried], 0)
    names = np.array([1, 2, 4], np.uint8)[best]
    return np.concatenate((names[:, None], np.choose(best[:, None], tried)), 1)


def _chunk(file: IO[bytes], kind: bytes, content: bytes) -> None:
    if content or kind != b"IDAT":
        file.write(struct.pack(">I", len(content)) + kind)
        file.write(content)
        file.write(struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))))


def check_png(path: Path) -> int:
    """Bits of a channel of a whole PNG, read piece by piece.

    Raises:
        OSError: a file that cannot be read. ValueError: no PNG, or one that is damaged or cut short.
    """
    kind, bits = b"", 0
    with path.open("rb") as file:
        if file.read(8) != SIGNATURE:
            raise ValueError("it is no PNG")
        while kind != b"IEND":
            head = file.read(8)
            left, kind = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"")
            crc = zlib.crc32(kind)
            while left and (piece := file.read(min(left, _PIECE))):
                crc, left = zlib.crc32(piece, crc), left - len(piece)
                bits = piece[8] if kind == b"IHDR" and len(piece) > 8 else bits
            if left or not kind or file.read(4) != crc.to_bytes(4, "big"):
                raise ValueError("it is cut short, or a checksum is wrong")
    return bits

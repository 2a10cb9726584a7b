"""Reading picture files: bytes put together here by the format's own rules, and colours computed by hand."""

import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from filebytes import (
    EXACT,
    ONE_LEVEL,
    assert_one_sentence,
    chunk,
    cmyk_profile,
    complaints,
    exif,
    grey_profile,
    iccp,
    interlaced,
    linear_rgb_profile,
    png,
    psd,
    rgb_profile,
    saved,
    stored,
    tiff,
    tiff_of,
    u16,
)
from PIL import Image, ImageCms, features
from PIL.TiffImagePlugin import OPEN_INFO

from infdit.picture import SUFFIXES, Picture, PictureError, find_pictures, read_picture, write_picture

# ---------------------------------------------------------------- reading, kind by kind

W, K = (255, 255, 255), (0, 0, 0)
DEEP_RGB = u16(0x1234, 0xFFFF, 0x8000, 0, 0x00FF, 0xFF00)
DEEP_SEEN = [(0x1234 / 257, 255, 0x8000 / 257), (0, 255 / 257, 0xFF00 / 257)]
HIGH_SEEN = [(0x12, 255, 0x80), (0, 0, 255)]  # low bytes count for nothing
DEEP_LITTLE = struct.pack("<6H", *struct.unpack(">6H", DEEP_RGB))
PALETTE = bytes([10, 20, 30, 200, 100, 50])
PALETTE_16 = sum(((a * 257, b * 257, *[0] * 254) for a, b in zip(PALETTE[:3], PALETTE[3:], strict=True)), ())

# name: (file, the two pixels of its one row in 0..255, grey, levels of tolerance, words of the one warning)
FILES = {
    "png 1": (png(2, [b"\x40"], 1, 0), [K, W], True, 0, None),
    "png 1 key": (png(2, [b"\x40"], 1, 0, tRNS=u16(1)), [(*K, 255), (*W, 0)], True, 0, None),
    "png L": (png(2, [b"\x07\xc8"], 8, 0), [(7,) * 3, (200,) * 3], True, 0, None),
    "png L key": (png(2, [b"\x07\xc8"], 8, 0, tRNS=u16(200)), [(7, 7, 7, 255), (200, 200, 200, 0)], True, 0, None),
    "png L2 key": (png(2, [b"\x60"], 2, 0, tRNS=u16(2)), [(85, 85, 85, 255), (170, 170, 170, 0)], True, 0, None),
    "png L4 key": (png(2, [b"\x3c"], 4, 0, tRNS=u16(3)), [(51, 51, 51, 0), (204, 204, 204, 255)], True, 0, None),
    "png I;16": (png(2, [u16(300, 65535)], 16, 0), [(300 / 257,) * 3, W], True, 0, None),
    "png I;16 key": (
        png(2, [u16(300, 301)], 16, 0, tRNS=u16(300)),
        [(*(300 / 257,) * 3, 0), (*(301 / 257,) * 3, 255)],
        True,
        0,
        None,
    ),
    "png LA": (png(2, [b"\x07\xff\xc8\x33"], 8, 4), [(7, 7, 7, 255), (200, 200, 200, 51)], True, 0, None),
    "png LA 16": (
        png(2, [u16(0x0712, 0xFFFF, 0xC8FF, 0x3300)], 16, 4),
        [(*(0x0712 / 257,) * 3, 255), (*(0xC8FF / 257,) * 3, 0x3300 / 257)],
        True,
        0,
        None,
    ),
    "png RGB": (png(2, [b"\1\2\3\xfa\xfb\xfc"], 8, 2), [(1, 2, 3), (250, 251, 252)], False, 0, None),
    "png RGB key": (
        png(2, [b"\1\2\3\1\2\4"], 8, 2, tRNS=u16(1, 2, 4)),
        [(1, 2, 3, 255), (1, 2, 4, 0)],
        False,
        0,
        None,
    ),
    "png RGB 16": (png(2, [DEEP_RGB], 16, 2), DEEP_SEEN, False, 0, None),
    "png RGB 16 key": (
        png(2, [DEEP_RGB], 16, 2, tRNS=DEEP_RGB[:6]),
        [(*DEEP_SEEN[0], 0), (*DEEP_SEEN[1], 255)],
        False,
        0,
        None,
    ),
    "png RGBA": (png(2, [b"\1\2\3\0\4\5\6\x80"], 8, 6), [(1, 2, 3, 0), (4, 5, 6, 128)], False, 0, None),
    "png RGBA 16": (
        png(2, [u16(0x0101, 0x02FF, 0x0300, 0, 0x0400, 0x0500, 0x0600, 0x8080)], 16, 6),
        [(1, 0x02FF / 257, 0x0300 / 257, 0), (0x0400 / 257, 0x0500 / 257, 0x0600 / 257, 0x8080 / 257)],
        False,
        0,
        None,
    ),
    "png P": (png(2, [b"\1\0"], 8, 3, PLTE=PALETTE), [(200, 100, 50), (10, 20, 30)], False, 0, None),
    "png P one clear": (
        png(2, [b"\1\0"], 8, 3, PLTE=PALETTE, tRNS=b"\0"),
        [(200, 100, 50, 255), (10, 20, 30, 0)],
        False,
        0,
        None,
    ),
    "png P half clear": (
        png(2, [b"\x40"], 1, 3, PLTE=PALETTE, tRNS=b"\x64\xc8"),
        [(10, 20, 30, 100), (200, 100, 50, 200)],
        False,
        0,
        None,
    ),
    "tiff 1 white 0": (tiff_of(2, 1, 1, 0, b"\x40"), [W, K], True, 0, None),
    "tiff I;16": (tiff_of(2, 1, 16, 1, b"\x2c\1\xff\xff"), [(300 / 257,) * 3, W], True, 0, None),
    "tiff I;16 white 0": (tiff_of(2, 1, 16, 0, b"\x2c\1\xff\xff"), [((65535 - 300) / 257,) * 3, K], True, 0, None),
    "tiff 12 bits": (tiff_of(2, 1, 12, 1, b"\xff\xf8\0\0"), [W, (2048 * 255 / 4095,) * 3], True, 0, None),
    "tiff I": (tiff_of(2, 1, 32, 1, struct.pack("<II", 300, 65535)), [(300 / 257,) * 3, W], True, 0, "integers"),
    "tiff RGB 16": (tiff_of(2, 1, (16,) * 3, 2, DEEP_LITTLE), DEEP_SEEN, False, 0, None),
    "tiff planes": (
        tiff(
            {256: 2, 257: 1, 258: (8,) * 3, 259: 1, 262: 2, 277: 3, 284: 2, 273: (8, 10, 12), 279: (2, 2, 2)},
            b"\1\4\2\5\3\6",
        ),
        [(1, 2, 3), (4, 5, 6)],
        False,
        0,
        None,
    ),
    "tiff RGBa": (
        tiff_of(2, 1, (8,) * 4, 2, b"\x40\x20\0\x80\1\2\3\xff", extra=1),
        [(128, 64, 0, 128), (1, 2, 3, 255)],
        False,
        1,
        None,
    ),
    "tiff La": (
        tiff_of(2, 1, (8, 8), 1, b"\x40\x80\xc8\xff", extra=1),
        [(128, 128, 128, 128), (200, 200, 200, 255)],
        True,
        1,
        None,
    ),
    "tiff PA": (
        tiff_of(2, 1, (8, 8), 3, b"\0\x33\1\xff", extra=2, palette=PALETTE_16),
        [(10, 20, 30, 51), (200, 100, 50, 255)],
        False,
        0,
        None,
    ),
    # (255 - C)(255 - K) / 255
    "tiff CMYK": (
        tiff_of(2, 1, (8,) * 4, 5, b"\xff\0\x66\0\0\x33\0\x80"),
        [(0, 255, 153), (127, 102, 127)],
        False,
        1,
        None,
    ),
    "tiff CMYK 16": (
        tiff_of(2, 1, (16,) * 4, 5, struct.pack("<8H", 65535, 0, 0x66FF, 0, 0, 0, 0, 0)),
        [(0, 255, 153), W],
        False,
        1,
        "16 bits",
    ),
    # by the definitions of CIELAB and sRGB, white D50 (Bradford): L*a*b* = 50.2, 0, 0 and 60, 20, -30
    "tiff LAB": (
        tiff_of(2, 1, (8,) * 3, 8, struct.pack("BbbBbb", 128, 0, 0, 153, 20, -30)),
        [(119.4,) * 3, (159.5, 133.4, 197.9)],
        False,
        1,
        None,
    ),
    "tiff two pages": (tiff_of(2, 1, 8, 1, b"\7\x09", pages=2), [(7,) * 3, (9,) * 3], True, 0, "first"),
    "ppm 16": (b"P6 2 1 65535\n" + DEEP_RGB, HIGH_SEEN, False, 1, "16 bits"),
    "pgm 16": (b"P5 2 1 65535\n" + u16(300, 65535), [(300 / 257,) * 3, W], True, 0, None),
    "pgm 10 bits": (b"P5 2 1 1023\n" + u16(1023, 341), [W, (85,) * 3], True, 0, None),
    "pbm": (b"P4 2 1\n\x40", [W, K], True, 0, None),
}


@pytest.mark.parametrize("name", FILES)
def test_reads_every_kind(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, expected, grey, levels, warning = FILES[name]
    if name == "tiff La" and ("La", "La") not in OPEN_INFO.values():
        pytest.skip("this Pillow refuses it")
    seen = read_picture(stored(tmp_path / "x.bin", data))
    assert seen.pixels.dtype == torch.float32 and seen.pixels.is_contiguous()
    assert seen.pixels.shape == (1, 2, len(expected[0]))
    assert seen.grey == grey and (seen.icc_profile is None or name == "tiff LAB")
    torch.testing.assert_close(
        seen.pixels, torch.tensor([expected], dtype=torch.float32) / 255, atol=levels * ONE_LEVEL + EXACT, rtol=0
    )
    said = complaints(caplog)
    assert len(said) == (warning is not None) and all(warning in text and "x.bin" in text for text in said)
    assert find_pictures([tmp_path / "x.bin"]) == [tmp_path / "x.bin"]


@pytest.mark.parametrize("mode", ["L", "RGB", "YCbCr", "CMYK"])
def test_reads_jpeg(mode: str, tmp_path: Path) -> None:
    """A flat picture survives JPEG within a few levels; CMYK is stored inverted (Adobe) and read back right."""
    colour = {"L": 90, "RGB": (200, 100, 50), "YCbCr": (124, 86, 182), "CMYK": (0, 127, 191, 55)}[mode]
    shown = (90, 90, 90) if mode == "L" else (200, 100, 50)
    path = saved(tmp_path / "x.jpg", Image.new(mode, (16, 8), colour), quality=95)
    seen = read_picture(path)
    assert seen.grey == (mode == "L")
    assert (seen.pixels * 255 - torch.tensor(shown)).abs().max() <= 4


VALUES = np.random.default_rng(0).integers(0, 256, (128, 128, 4), np.uint8)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("suffix", [".jp2", ".j2k", ".tga", ".dds", ".ico", ".icns", ".pcx", ".sgi", ".qoi", ".psd"])
def test_reads_what_load_image_reads(
    suffix: str, alpha: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, values = tmp_path / f"x{suffix}", VALUES if alpha else VALUES[..., :3]
    if alpha and suffix in (".pcx", ".psd"):
        pytest.skip("Pillow reads none")
    if suffix == ".psd":
        stored(path, psd(values))
    else:
        try:
            options = {".ico": {"sizes": [(32, 32), (128, 128)]}, ".icns": {"append_images": []}}.get(suffix, {})
            saved(path, Image.fromarray(values), **options)
        except (KeyError, OSError, ValueError) as error:
            pytest.skip(f"this Pillow writes none: {error}")
    assert path.suffix in SUFFIXES
    seen = read_picture(path).pixels.numpy() * 255
    if suffix == ".icns":  # which has it in several sizes, of which the largest is taken
        assert seen.shape[0] > 128
        seen = np.asarray(Image.fromarray(seen.round().astype(np.uint8)).resize((128, 128), Image.Resampling.BOX))
        assert abs(seen[..., :3].astype(int) - values[..., :3]).mean() < 40
    else:
        assert np.array_equal(seen.round()[..., : values.shape[2]], values)
    assert complaints(caplog) == []


@pytest.mark.parametrize("name", ["sgi", "sgi 16", "sgi rle 16", "bmp 565", "pfm"])
def test_tells_what_is_lost(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values, path = np.full((2, 3, 3), 90, np.uint8), tmp_path / "x"
    if name.startswith("sgi"):
        Image.fromarray(values).save(path, "SGI", bpc=2 if "16" in name else 1)
        if "rle" in name:
            data = path.read_bytes()
            row = u16(0x0003, 0x5A5A, 0)  # three of one value, the end
            table = struct.pack(">6I", *[512 + 48] * 6) + struct.pack(">6I", *[len(row)] * 6)
            path.write_bytes(data[:2] + b"\1" + data[3:512] + table + row)
    elif name == "bmp 565":
        head = struct.pack("<IiiHHIIiiII", 40, 3, 2, 1, 16, 3, 16, 0, 0, 0, 0) + struct.pack("<3I", 0xF800, 0x7E0, 0x1F)
        stored(path, b"BM" + struct.pack("<IHHI", 82, 0, 0, 66) + head + bytes(16))
    else:
        stored(path, b"Pf 1 1 -1.0\n" + struct.pack("<f", 0.5))
        with pytest.raises(PictureError) as error:
            read_picture(path)
        assert_one_sentence(error, "TIFF only", "16-bit .png")
        return
    assert read_picture(path).pixels.shape == (2, 3, 3)
    assert complaints(caplog) == ([f"{path}: 16 bits a channel are read as 8"] if "16" in name else [])


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_reads_interlaced_png(kind: type, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (9, 14, 3), kind)
    seen = read_picture(stored(tmp_path / "x.png", interlaced(values))).pixels.double().numpy()
    assert np.array_equal((seen * np.iinfo(kind).max).round(), values)


@pytest.mark.skipif("avif" not in features.get_supported(), reason="this Pillow has no AVIF")
@pytest.mark.parametrize("brand", [b"avif", b"mif1"])
def test_reads_avif(brand: bytes, tmp_path: Path) -> None:
    """Whether it calls itself AVIF first, or a picture container in general that AVIF is compatible with."""
    path = saved(tmp_path / "x.avif", Image.new("RGB", (16, 8), (200, 100, 50)), quality=100)
    data = path.read_bytes()
    assert data[4:12] == b"ftypavif" and b"avif" in data[16:40]
    seen = read_picture(stored(path, data[:8] + brand + data[12:]))
    assert seen.pixels.shape == (8, 16, 3)
    assert (seen.pixels * 255 - torch.tensor([200, 100, 50])).abs().max() <= 4


def test_reads_the_picture_of_a_jpeg_with_a_preview(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Cameras put a small copy or a depth map behind it (MPO): nothing that an artist would miss."""
    frames = [Image.new("RGB", size, colour) for size, colour in [((16, 8), (200, 100, 50)), ((8, 8), (0, 0, 0))]]
    path = tmp_path / "x.jpg"
    frames[0].save(path, format="MPO", save_all=True, append_images=frames[1:])
    seen = read_picture(path)
    assert seen.pixels.shape == (8, 16, 3)
    assert (seen.pixels * 255 - torch.tensor([200, 100, 50])).abs().max() <= 4
    assert complaints(caplog) == []


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_reads_compressed_tiff(compression: str, tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
    path = saved(tmp_path / "x.tif", Image.fromarray(values), compression=compression)
    assert np.array_equal(read_picture(path).pixels.numpy(), values.astype(np.float32) / 255)


def test_white_is_zero_16_bits_compressed_and_big_endian(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[300, 65535]], np.uint16))
    path = saved(tmp_path / "x.tif", image, compression="tiff_lzw")
    assert read_picture(path).pixels[0, :, 0].tolist() == pytest.approx([300 / 65535, 1])
    big = b"MM\0*\0\0\0\x0c" + u16(300, 65535)
    tags = [(256, 2), (257, 1), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 4)]
    big += struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHIHH", t, 3, 1, v, 0) for t, v in tags) + bytes(4)
    assert read_picture(stored(path, big)).pixels[0, :, 0].tolist() == pytest.approx([300 / 65535, 1])


# The EXIF rule: which side of the visual picture the stored row 0 and column 0 are.
UPRIGHT = [[10, 80, 120], [160, 200, 240]]
(A, B, C), (D, E, F) = UPRIGHT
STORED = {
    1: [[A, B, C], [D, E, F]],  # top, left
    2: [[C, B, A], [F, E, D]],  # top, right
    3: [[F, E, D], [C, B, A]],  # bottom, right
    4: [[D, E, F], [A, B, C]],  # bottom, left
    5: [[A, D], [B, E], [C, F]],  # left, top
    6: [[C, F], [B, E], [A, D]],  # right, top
    7: [[F, C], [E, B], [D, A]],  # right, bottom
    8: [[D, A], [E, B], [F, C]],  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".tif", ".lzw.tif", ".16.png"])
def test_reads_upright(suffix: str, orientation: int, tmp_path: Path) -> None:
    grey = np.array(STORED[orientation], np.uint8)
    path = tmp_path / f"x{suffix}"
    if suffix == ".16.png":
        rows = [u16(*[int(v) * 257 for v in row]) for row in grey]
        stored(path, png(grey.shape[1], rows, 16, 0, eXIf=exif(orientation)))
    elif suffix == ".png":
        stored(path, png(grey.shape[1], [bytes(row) for row in grey], 8, 0, eXIf=exif(orientation)))
    elif path.suffix == ".tif":
        lzw = {"compression": "tiff_lzw"} if suffix == ".lzw.tif" else {}
        saved(path, Image.fromarray(grey), tiffinfo={274: orientation}, **lzw)
    else:
        big = Image.fromarray(np.kron(grey, np.ones((8, 8), np.uint8)))
        saved(path, big.convert("RGB"), exif=b"Exif\0\0" + exif(orientation), quality=100)
    seen = read_picture(path).pixels[..., 1] * 255
    if suffix in (".webp", ".jpg"):
        seen = seen[4::8, 4::8]
    torch.testing.assert_close(seen, torch.tensor(UPRIGHT, dtype=torch.float32), atol=4.0, rtol=0)


BIG = np.random.default_rng(0).bytes(1_200_000)
XMP = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation="3"/>'
NOTES = {  # what an intact picture may have beside it
    "profile": chunk(b"iCCP", iccp(linear_rgb_profile(junk=BIG))),
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21))),
    "iTXt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(2**21))),
    "tEXt": chunk(b"tEXt", b"Comment\0" + b"x" * 2**21),
    "texts": chunk(b"tEXt", b"Comment\0" + b"x" * 2**20) * 70,
    "checksum": chunk(b"tEXt", b"Comment\0x")[:-1] + b"?",
    "checksum of a time": chunk(b"tIME", bytes(7))[:-1] + b"?",
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", NOTES)
def test_notes_do_not_damage_a_picture(
    name: str, behind: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = png(2, [b"\1\2\3\xfa\xfb\xfc"], 8, 2, iTXt=XMP)
    place = len(plain) - 12 if behind else 33  # before IEND, or behind IHDR
    path = stored(tmp_path / "x.png", plain[:place] + NOTES[name] + plain[place:])
    seen = read_picture(path)
    assert (seen.pixels * 255).round().tolist() == [[[250, 251, 252], [1, 2, 3]]]  # turned, as its other text says
    assert complaints(caplog) == ([f"{path}: damaged parts of it are left out: tIME"] if "time" in name else [])
    assert find_pictures([path]) == [path]
    if name == "profile":
        assert seen.icc_profile is not None and seen.icc_profile.endswith(BIG)


def test_damage_in_what_must_be_there_is_still_damage(tmp_path: Path) -> None:
    whole = png(2, [b"\1\2\3\xfa\xfb\xfc"], 8, 2, tEXt=b"Comment\0x")
    place = whole.index(b"IDAT") + 12
    for data in (whole[:place] + b"?" + whole[place + 1 :], whole[:50], whole[:34], whole[: whole.index(b"IDAT")]):
        with pytest.raises(PictureError):
            read_picture(stored(tmp_path / "x.png", data))


def test_a_preview_is_not_taken_for_the_picture(tmp_path: Path) -> None:
    """A raw file or a TIFF whose first picture calls itself a small copy of another; a lone one is what there is."""
    tags = {256: 2, 257: 1, 258: 8, 259: 1, 262: 1, 277: 1}
    for more, pages in (({254: 1, 330: 99999}, 1), ({254: 1}, 2), ({255: 2}, 2)):
        with pytest.raises(PictureError) as error:
            read_picture(stored(tmp_path / "x.dng", tiff(tags | more, b"\7\x09", pages)))
        assert_one_sentence(error, "small preview", "as .png")
    for more, pages in (({254: 1}, 1), ({254: 2}, 2), ({255: 1}, 1)):
        assert read_picture(stored(tmp_path / "x.tif", tiff(tags | more, b"\7\x09", pages))).grey


def test_unreadable_exif_is_upright(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = stored(tmp_path / "x.png", png(2, [b"\7\x09"], 8, 0, eXIf=b"nonsense in here"))
    assert read_picture(path).pixels[0, :, 0].tolist() == pytest.approx([7 / 255, 9 / 255])
    assert any("EXIF" in text for text in complaints(caplog))


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_first_frame(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
    options = {"lossless": True} if suffix == ".webp" else {}
    path = saved(tmp_path / f"x{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    assert (read_picture(path).pixels[..., :3] == torch.tensor([1.0, 0, 0])).all()
    assert len(complaints(caplog)) == 1 and "first" in complaints(caplog)[0]


def test_gif_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    seen = read_picture(saved(tmp_path / "x.gif", image, transparency=1))
    assert (seen.pixels * 255).round().tolist() == [[[10, 20, 30, 255], [200, 100, 50, 0]]]


# ---------------------------------------------------------------- colour profiles


def test_profiles_of_the_same_space_are_carried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grey, colour = grey_profile(), rgb_profile()
    files = {"grey": png(1, [b"\7"], 8, 0, iCCP=iccp(grey)), "rgb": png(1, [b"\1\2\3"], 8, 2, iCCP=iccp(colour))}
    files["palette"] = png(1, [b"\0"], 8, 3, PLTE=PALETTE, iCCP=iccp(colour))
    files["deep"] = png(1, [u16(700)], 16, 0, iCCP=iccp(grey))
    for name, data in files.items():
        seen = read_picture(stored(tmp_path / f"{name}.png", data))
        assert seen.icc_profile == (grey if seen.grey else colour), name
        for suffix in (".png", ".jpg", ".tif", ".webp"):
            if seen.grey and suffix == ".webp":
                continue
            write_picture(tmp_path / f"out{suffix}", seen)
            assert Image.open(tmp_path / f"out{suffix}").info["icc_profile"] == seen.icc_profile
            assert Image.open(tmp_path / f"out{suffix}").mode.startswith(("L", "I;16") if seen.grey else "RGB")
    assert complaints(caplog) == []


@pytest.mark.parametrize("kind", ["rgb in grey", "grey in rgb", "cmyk in rgb", "noise", "cut", "header only"])
def test_other_profiles_are_left_out(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    colour = rgb_profile()
    profile = {
        "rgb in grey": colour,
        "grey in rgb": grey_profile(),
        "cmyk in rgb": cmyk_profile(),
        "noise": np.random.default_rng(0).bytes(500),
        "cut": colour[:200],
        "header only": colour[:100],
    }[kind]
    data = png(1, [b"\7"], 8, 0, iCCP=iccp(profile)) if kind == "rgb in grey" else None
    path = stored(tmp_path / "x.png", data or png(1, [b"\1\2\3"], 8, 2, iCCP=iccp(profile)))
    assert read_picture(path).icc_profile is None
    assert len(complaints(caplog)) == 1 and "ICC" in complaints(caplog)[0]
    write_picture(path, Picture(torch.zeros(1, 1, 3), profile, kind == "rgb in grey"))
    assert "icc_profile" not in Image.open(path).info
    assert len(complaints(caplog)) == 2


@pytest.mark.parametrize("suffix", [".tif", ".jpg"])
def test_cmyk_through_its_profile(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Relative to the paper, with the profile's black moved to black: Y' = (Y - Yk) / (1 - Yk).

    Yk = 0.0299 (L* = 20), cyan Y = 0.1858 (L* = 50.2): Y' = 0.1607, sRGB 111.7; plain conversion has (0, 255, 255).
    """
    path = tmp_path / f"x{suffix}"
    image = Image.new("CMYK", (24, 8), (0, 0, 0, 0))
    image.paste((255, 0, 0, 0), (8, 0, 16, 8))
    image.paste((0, 0, 0, 255), (16, 0, 24, 8))
    saved(path, image, icc_profile=cmyk_profile(), **({"quality": 100} if suffix == ".jpg" else {}))
    seen = read_picture(path)
    expected = torch.tensor([[255.0] * 3, [111.7] * 3, [0.0] * 3])
    torch.testing.assert_close(seen.pixels[4, 4::8] * 255, expected, atol=2.0, rtol=0)
    assert seen.icc_profile is not None and seen.icc_profile[16:20] == b"RGB " and not seen.grey
    assert seen.icc_profile[24:36] == u16(2000, 1, 1, 0, 0, 0)  # not the time of reading
    write_picture(tmp_path / "out.png", seen)
    assert "sRGB" in ImageCms.getProfileDescription(io.BytesIO(Image.open(tmp_path / "out.png").info["icc_profile"]))
    assert complaints(caplog) == []


@pytest.mark.parametrize("profile", [b"no profile", rgb_profile()])
def test_cmyk_with_a_useless_profile(profile: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path / "x.tif", Image.new("CMYK", (1, 1), (255, 0, 0, 0)), icc_profile=profile)
    seen = read_picture(path)
    assert seen.icc_profile is None and seen.pixels.tolist() == [[[0.0, 1.0, 1.0]]]
    assert len(complaints(caplog)) == 1


def test_without_little_cms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    paths = [
        saved(tmp_path / "cmyk.tif", Image.new("CMYK", (1, 1), (255, 0, 0, 0)), icc_profile=cmyk_profile()),
        saved(tmp_path / "rgb.png", Image.new("RGB", (1, 1), (0, 255, 255)), icc_profile=rgb_profile()),
    ]

    def missing(*_: object, **__: object) -> None:
        raise ImportError("the _imagingcms C module is not installed")

    monkeypatch.setattr(ImageCms, "ImageCmsProfile", missing)
    monkeypatch.setattr(ImageCms, "createProfile", missing)
    for path in paths:
        seen = read_picture(path)
        assert seen.icc_profile is None and seen.pixels.tolist() == [[[0.0, 1.0, 1.0]]]
    assert len(complaints(caplog)) == 2


def test_formats_without_a_place_for_the_profile_get_srgb(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Linear light 0.5 is 0.7354 in sRGB: 12.92·x below, 1.055·x^(1/2.4) - 0.055 above."""
    expected = 187.5
    grey = Picture(torch.full((2, 2, 3), 0.5), grey_profile(), True)
    clear = Picture(torch.cat([grey.pixels, torch.full((2, 2, 1), 0.2)], 2), grey_profile(), True)
    colour = Picture(torch.full((2, 2, 3), 0.5), linear_rgb_profile(), False)
    for name, given, mode, has_profile in [
        ("grey.bmp", grey, "L", False),
        ("colour.bmp", colour, "RGB", False),
        ("grey.webp", grey, "RGB", True),
        ("clear.webp", clear, "RGBA", True),
    ]:
        write_picture(tmp_path / name, given)
        image = Image.open(tmp_path / name)
        assert image.mode == mode and ("icc_profile" in image.info) == has_profile
        assert np.asarray(image)[0, 0].ravel()[0] == pytest.approx(expected, abs=1.6)
        assert mode != "RGBA" or np.asarray(image)[0, 0, 3] == 51
        assert read_picture(tmp_path / name).grey == (mode == "L")
    write_picture(tmp_path / "same.webp", colour)
    assert Image.open(tmp_path / "same.webp").info["icc_profile"] == colour.icc_profile
    assert complaints(caplog) == []


# ---------------------------------------------------------------- files that cannot be read


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("0.png", b"", ["the file is empty"]),
        ("text.png", b"this is my picture, honestly\n" * 9, ["no picture", "PNG"]),
        ("one.png", b"P", ["no picture"]),
        ("magic.png", b"\x89PNG\r\n\x1a\n", ["damaged"]),
        ("float.tif", tiff_of(1, 1, 32, 1, struct.pack("<f", 1.5), format=3), ["from 1.5 to 1.5", "0 to 1"]),
        ("floats.tif", tiff_of(1, 1, (32,) * 3, 2, b"\xff" * 12, format=(3, 3, 3)), ["not finite"]),
        ("text.exr", b"\x76\x2f\x31\x01" + bytes(99), ["EXR", "16-bit .png"]),
        ("wide.tif", tiff_of(2, 1, 32, 1, struct.pack("<II", 3, 65536)), ["65536", "65535"]),
        ("unsigned.tif", tiff_of(2, 1, 32, 1, struct.pack("<II", 3, 2**32 - 1)), ["-1", "65535"]),
        ("signed.tif", tiff_of(2, 1, 16, 1, struct.pack("<hh", 3, -7), format=2), ["-7", "65535"]),
        (
            "huge.png",
            png(100000, [], 8, 2)[:8]
            + chunk(b"IHDR", struct.pack(">IIBBBBB", 100000, 99999, 8, 2, 0, 0, 0))
            + png(1, [bytes(3)], 8, 2)[33:],
            [f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels", "cut the picture"],
        ),
        ("flat.png", png(0, [b""], 8, 2), ["damaged"]),
        ("crc.png", png(1, [b"\7"], 8, 0).replace(b"\1\x08\0", b"\1\x10\0", 1), ["damaged"]),
    ],
)
def test_refuses(name: str, data: bytes, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(PictureError) as error:
        read_picture(stored(tmp_path / name, data))
    assert_one_sentence(error, str(tmp_path / name), *words)


def test_refuses_missing_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "no.png", tmp_path):
        with pytest.raises(PictureError) as error:
            read_picture(path)
        assert_one_sentence(error, str(path), "no such file")
    with pytest.raises(PictureError) as error:
        read_picture(tmp_path / ("x" * 300))
    assert_one_sentence(error)


@pytest.mark.parametrize("floats", [False, True], ids=["Pillow", "tifffile"])
def test_remarks_about_a_file_are_told_once(
    floats: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand tags of unknown types or with values that are not there: one sentence, not a line for each."""
    pixels, kind = (bytes(64), (32, 3)) if floats else (bytes(16), (8, 1))
    shape = [(256, 4), (257, 4), (258, kind[0]), (259, 1), (262, 1), (273, 8), (277, 1), (278, 4), (279, len(pixels))]
    tags = [(number, 4, 1, value) for number, value in (*shape, (339, kind[1]))]
    tags += [(50000 + i, (2, 77)[i % 2], 9, 0xFFFFFF00) for i in range(1000)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags))
    path = stored(tmp_path / "x.tif", head + entries + bytes(4))
    with warnings.catch_warnings(record=True) as left:
        warnings.simplefilter("always")
        assert find_pictures([path]) == [path]
        picture = read_picture(path)
    assert picture.pixels.shape == (4, 4, 3)
    assert not picture.pixels.any()
    assert left == []
    assert "".join(capfd.readouterr()) == ""
    (told,) = caplog.messages
    assert re.fullmatch(rf"{re.escape(str(path))}: is read, though .+ \(and \d+ more\)", told)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".lzw.tif", ".bmp", ".gif", ".ppm"])
def test_a_cut_file_is_refused_or_read_whole(suffix: str, tmp_path: Path) -> None:
    values = np.random.default_rng(2).integers(0, 256, (30, 40, 3), np.uint8)
    path = tmp_path / f"x{suffix}"
    saved(path, Image.fromarray(values), **({"compression": "tiff_lzw"} if suffix == ".lzw.tif" else {}))
    data, whole = path.read_bytes(), read_picture(path).pixels
    refused = 0
    for length in sorted({*range(0, 40, 3), *range(40, len(data), len(data) // 40), len(data) // 2}):
        stored(path, data[:length])
        try:
            assert torch.equal(read_picture(path).pixels, whole), length
        except PictureError:
            refused += 1
    assert refused >= 30


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp", ".gif", ".ppm"])
def test_scrambled_bytes_never_end_otherwise(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    path = tmp_path / f"x{suffix}"
    saved(path, Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)))
    data = np.frombuffer(path.read_bytes(), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own remarks about the damage
        for _ in range(120):
            scrambled = data.copy()
            places = rng.integers(4, min(len(data), 300), rng.integers(1, 6))
            scrambled[places] = rng.integers(0, 256, len(places))
            try:
                seen = read_picture(stored(path, scrambled.tobytes())).pixels
                assert seen.isfinite().all() and seen.min() >= 0 and seen.max() <= 1
            except PictureError:
                pass


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".lzw.tif", ".bmp", ".gif", ".ppm", ".webp"])
def test_pixel_limit(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to twice Pillow's setting, without a word; more is refused by Pillow."""
    allowed, beyond = tmp_path / f"allowed{suffix}", tmp_path / f"beyond{suffix}"
    options = {"compression": "tiff_lzw"} if suffix == ".lzw.tif" else {}
    saved(allowed, Image.new("RGB", (20, 10)), **options)
    saved(beyond, Image.new("RGB", (20, 11)), **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_pictures([allowed]) == [allowed]
        assert read_picture(allowed).pixels.shape[:2] == (10, 20)
        for refused in (lambda: read_picture(beyond), lambda: find_pictures([beyond])):
            with pytest.raises(PictureError) as error:
                refused()
            assert_one_sentence(error, str(beyond), "more than 200 pixels", "cut the picture into parts")
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_picture(beyond).pixels.shape[:2] == (11, 20)

"""Sixteen bits and floats in and out, and what a file says beside its pixels."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filebytes import assert_one_sentence, complaints, png, stored, tiff
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import IFDRational
from shell import one_line, run

from infdit.picture import Picture, PictureError, check_png, check_target, read_picture, write_picture
from infdit.picture.tiff import has_bigtiff

tifffile = pytest.importorskip("tifffile", reason="TIFF of more than 8 bits takes it")


def decoded(path: Path) -> NDArray[np.int64]:
    """(h, w, channels) of a PNG, by the format's rules and byte after byte."""
    data, place, packed = path.read_bytes(), 8, b""
    width, height, bits, colour = struct.unpack(">IIBB", data[16:26])
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        packed += data[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += length + 12
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    pixel, rows = channels * bits // 8, zlib.decompress(packed)
    stride, above, found = pixel * width, bytearray(pixel * width), bytearray()
    for start in range(0, height * (stride + 1), stride + 1):
        method, row = rows[start], bytearray(rows[start + 1 : start + 1 + stride])
        for i in range(stride):
            a, b, c = (row[i - pixel] if i >= pixel else 0), above[i], (above[i - pixel] if i >= pixel else 0)
            nearest = min((a, b, c), key=lambda guess: abs(a + b - c - guess))  # the first of equals
            row[i] = (row[i] + (0, a, b, (a + b) // 2, nearest)[method]) % 256
        found, above = found + row, row
    return np.frombuffer(bytes(found), f">u{bits // 8}").astype(np.int64).reshape(height, width, channels)


def kinds(test: Callable[..., None]) -> Callable[..., None]:
    """For colour and grey, with and without alpha."""
    test = pytest.mark.parametrize("grey", [False, True])(test)
    return pytest.mark.parametrize("channels", [3, 4])(test)


def picture(channels: int, grey: bool, bits: int) -> Picture:
    pixels = torch.rand(70, 21, channels, generator=torch.Generator().manual_seed(channels))
    pixels[:20] = torch.linspace(0, 0.99, 21)[:, None]  # where each filter has its say
    if grey:
        pixels[..., 1:3] = pixels[..., :1]
    return Picture(pixels, None, grey, bits=bits)


@kinds
@pytest.mark.parametrize("bits", [8, 16])
def test_png_by_rows_is_what_the_format_says(bits: int, channels: int, grey: bool, tmp_path: Path) -> None:
    given = picture(channels, grey, bits)
    write_picture(tmp_path / "x.png", given)
    white = 2**bits - 1
    expected = (given.pixels.double().numpy() * white + 0.5).astype(np.int64)
    seen = decoded(tmp_path / "x.png")
    assert abs(seen - (expected[..., 2:] if grey else expected)).max() <= (bits == 16)  # of halves float32 is not sure
    assert check_png(tmp_path / "x.png") == bits
    again = read_picture(tmp_path / "x.png")
    assert (again.bits, again.grey) == (bits, grey)
    assert np.array_equal((again.pixels.double().numpy() * white).round()[..., 2 if grey else 0 :], seen)


@pytest.mark.parametrize("interlaced", [False, True])
def test_sixteen_bits_of_a_png_made_by_hand(interlaced: bool, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (1, 1, 4))
    data = bytearray(png(1, [values.astype(">u2").tobytes()], 16, 6))
    if interlaced:  # of a single pixel all passes but the first are empty
        data[28], data[29:33] = 1, b""
        data[29:29] = struct.pack(">I", zlib.crc32(data[12:29]))
    seen = read_picture(stored(tmp_path / "x.png", bytes(data)))
    assert seen.bits == 16
    assert np.array_equal((seen.pixels.double().numpy() * 65535).round(), values)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("kind", ["u2", "f2", "f4", "f8"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_deep_tiff_of_other_programs(channels: int, kind: str, planes: bool, order: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(channels)
    values = (rng.integers(0, 65536, (5, 7, channels)) / 65535).astype(kind) if kind != "u2" else None
    values = rng.integers(0, 65536, (5, 7, channels), np.uint16) if values is None else values
    laid = values[..., 0] if channels == 1 else np.moveaxis(values, 2, 0).copy() if planes else values
    tifffile.imwrite(
        tmp_path / "x.tif", laid, byteorder=order, photometric="rgb" if channels > 1 else "minisblack",
        planarconfig=None if channels == 1 else "separate" if planes else "contig",
        extrasamples=["unassalpha"] if channels == 4 else None, compression="zlib" if planes else None,
    )  # fmt: skip
    seen = read_picture(tmp_path / "x.tif")
    expected = values.astype(np.float64) / (65535 if kind == "u2" else 1)
    assert seen.bits == (16 if kind == "u2" else 32)
    assert np.allclose(seen.pixels.numpy(), expected if channels > 1 else expected[..., [0, 0, 0]], rtol=0, atol=1e-7)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_sixteen_bits_of_compressed_grey_tiff_stay(compression: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (9, 8), np.uint16)
    Image.fromarray(values).save(tmp_path / "x.tif", compression=compression)
    assert np.array_equal((read_picture(tmp_path / "x.tif").pixels[..., 0].double() * 65535).round().numpy(), values)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_floats_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    """As Pillow turns the same picture of 8 bits."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3) / 255
    tag = [(274, 3, 1, orientation, True)]
    tifffile.imwrite(tmp_path / "f.tif", values, photometric="minisblack", extratags=tag)
    tifffile.imwrite(tmp_path / "b.tif", (values * 255).astype(np.uint8), photometric="minisblack", extratags=tag)
    floats, whole = read_picture(tmp_path / "f.tif").pixels, read_picture(tmp_path / "b.tif").pixels
    assert torch.allclose(floats, whole, atol=1e-6)


@kinds
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_tiff_keeps_what_it_is_given(bits: int, channels: int, grey: bool, tmp_path: Path) -> None:
    given = picture(channels, grey, bits)
    write_picture(tmp_path / "x.tif", given)
    values = tifffile.imread(tmp_path / "x.tif")
    assert values.dtype == {8: np.uint8, 16: np.uint16, 32: np.float32}[bits]
    again = read_picture(tmp_path / "x.tif")
    assert (again.bits, again.grey, again.pixels.shape) == (bits, grey, given.pixels.shape)
    assert (again.pixels - given.pixels).abs().max() <= (0.51 / (2**bits - 1) if bits < 32 else 1e-7)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.5), (-0.25, 1.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_floats_beyond_black_and_white_are_refused(low: float, high: float, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "x.tif", np.array([[low, high]], np.float32), photometric="minisblack")
    with pytest.raises(PictureError) as error:
        read_picture(tmp_path / "x.tif")
    assert_one_sentence(error, "0 to 1" if np.isfinite([low, high]).all() else "not finite")


def test_a_tiff_above_4_gib_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, given = Picture(torch.zeros(1, 1, 3).expand(40000, 40000, 3), None, False), picture(3, False, 16)
    with monkeypatch.context() as old:
        old.setattr("infdit.picture.writing.has_bigtiff", lambda: False)
        with pytest.raises(PictureError) as error:
            check_target(tmp_path / "x.tif", large)
        assert_one_sentence(error, "Pillow 11.2", ".png")
    if not has_bigtiff():
        pytest.skip("this Pillow writes none")
    check_target(tmp_path / "x.tif", large)
    monkeypatch.setattr("infdit.picture.tiff.CLASSIC", 1000)
    write_picture(tmp_path / "x.tif", given)
    assert (tmp_path / "x.tif").read_bytes()[:4] == b"II+\0"
    assert abs(tifffile.imread(tmp_path / "x.tif") / 65535 - given.pixels.numpy()).max() <= 0.51 / 65535
    assert (read_picture(tmp_path / "x.tif").pixels - given.pixels).abs().max() <= 0.51 / 65535


def test_without_tifffile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "in.tif", np.zeros((2, 2, 3), np.float32), photometric="rgb")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(PictureError) as error:
        read_picture(tmp_path / "in.tif")
    assert_one_sentence(error, "pip install tifffile")
    for bits in (8, 16, 32):
        write_picture(tmp_path / "x.tif", picture(3, False, bits))


def test_a_gradient_keeps_its_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the whole command, of both formats: at least 4,000 of 4,096 levels, and 256 of a PNG asked for 8 bits."""
    ramp = np.linspace(0, 65535, 4096).round().astype(np.uint16)
    stored(tmp_path / "in.png", png(4096, [np.repeat(ramp, 3).astype(">u2").tobytes()] * 3, 16, 2))
    tifffile.imwrite(tmp_path / "in.tif", np.repeat(ramp, 3).reshape(1, 4096, 3).repeat(3, 0), photometric="rgb")
    options = "--scale", 1, "--denoise", 0
    for source, target in (("in.png", "a.png"), ("in.png", "b.tif"), ("in.tif", "c.png"), ("in.tif", "d.tif")):
        assert run("upscale", tmp_path / source, "-o", tmp_path / target, *options) == 0
        values = tifffile.imread(tmp_path / target) if target.endswith("f") else decoded(tmp_path / target)
        assert len(np.unique(values[1, :, 1])) >= 4000, target
        assert abs(values[1].astype(int) - ramp[:, None]).max() <= 40  # of 65535: what resampling rounds
    assert run("upscale", tmp_path / "in.png", "-o", tmp_path / "e.png", *options, "--bits", 8) == 0
    assert check_png(tmp_path / "e.png") == 8
    capsys.readouterr()
    assert run("upscale", tmp_path / "in.png", "-o", tmp_path / "f.jpg", *options, "--bits", 16) == 2
    assert "holds 8 bits" in one_line(capsys)


@pytest.mark.parametrize("scale", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_gradient_keeps_its_levels_through_the_network(tmp_path: Path, scale: int) -> None:
    ramp = np.linspace(0, 65535, 4096).round().astype(np.uint16)
    stored(tmp_path / "in.png", png(4096, [np.repeat(ramp, 3).astype(">u2").tobytes()] * 5, 16, 2))
    command = "upscale", tmp_path / "in.png", "-o", tmp_path / "out.png", "--scale", scale
    assert run(*command, "--dtype", "fp32", "--device", "cpu") == 0
    values = decoded(tmp_path / "out.png")
    assert len(np.unique(values[len(values) // 2, :, 1])) >= 4000


def test_a_second_call_heeds_the_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not care how large a result is."""
    write_picture(tmp_path / "in.png", picture(3, False, 16))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 70 * 21)
    command = "upscale", tmp_path / "in.png", "-o", f"{tmp_path}/out/", "--scale", 2
    assert run(*command) == 0
    assert run(*command) == 0
    assert "1 there already" in capsys.readouterr().out
    assert run(*command, "--bits", 8) != 0
    assert "bits" in capsys.readouterr().err


# ---------------------------------------------------------------- what is said beside the pixels


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6" dc:creator="me"/></x:xmpmeta>'


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".16.png", ".16.tif"])
def test_date_camera_dpi_and_xmp_are_carried(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exif = Image.Exif()
    exif.update({270: "Zürich".encode(), 271: "Maker", 272: "Model 1", 306: "2026:01:02 03:04:05", 274: 6, 256: 9})
    exif[0x8769] = {36867: "2026:01:02 03:04:05", 33434: IFDRational(1, 250), 40962: 12}
    exif[0x8825] = {1: "N", 2: (47.0, 22.0, 12.5)}
    Image.new("RGB", (12, 9), (9, 99, 199)).save(tmp_path / "in.jpg", exif=exif, dpi=(240, 240), xmp=XMP)
    seen = read_picture(tmp_path / "in.jpg")
    path = tmp_path / f"out{suffix}"
    bits = 16 if ".16" in suffix else 8
    write_picture(path, Picture(seen.pixels, None, False, "", bits, seen.exif, seen.xmp, seen.dpi))
    assert read_picture(path).pixels.shape == (12, 9, 3)  # upright, and not turned a second time
    with Image.open(path) as image:
        found = image.getexif()
        assert (found[271], found[272], found[306]) == ("Maker", "Model 1", "2026:01:02 03:04:05")
        assert found[270].encode("latin-1") == "Zürich".encode()
        assert 274 not in found or found[274] == 1
        assert found.get_ifd(0x8769)[36867] == "2026:01:02 03:04:05"
        assert found.get_ifd(0x8769)[33434] == 1 / 250
        assert 40962 not in found.get_ifd(0x8769)
        assert found.get_ifd(0x8825)[2] == (47.0, 22.0, 12.5)
        if suffix != ".webp":
            assert image.info["dpi"] == pytest.approx((240, 240), abs=0.1)
        xmp = image.info.get("xmp") or image.info["XML:com.adobe.xmp"].encode()
        assert b'dc:creator="me"' in xmp and b'Orientation="6"' not in xmp
    assert complaints(caplog) == []


@pytest.mark.parametrize(("order", "big"), [("<", False), (">", False), ("<", True)])
@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
def test_what_a_tiff_says(order: str, kind: str, big: bool, tmp_path: Path) -> None:
    """Whoever reads it; how the array lay in that file is not said of the next."""
    said = {271: "Maker", 272: "Model 1", 306: "2026:01:02 03:04:05", 315: "me"}
    extra = [(n, 2, 0, text, True) for n, text in said.items()] + [(700, 1, len(XMP), XMP, True)]
    for description, kept in (("a cat", "a cat"), (None, None), ("ImageJ=1.53\nimages=3\n", None)):
        tifffile.imwrite(
            tmp_path / "x.tif", np.zeros((4, 5, 3), kind), photometric="rgb", byteorder=order, bigtiff=big,
            description=description, metadata=None if description else {}, extratags=extra, software=False,
        )  # fmt: skip
        seen, found = read_picture(tmp_path / "x.tif"), Image.Exif()
        found.load(seen.exif)
        assert dict(found) == said | ({270: kept} if kept else {})
        assert b"me" in seen.xmp


@pytest.mark.parametrize("suffix", [".png", ".tif", ".f4.tif"])
def test_xmp_that_readers_refuse_is_told(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, kind = tmp_path / f"x{suffix}", "f4" if "f4" in suffix else "u1"
    for size, left_out in ((2**20 - 1000, False), (2**20, True)):
        caplog.clear()
        xmp = b"<x/>" + b" " * size
        if suffix == ".png":
            text = {"iTXt": b"XML:com.adobe.xmp\0\0\0\0\0" + xmp}
            stored(path, png(1, [b"\7"], 8, 0, **text))
        else:
            tifffile.imwrite(path, np.zeros((1, 1), kind), extratags=[(700, 1, len(xmp), xmp, True)])
        assert read_picture(path).xmp == (b"" if left_out else xmp)
        assert len(complaints(caplog)) == left_out
        assert not left_out or "XMP" in complaints(caplog)[0]


@pytest.mark.parametrize(
    ("data", "package"), [(b"\0\0\0\x18ftypheic", "pillow-heif"), (b"\xff\x0a" + bytes(9), "pillow-jxl-plugin")]
)
def test_a_missing_plugin_is_named(data: bytes, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PictureError) as error:
        read_picture(stored(tmp_path / "x.heic", data))
    assert_one_sentence(error, f"pip install {package}")


@pytest.mark.parametrize(("module", "suffix"), [("pillow_heif", ".heic"), ("pillow_jxl", ".jxl")])
def test_a_plugin_reads(module: str, suffix: str, tmp_path: Path) -> None:
    plugin = pytest.importorskip(module)
    getattr(plugin, "register_heif_opener", lambda: None)()
    Image.new("RGB", (64, 48), (200, 100, 50)).save(tmp_path / f"x{suffix}", quality=95)
    seen = read_picture(tmp_path / f"x{suffix}").pixels
    assert seen.shape == (48, 64, 3)
    assert (seen * 255 - torch.tensor([200, 100, 50])).abs().max() < 5


def test_ten_bits_of_a_heic_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plugin = pytest.importorskip("pillow_heif")
    deep = np.full((16, 16, 3), 40_000, np.uint16)
    plugin.from_bytes(mode="RGB;16", size=(16, 16), data=deep.tobytes()).save(tmp_path / "x.heic", quality=-1)
    seen = read_picture(tmp_path / "x.heic")
    assert (seen.pixels - 40_000 / 65535).abs().max() < 3 / 255
    assert complaints(caplog) == [f"{tmp_path / 'x.heic'}: 10 bits a channel are read as 8"]


def test_a_float_tiff_by_hand(tmp_path: Path) -> None:
    values = (0.0, 0.25, 1.0, 0.5, 0.75, 0.125)
    tags = {256: 2, 257: 1, 258: (32,) * 3, 259: 1, 262: 2, 277: 3, 339: (3,) * 3}
    seen = read_picture(stored(tmp_path / "x.tif", tiff(tags, struct.pack("<6f", *values)))).pixels
    assert torch.equal(seen, torch.tensor(values).reshape(1, 2, 3))


@pytest.mark.parametrize(("unit", "dpi", "kept"), [(2, (300, 1), 300), (1, (1, 1), None), (2, (3 * 10**9, 1), None)])
def test_a_resolution_that_is_none_is_not_handed_on(
    unit: int, dpi: tuple[int, int], kept: float | None, tmp_path: Path
) -> None:
    path = tmp_path / "x.tif"
    pixels = np.full((4, 5, 3), 0.5, np.float32)
    tifffile.imwrite(path, pixels, photometric="rgb", resolution=(dpi, dpi), resolutionunit=unit)
    seen = read_picture(path)
    assert seen.dpi == ((kept, kept) if kept else None)
    write_picture(tmp_path / "x.png", seen)

"""Writing and finding picture files: what others read from them, limits, and nothing half written."""

import os
import warnings
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from filebytes import ONE_LEVEL, assert_one_sentence, cmyk_profile, complaints, linear_rgb_profile, png, saved, stored
from peaks import TELLS, growth
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from infdit.picture import SUFFIXES, Picture, PictureError, find_pictures, read_picture, write_picture

# ---------------------------------------------------------------- writing


def random_picture(seed: int, channels: int, grey: bool, height: int = 33, width: int = 21) -> Picture:
    pixels = torch.rand(height, width, channels, generator=torch.Generator().manual_seed(seed))
    if grey:
        pixels[..., 1:3] = pixels[..., :1]
    return Picture(pixels, None, grey)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("suffix", [".png", ".PNG", ".tif", ".tiff", ".webp", ".bmp"])
def test_round_trip(suffix: str, channels: int, grey: bool, tmp_path: Path) -> None:
    for seed in range(3):
        given = random_picture(seed, channels, grey, height=300 if seed == 0 else 7)
        write_picture(tmp_path / f"x{suffix}", given)
        seen = read_picture(tmp_path / f"x{suffix}")
        expected = given.pixels
        if suffix == ".bmp" and channels == 4:
            expected = expected[..., :3] * expected[..., 3:] + 1 - expected[..., 3:]
        assert seen.pixels.shape == expected.shape
        assert (seen.pixels - expected).abs().max() <= 1 / 510 + 1e-6
        assert seen.grey == (grey and suffix != ".webp") and seen.icc_profile is None


def test_files_are_what_they_are_called(tmp_path: Path) -> None:
    modes = {
        ".png": ("PNG", ["RGB", "RGBA", "L", "LA"]),
        ".tif": ("TIFF", ["RGB", "RGBA", "L", "LA"]),
        ".webp": ("WEBP", ["RGB", "RGBA", "RGB", "RGBA"]),
        ".jpg": ("JPEG", ["RGB", "RGB", "L", "L"]),
        ".jpeg": ("JPEG", ["RGB", "RGB", "L", "L"]),
        ".bmp": ("BMP", ["RGB", "RGB", "L", "L"]),
    }
    for suffix, (name, expected) in modes.items():
        for mode, (grey, channels) in zip(expected, [(0, 3), (0, 4), (1, 3), (1, 4)], strict=True):
            write_picture(tmp_path / f"x{suffix}", random_picture(0, channels, bool(grey)))
            image = Image.open(tmp_path / f"x{suffix}")
            assert (image.format, image.mode) == (name, mode)


def test_rounds_half_up_and_clamps(tmp_path: Path) -> None:
    values = [-3.0, -0.001, 0.4 / 255, 0.6 / 255, 126.5 / 255, 127.5 / 255, 254.4 / 255, 254.6 / 255, 1.001, 7.0]
    expected = [0, 0, 0, 1, 127, 128, 254, 255, 255, 255]
    write_picture(tmp_path / "x.png", Picture(torch.tensor(values)[None, :, None].expand(1, 10, 3), None, False))
    assert np.asarray(Image.open(tmp_path / "x.png"))[0, :, 1].tolist() == expected
    write_picture(tmp_path / "x.png", Picture(torch.tensor([[[0.0, 0.2, 1.0]]]), None, True))
    assert np.asarray(Image.open(tmp_path / "x.png")).tolist() == [[102]]  # the mean


def test_a_profile_that_readers_of_png_refuse_becomes_srgb(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the definition of sRGB's curve; what can be carried, is."""
    given = random_picture(0, 4, False)
    for size, kept in ((2**20 - 2000, True), (2**20, False)):
        profile = linear_rgb_profile(junk=bytes(size))
        caplog.clear()
        for suffix in (".png", ".jpg", ".tif", ".webp"):
            write_picture(tmp_path / f"x{suffix}", Picture(given.pixels[..., :3], profile, False))
            with Image.open(tmp_path / f"x{suffix}") as image:
                assert (image.info["icc_profile"] == profile) == (kept or suffix != ".png")
        assert len(complaints(caplog)) == (not kept)
    linear = (given.pixels[..., :3] * 255).add(0.5).floor() / 255
    expected = torch.where(linear < 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert (read_picture(tmp_path / "x.png").pixels - expected).abs().max() < 2.5 / 255


def test_jpeg_quality_and_sampling(tmp_path: Path) -> None:
    given = random_picture(5, 3, False, 32, 32)
    write_picture(tmp_path / "x.jpg", given)
    image = Image.open(tmp_path / "x.jpg")
    assert isinstance(image, JpegImageFile)
    # the standard's first luminance step is 16; quality 95 scales it by (200 - 2·95)/100
    assert image.quantization[0][0] == 2 and image.layer[0][1:3] == (1, 1)
    rough = tmp_path / "rough.jpg"
    Image.fromarray((given.pixels.numpy() * 255).astype(np.uint8)).save(rough, quality=95, subsampling=2)
    error = [(read_picture(path).pixels - given.pixels).abs().mean() for path in (tmp_path / "x.jpg", rough)]
    assert error[0] < error[1] / 3


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_transparency_is_laid_over_white(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = torch.zeros(8, 16, 4)  # two of JPEG's blocks
    pixels[..., 0], pixels[..., 3], pixels[:, :8, 3] = 1.0, 0.4, 1.0
    write_picture(tmp_path / f"x{suffix}", Picture(pixels, None, False))
    torch.testing.assert_close(
        read_picture(tmp_path / f"x{suffix}").pixels[4, 12], torch.tensor([1.0, 0.6, 0.6]), atol=2 * ONE_LEVEL, rtol=0
    )
    assert len(complaints(caplog)) == 1 and "white" in complaints(caplog)[0]
    pixels[..., 3] = 1.0
    write_picture(tmp_path / f"x{suffix}", Picture(pixels, None, False))
    assert len(complaints(caplog)) == 1  # nothing is lost where nothing is clear


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0, 0), (299, 1, 3)])
def test_refuses_values_that_are_no_numbers(
    suffix: str, value: float, place: tuple[int, int, int], tmp_path: Path
) -> None:
    given = random_picture(0, 4, False, 300, 2)
    given.pixels[place] = value
    with pytest.raises(PictureError) as error:
        write_picture(tmp_path / f"x{suffix}", given)
    assert_one_sentence(error, "finite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("suffix", "limit"), [(".jpg", 65500), (".jpeg", 65500), (".webp", 16383)])
@pytest.mark.parametrize("turn", [False, True])
def test_side_limits(suffix: str, limit: int, turn: bool, tmp_path: Path) -> None:
    for side in (limit, limit + 1):
        pixels = torch.zeros(1, side, 3) if turn else torch.zeros(side, 1, 3)
        path = tmp_path / f"{side}{suffix}"
        if side == limit:
            write_picture(path, Picture(pixels, None, False))
            assert max(Image.open(path).size) == limit
        else:
            with pytest.raises(PictureError) as error:
                write_picture(path, Picture(pixels, None, False))
            assert_one_sentence(error, str(limit), "save as .png")
            assert not path.exists()


@pytest.mark.parametrize("suffix", [".bmp"])
def test_four_gibibytes(suffix: str, tmp_path: Path) -> None:
    pixels = torch.zeros(1, 1, 3).expand(40000, 40000, 3)  # no memory behind it
    with pytest.raises(PictureError) as error:
        write_picture(tmp_path / f"x{suffix}", Picture(pixels, None, False))
    assert_one_sentence(error, "4 GiB", "save as .png")


def test_refuses_targets(tmp_path: Path) -> None:
    given = random_picture(0, 3, False)
    (tmp_path / "folder.png").mkdir()
    for name, words in {
        "x.gif": [".gif", ".png .jpg .jpeg .webp .tif .tiff .bmp"],
        "x": ["no ending", ".png"],
        "nowhere/x.png": ["folder"],
        "folder.png": ["folder"],
    }.items():
        with pytest.raises(PictureError) as error:
            write_picture(tmp_path / name, given)
        assert_one_sentence(error, str(tmp_path / name), *words)
    for pixels in (torch.zeros(3, 4), torch.zeros(3, 4, 2), torch.zeros(0, 4, 3), torch.zeros(2, 2, 3).byte()):
        with pytest.raises(PictureError) as error:
            write_picture(tmp_path / "x.png", Picture(pixels, None, False))
        assert_one_sentence(error)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("old", [None, b"what was there"])
@pytest.mark.parametrize("name", ["x.png", "x.webp"])
def test_all_or_nothing(
    failure: BaseException, old: bytes | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    if old:
        stored(path, old)

    def save(_self: Image.Image, file: IO[bytes], **_: object) -> None:
        file.write(b"half a picture")
        raise failure

    def full() -> None:
        raise failure

    monkeypatch.setattr(Image.Image, "save", save)
    monkeypatch.setattr(zlib, "compressobj", full)  # of PNG
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else PictureError) as error:
        write_picture(path, random_picture(0, 3, False))
    if isinstance(failure, OSError):
        assert_one_sentence(error, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ([name] if old else [])
    assert not old or path.read_bytes() == old


def test_target_is_replaced_whole_and_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored(tmp_path / "x.png", b"what was there")
    moved, replace = [], Path.replace

    def watched(self: Path, target: Path) -> Path:
        moved.append((self, path.read_bytes()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    write_picture(path, random_picture(0, 3, False))
    [(part, before)] = moved
    assert part.parent.parent == tmp_path and before == b"what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"] and Image.open(path).size == (21, 33)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_picture(tmp_path / "x.png", random_picture(0, 3, False))
    finally:
        os.umask(old)
    assert (tmp_path / "x.png").stat().st_mode & 0o777 == 0o640


def test_long_names_and_other_dtypes(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".png")
    given = random_picture(0, 3, False)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        write_picture(path, Picture(given.pixels.to(dtype).requires_grad_(), None, False))
        assert (read_picture(path).pixels - given.pixels).abs().max() < 1 / 100


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path) -> None:
    image = saved(tmp_path / "x.tif", Image.new("CMYK", (3, 3), (9, 8, 7, 6)), icc_profile=cmyk_profile())
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / name, read_picture(image))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.skipif(not TELLS, reason="the system tells no peak")
@pytest.mark.parametrize("profile", [False, True])
@pytest.mark.parametrize(("suffix", "bits"), [(".png", 8), (".tif", 8), (".tif", 16)])
def test_written_by_rows(suffix: str, bits: int, profile: bool, tmp_path: Path) -> None:
    """No copy of a picture is made: of 36 MB, which are too many to be hidden among what was free already."""
    icc = linear_rgb_profile(junk=bytes(2**20)) if profile else None
    given = Picture(torch.rand(1, 1, 3).expand(30_000, 400, 3), icc, False, bits=bits)
    taken = growth(lambda: write_picture(tmp_path / f"x{suffix}", given))
    assert taken < 18 * 2**20
    with Image.open(tmp_path / f"x{suffix}") as image:
        assert image.size == (400, 30_000)


# ---------------------------------------------------------------- finding


def test_finds_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(1, [b"\7"], 8, 0)
    folder = tmp_path / "in"
    (folder / "deeper.png").mkdir(parents=True)
    stored(folder / "deeper.png" / "below.png", data)
    for name in ("b.PNG", "a.jpg", "c.webp", "notes.txt", ".hidden.png", "._c.webp"):
        stored(folder / name, data)
    alone = stored(tmp_path / "no_suffix", data)
    expected = [folder / "a.jpg", folder / "b.PNG", folder / "c.webp"]
    assert find_pictures([folder]) == expected
    assert find_pictures([alone, folder, alone, folder / "b.PNG"]) == [alone, *expected]
    assert find_pictures(iter([folder / "c.webp", folder])) == [folder / "c.webp", *expected[:2]]
    assert find_pictures([]) == []
    monkeypatch.chdir(tmp_path)
    assert find_pictures([Path("in/a.jpg"), folder / "a.jpg"]) == [Path("in/a.jpg")]
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in SUFFIXES)
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"} <= SUFFIXES


def test_finding_refuses(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    stored(tmp_path / "bare" / "notes.txt", b"words")
    for name, word in {"bare": ".png", "missing.png": "no such", "bare/notes.txt": "no picture"}.items():
        with pytest.raises(PictureError) as error:
            find_pictures([tmp_path / name])
        assert_one_sentence(error, str(tmp_path / name), word)


def test_nothing_is_set_for_the_process(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, warnings.filters[:]
    write_picture(tmp_path / "x.png", random_picture(0, 3, False))
    read_picture(tmp_path / "x.png")
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, warnings.filters[:])

"""The bundled model gives the pictures that it gave when it was trained, on photographs that are not shipped."""

import itertools
import math
import os
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

import infdit
from benchmarks import scores

PICTURES = Path(os.environ.get("INFDIT_TEST_PICTURES", Path(__file__).parents[2] / "shared" / "data"))
DATA = Path(__file__).parent / "data"
BICUBIC, TRAINED = 26.65, 28.07  # dB, measured when the model was bundled


def pictures(folder: str, pattern: str) -> list[Image.Image]:
    paths = sorted((PICTURES / folder).glob(pattern))
    if not paths:
        pytest.skip(f"no pictures in {PICTURES / folder}: set INFDIT_TEST_PICTURES to the folder that has {folder}/")
    return [Image.open(path).convert("RGB") for path in paths]


def luma_psnr(a: np.ndarray, b: np.ndarray) -> float:
    return scores.psnr(scores.luma(a), scores.luma(b), scores.BORDER)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image, dtype=np.float32))[None] / 255


def to_bytes(image: torch.Tensor) -> np.ndarray:
    return (image[0] * 255 + 0.5).to(torch.uint8).numpy()


def test_one_step_on_kodak_is_what_was_trained(capsys: pytest.CaptureFixture[str]) -> None:
    model = infdit.load_model("mini", device="cpu")
    found: dict[str, list[float]] = {"bicubic": [], "mini": []}
    for image in pictures("kodak", "*.png")[:8]:
        w, h = (min(side, 512) // 32 * 32 for side in image.size)
        original = image.crop((0, 0, w, h))
        low = original.resize((w // 4, h // 4), Image.Resampling.BICUBIC)
        enlarged = np.array(low.resize((w, h), Image.Resampling.BICUBIC))
        for name, result in (("bicubic", enlarged), ("mini", to_bytes(infdit.upscale(model, to_tensor(low), 4.0)))):
            found[name].append(luma_psnr(result, np.array(original)))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    with capsys.disabled():
        print(f"\nmini on kodak, {model.dtype}, dB: {means}", end="")
    assert means["bicubic"] == pytest.approx(BICUBIC, abs=0.01)
    assert means["mini"] == pytest.approx(TRAINED, abs=0.05)


@pytest.mark.parametrize("scale", [1.5, 2.0, 3.0, 3.9])
def test_below_four_it_is_nearer_to_the_original_than_any_interpolation(scale: float) -> None:
    photograph = Image.open(Path(__file__).parents[1] / "pictures" / "flowers.png").convert("RGB")
    original = photograph.crop((60, 60, 180, 180))
    side = round(120 / scale)
    low, model = original.resize((side, side), Image.Resampling.BICUBIC), infdit.load_model("mini", device="cpu")
    result = to_bytes(infdit.upscale(model, to_tensor(low), size=(120, 120)))
    kernels = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
    others = [luma_psnr(np.array(low.resize((120, 120), kernel)), np.array(original)) for kernel in kernels]
    assert luma_psnr(result, np.array(original)) > max(others) + 0.5


def test_seams_are_told_of_what_was_computed() -> None:
    """At ×2 they are those of ×4, which is made smaller."""
    model, image = infdit.load_model("mini", dtype=torch.float32, device="cpu"), torch.rand(1, 20, 24, 3)
    two, four = infdit.Report(), infdit.Report()
    infdit.upscale(model, image, 2.0, report=two)
    infdit.upscale(model, image, 4.0, report=four)
    assert two.seams == four.seams


def test_transparency_is_the_same_by_way_of_another_size() -> None:
    model, image = infdit.load_model("mini", dtype=torch.float32, device="cpu"), torch.rand(1, 12, 9, 4)
    result, plain = (infdit.upscale(model, image, 2.0, denoise=share) for share in (1.0, 0.0))
    assert torch.equal(result[..., 3], plain[..., 3])
    enlarged = F.interpolate(image[..., :3].movedim(-1, 1), scale_factor=2, mode="bicubic", antialias=True)
    opaque = infdit.upscale(model, image[..., :3], 2.0, denoise=0.0)
    assert (opaque - enlarged.clamp(0, 1).movedim(1, -1)).abs().max() < 1e-5  # without a step, the plain enlargement


def test_generated_pictures_keep_what_they_show() -> None:
    """Shrunk again, the result is the input: no shift, no change of colour, nothing lost."""
    model = infdit.load_model("mini", device="cpu")
    for image in pictures("generated", "*.jpg"):
        crop = to_tensor(image.crop((600, 300, 700, 380)))
        result = infdit.upscale(model, crop, 4.0)
        again = F.interpolate(result.movedim(-1, 1), (80, 100), mode="bicubic", antialias=True).movedim(1, -1)
        assert luma_psnr(to_bytes(again), to_bytes(crop)) > 35
        assert (result.mean((1, 2)) - crop.mean((1, 2))).abs().max() < 0.01


def test_generated_pictures_made_faithful_say_what_was_given() -> None:
    """At full fidelity: 60 dB and more in float, 50 through 8-bit files, no mean moved by a grey level."""
    model = infdit.load_model("mini", device="cpu")
    for image, scale in itertools.product(pictures("generated", "*.jpg"), (1.7, 4.0)):
        crop = to_tensor(image.crop((600, 300, 640, 332)))
        result = infdit.upscale(model, crop, scale, fidelity=1)
        for found, least in ((result, 60), ((255 * result).round() / 255, 50)):
            again = F.interpolate(found.movedim(-1, 1).double(), (32, 40), mode="bicubic", antialias=True)
            assert -10 * math.log10((again.movedim(1, -1) - crop).square().mean()) > least
        assert (result.mean((1, 2)) - crop.mean((1, 2))).abs().max() < 1 / 255


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 → what the bundled model makes of it, (4h, 4w, 3) as signed integers."""
    model = infdit.load_model("mini", device="cpu")
    return to_bytes(infdit.upscale(model, torch.from_numpy(pixels.astype(np.float32))[None] / 255)).astype(int)


@pytest.mark.parametrize("name", ["grey_stored_as_rgb.png", "black_text_on_white.png"])
def test_what_has_no_colour_gets_none(name: str) -> None:
    result = enlarged(np.asarray(Image.open(DATA / name).convert("RGB")))
    assert (result == result[..., :1]).all()


@pytest.mark.parametrize("name", ["grey_stored_as_rgb.png", "black_text_on_white.png"])
def test_grey_beside_colour_gets_none(name: str) -> None:
    """A stamp in a corner of a page does not tint its letters."""
    pixels = np.array(Image.open(DATA / name).convert("RGB"))
    pixels[:2, :2] = (255, 0, 0)
    inner = enlarged(pixels)[64:, 64:]
    assert (inner == inner[..., :1]).all()


def test_the_weights_know_grey(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rule that makes it exact a grey photograph is tinted by half a level in the mean, 8 at most."""
    monkeypatch.setattr(import_module("infdit.upscale"), "without_colour", lambda colour: None)
    result = enlarged(np.asarray(Image.open(DATA / "grey_stored_as_rgb.png").convert("RGB")))
    tint = result.max(-1) - result.min(-1)
    assert tint.mean() <= 0.7
    assert tint.max() <= 8


@pytest.mark.parametrize(
    "colour",
    [(255, 255, 255), (0, 0, 0), (128, 128, 128), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (200, 120, 60)],
)
def test_flat_colour_stays_flat(colour: tuple[int, int, int]) -> None:
    result = enlarged(np.broadcast_to(np.array(colour, np.uint8), (40, 48, 3)))
    assert np.abs(result - np.array(colour)).max() <= 1


def test_paper_stays_white() -> None:
    """Between and beside letters, a letter's height away from them: no halo, no tiles."""
    pixels = np.asarray(Image.open(DATA / "black_text_on_white.png").convert("RGB"))
    paper = Image.fromarray(pixels.min(-1)).resize((4 * pixels.shape[1], 4 * pixels.shape[0]), Image.Resampling.NEAREST)
    far = np.array(paper.filter(ImageFilter.MinFilter(41))) == 255
    assert far.mean() > 0.1, "the picture has paper"
    assert enlarged(pixels)[far].min() >= 254

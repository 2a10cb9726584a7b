"""The bundled model gives the pictures that it gave when it was trained, on photographs that are not shipped."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import infdit

PICTURES = Path(os.environ.get("INFDIT_TEST_PICTURES", Path(__file__).parents[2] / "shared" / "data"))
# dB by sigma_max, measured when the model was bundled; None: Pillow's bicubic
TRAINED = {None: 26.65, 1.0: 27.16, 2.0: 27.32, 5.0: 27.39, 40.0: 26.55}


def pictures(folder: str, pattern: str) -> list[Image.Image]:
    paths = sorted((PICTURES / folder).glob(pattern))
    if not paths:
        pytest.skip(f"no pictures in {PICTURES / folder}: set INFDIT_TEST_PICTURES to the folder that has {folder}/")
    return [Image.open(path).convert("RGB") for path in paths]


def luma_psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB of ITU-R BT.601 luma, 16..235, without a border of 4 pixels; a and b (h, w, 3) uint8."""
    a, b = ((x.astype(np.float64) @ [65.481, 128.553, 24.966] / 255 + 16)[4:-4, 4:-4] for x in (a, b))
    return float(10 * np.log10(255**2 / ((a - b) ** 2).mean()))


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image, dtype=np.float32))[None] / 255


def to_bytes(image: torch.Tensor) -> np.ndarray:
    return (image[0] * 255 + 0.5).to(torch.uint8).numpy()


def test_one_step_on_kodak_is_what_was_trained(capsys: pytest.CaptureFixture[str]) -> None:
    model = infdit.load_model("mini", device="cpu")
    found: dict[float | None, list[float]] = {sigma: [] for sigma in TRAINED}
    for image in pictures("kodak", "*.png")[:8]:
        w, h = (min(side, 512) // 32 * 32 for side in image.size)
        original = image.crop((0, 0, w, h))
        low = original.resize((w // 4, h // 4), Image.Resampling.BICUBIC)
        found[None].append(luma_psnr(np.array(low.resize((w, h), Image.Resampling.BICUBIC)), np.array(original)))
        for sigma in [sigma for sigma in TRAINED if sigma is not None]:
            result = infdit.upscale(model, to_tensor(low), 4.0, steps=1, sigma_max=sigma)
            found[sigma].append(luma_psnr(to_bytes(result), np.array(original)))
    means = {sigma: float(np.mean(values)) for sigma, values in found.items()}
    with capsys.disabled():
        print(f"\nmini on kodak, {model.dtype}, dB by sigma_max: {means}", end="")
    for sigma, trained in TRAINED.items():
        assert means[sigma] == pytest.approx(trained, abs=0.1)


def test_generated_pictures_keep_what_they_show() -> None:
    """Shrunk again, the result is the input: no shift, no change of colour, nothing lost."""
    model = infdit.load_model("mini", device="cpu")
    for image in pictures("generated", "*.jpg"):
        crop = to_tensor(image.crop((600, 300, 700, 380)))
        result = infdit.upscale(model, crop, 4.0)
        again = F.interpolate(result.movedim(-1, 1), (80, 100), mode="bicubic", antialias=True).movedim(1, -1)
        assert luma_psnr(to_bytes(again), to_bytes(crop)) > 35
        assert (result.mean((1, 2)) - crop.mean((1, 2))).abs().max() < 0.01

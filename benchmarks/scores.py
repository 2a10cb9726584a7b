"""How an enlarged picture compares with its original: pure functions of luma, (h, w) float64.

    luma          Y = 16 + (65.481·R + 128.553·G + 24.966·B)/255, ITU-R BT.601, of R, G, B in 0..255
    PSNR          10·log10(255² / mean (a − b)²)
    SSIM          mean of (2·μa·μb + c₁)(2·σab + c₂) / ((μa² + μb² + c₁)(σa² + σb² + c₂)), Wang et al. 2004
    energy        Σ |A(f)|² over |f| > ¼ cycle a pixel, which is half Nyquist; A: see `_high_spectrum`
    correlation   Re Σ A(f)·B(f)* / √(Σ |A(f)|² · Σ |B(f)|²) over the same f
    seam          mean |step across a line of the grid| / mean |step elsewhere|, steps between neighbouring pixels

Energy is in luma² a pixel: a sine of amplitude c has c²/2 if its frequency is above half Nyquist, 0 if below.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from infdit.seams import LUMA

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]

_RGB_TO_LUMA = 219 * np.array(LUMA) / 255  # what is 0..255 becomes 16..235
LUMA_OF_GREY = float(_RGB_TO_LUMA.sum())  # how far luma rises where R, G and B rise by 1
BORDER = 4  # pixels on each side that PSNR and SSIM leave out
HALF_NYQUIST = 0.25  # cycles a pixel
INPUT_NYQUIST = 0.125  # the same of a picture of a quarter of the size: above it, all is invented or guessed
# What rounding R, G and B to 8 bits leaves above half Nyquist: white noise of variance 1/12 a channel. A picture with
# less (drawn, or clipped to white) would make a ratio of energies meaningless.
ROUNDING_ENERGY = float((_RGB_TO_LUMA**2).sum() / 12 * (1 - math.pi * HALF_NYQUIST**2))


def luma(picture: Bytes) -> Floats:
    """(h, w, 3) uint8 → (h, w), 16..235."""
    return picture @ _RGB_TO_LUMA + 16.0


def psnr(a: Floats | Bytes, b: Floats | Bytes, border: int = 0) -> float:
    """dB of two arrays of one shape with a range of 255, without `border` pixels on each side; inf if equal."""
    inner = slice(border, -border or None)
    a, b = (x[inner, inner].astype(np.float64) for x in (a, b))
    error = float(((a - b) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(a: Floats, b: Floats, border: int = 0) -> float:
    """Mean SSIM under a Gaussian of 11×11 and σ 1.5, only where it lies wholly inside; K 0.01 and 0.03, range 255."""
    inner = slice(border, -border or None)
    x, y = (torch.from_numpy(np.ascontiguousarray(z[inner, inner])) for z in (a, b))
    weights = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    moments = torch.stack((x, y, x * x, y * y, x * y))[:, None]
    moments = F.conv2d(F.conv2d(moments, weights.view(1, 1, 11, 1)), weights.view(1, 1, 1, 11))
    mx, my, xx, yy, xy = moments[:, 0]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    alike = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    return float((alike / ((mx * mx + my * my + c1) * (xx - mx * mx + yy - my * my + c2))).mean())


def energy(y: Floats) -> Floats:
    """(..., h, w) → (...): energy above half Nyquist."""
    return (np.abs(_high_spectrum(y)) ** 2).sum(-1)


def correlation(a: Floats, b: Floats, cutoff: float = HALF_NYQUIST) -> float:
    """−1..1, of what two pictures (h, w) have above a frequency; 0 where one of them has nothing there."""
    high_a, high_b = _high_spectrum(a, cutoff), _high_spectrum(b, cutoff)
    scale = math.sqrt(float((np.abs(high_a) ** 2).sum() * (np.abs(high_b) ** 2).sum()))
    return float((high_a * high_b.conj()).sum().real) / scale if scale else 0.0


def energy_ratio(a: Floats, b: Floats) -> float:
    """Energy of a over that of b, but at least over what rounding to 8 bits alone gives; each the mean of its (...)."""
    return float(energy(a).mean() / max(float(energy(b).mean()), ROUNDING_ENERGY))


def tiles(y: Floats, side: int = 16) -> Floats:
    """(h, w) → (n, side, side): whole tiles from the top left, in row-major order."""
    rows, columns = y.shape[0] // side, y.shape[1] // side
    cut = y[: rows * side, : columns * side].reshape(rows, side, columns, side)
    return cut.swapaxes(1, 2).reshape(-1, side, side)


def flattest(y: Floats, share: float = 0.2) -> NDArray[np.intp]:
    """Which of the `tiles` of a picture (h, w) are the `share` with the least variance."""
    variance = tiles(y).var((1, 2))
    return np.argsort(variance, kind="stable")[: math.ceil(share * len(variance))]


def seam(y: Floats, period: int) -> float:
    """1 if a grid of lines every `period` pixels cannot be told, more if it shows; nan for a picture without lines.

    Lines lie before the pixels period, 2·period, …; rows and columns count alike.
    """
    on: list[Floats] = []
    off: list[Floats] = []
    for picture in (y, y.T):
        steps = np.abs(np.diff(picture, axis=0))
        line = np.arange(1, len(picture)) % period == 0
        on.append(steps[line].ravel())
        off.append(steps[~line].ravel())
    across, elsewhere = np.concatenate(on), np.concatenate(off)
    if not across.size or not elsewhere.size:
        return math.nan
    return over(float(across.mean()), float(elsewhere.mean()))


def over(a: float, b: float) -> float:
    """a/b; 0/0 is 1, nothing being as much as nothing."""
    if b:
        return a / b
    return math.inf if a else 1.0


def blue_noise(shape: tuple[int, int], amount: float, rng: np.random.Generator) -> Floats:
    """Gaussian noise (h, w) whose power rises with |f| above half Nyquist, with none below, of `energy` amount."""
    radius = _radius(shape)
    spectrum = np.fft.fft2(rng.standard_normal(shape)) * np.sqrt(radius) * (radius > HALF_NYQUIST)
    noise = np.fft.ifft2(spectrum).real
    return noise * math.sqrt(amount / float(energy(noise)))


def _high_spectrum(y: Floats, cutoff: float = HALF_NYQUIST) -> NDArray[np.complex128]:
    """(..., h, w) → (..., n): Fourier coefficients above a frequency, scaled so that |A|² sum to the mean square.

    Under a Hann window: a picture's opposite edges do not fit, and the step there would count as detail.
    """
    height, width = y.shape[-2:]
    window = np.outer(*(np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in (height, width)))
    flat = y - y.mean((-2, -1), keepdims=True)
    spectrum = np.fft.fft2(flat * window) / math.sqrt(height * width * (window**2).sum())
    return spectrum[..., _radius((height, width)) > cutoff]


def _radius(shape: tuple[int, int]) -> Floats:
    """|f| of each coefficient of a 2-D Fourier transform, cycles a pixel."""
    return np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1]))

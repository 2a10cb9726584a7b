"""Posteriors of 4× super-resolution that are known: what samplers and schedules are measured on.

A picture is drawn from a prior, shrunk to a quarter by the library's own resampler and rounded to 8 bits. What the
picture may have been is then known in closed form. For a Gaussian prior N(m₀, P) and y = A·x + τ·ε

    C = P − P·Aᵀ·(A·P·Aᵀ + τ²)⁻¹·A·P          m = m₀ + P·Aᵀ·(A·P·Aᵀ + τ²)⁻¹·(y − A·m₀)
    D(x; σ) = m + C·(C + σ²)⁻¹·(x − m)          x(σ) − m = √((λ + σ²)/(λ + σ₀²))·(x(σ₀) − m)  along each eigenvector

and D is the posterior mean, x(σ) the path of the probability-flow ODE. For a mixture of such, D is the mean of its
parts' D, weighted by how probable each is, given x; its path has no closed form, but a fine one of high order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infdit.conditioning import resample
from infdit.config import LR_FACTOR

ROUNDING = 2 / 255 / math.sqrt(12)  # τ: standard deviation of what rounding to 8 bits does to values in [-1, 1]
SPREAD = 0.2  # standard deviation of a pixel over such small pictures: bicubic then misses them by about 27 dB
SIDE = 16  # pixels of a picture
LARGEST = 64  # pixels: the longest wave that the prior knows


@dataclass(frozen=True)
class Posterior:
    """A mixture of K Gaussians N(mean, vectors·diag(values)·vectorsᵀ) over pictures as vectors; float64 throughout.

    Attributes:
        log_weights: (K,), but for a constant.
        means: (K, n); values: (K, n) eigenvalues, not below 0; vectors: (K, n, n), in columns.
    """

    log_weights: Tensor
    means: Tensor
    values: Tensor
    vectors: Tensor

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x; σ) for x (B, c, h, w) of n elements each."""
        along, noise = self._along(x), sigma.double() ** 2
        variance = self.values[:, None] + noise
        log = self.log_weights[:, None] - 0.5 * (along**2 / variance + variance.log()).sum(-1)
        shares = log.softmax(0)[..., None]  # (K, B, 1)
        return (shares * self._across(along * self.values[:, None] / variance)).sum(0).reshape(x.shape)

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean, (n,), and the sum of the variances of all pixels."""
        shares = self.log_weights.softmax(0)[:, None]
        mean = (shares * self.means).sum(0)
        return mean, (shares * (self.values + (self.means - mean) ** 2)).sum()

    def path(self, x: Tensor, start: float, end: float, steps: int = 300) -> Tensor:
        """Where the ODE takes x from one noise level to another.

        In closed form for one Gaussian; else by the classical method of Runge and Kutta in ln σ, where the slope is
        x − D, for an end above 0.
        """
        if len(self.means) == 1:
            stretch = ((self.values + end**2) / (self.values + start**2)).sqrt()[:, None]
            return self._across(self._along(x) * stretch).reshape(x.shape)
        h = math.log(end / start) / steps

        def slope(x: Tensor, step: float) -> Tensor:
            return x - self.denoise(x, torch.tensor(start * math.exp(step * h), dtype=torch.float64))

        for i in range(steps):
            a = slope(x, i)
            b = slope(x + h / 2 * a, i + 0.5)
            c = slope(x + h / 2 * b, i + 0.5)
            x = x + h / 6 * (a + 2 * b + 2 * c + slope(x + h * c, i + 1))
        return x

    def _along(self, x: Tensor) -> Tensor:
        """(B, …) → (K, B, n), from each mean along each part's eigenvectors."""
        return (x.reshape(len(x), -1) - self.means[:, None]) @ self.vectors

    def _across(self, along: Tensor) -> Tensor:
        """Its inverse, (K, B, n) each."""
        return self.means[:, None] + along @ self.vectors.mT


@dataclass(frozen=True)
class Problem:
    """What a small picture may have been.

    Attributes:
        priors: that the picture is drawn from one of; posterior: of the picture.
        up: (1, 1, h, w), the small picture enlarged, where sampling starts.
        shrink: (n/16, n), the resampler as a matrix; small: (n/16,), the small picture.
    """

    priors: Sequence[tuple[Tensor, Tensor]]
    posterior: Posterior
    up: Tensor
    shrink: Tensor
    small: Tensor

    def start(self, sigma: float, seed: int, count: int = 4) -> Tensor:
        """(count, 1, h, w) float64: the enlarged picture + σ·noise, as `upscale` starts."""
        generator = torch.Generator("cpu").manual_seed(seed)
        return self.up + sigma * torch.randn((count, *self.up.shape[1:]), generator=generator, dtype=torch.float64)

    def misread(self, gain: float, shift: float, blur: float) -> Posterior:
        """What a model would say that reads the small picture with another contrast, brightness or sharpness."""
        side = math.isqrt(len(self.small))
        around = torch.nn.functional.pad(self.small.reshape(1, 1, side, side), (1, 1, 1, 1), mode="replicate")
        soft = torch.nn.functional.avg_pool2d(around, 3, 1).reshape(-1)
        return posterior(self.priors, self.shrink, gain * self.small.lerp(soft, blur) + shift)

    def fitted(self, x: Tensor) -> Tensor:
        """The nearest to x (B, 1, h, w) that the small picture is the downscale of."""
        missing = self.small - x.reshape(len(x), -1) @ self.shrink.T
        return x + (missing @ torch.linalg.pinv(self.shrink).T).reshape(x.shape)

    def consistency(self, x: Tensor) -> float:
        """RMS distance of x, shrunk again, from the small picture."""
        return (x.reshape(len(x), -1) @ self.shrink.T - self.small).square().mean().sqrt().item()


def covariance(side: int = SIDE, decay: float = 2.0, spread: float = SPREAD) -> Tensor:
    """(side², side²) of pixels of pictures whose power falls as 1/f^decay; `spread` is a pixel's standard deviation."""
    f = torch.fft.fftfreq(2 * LARGEST, dtype=torch.float64)
    power = (f[:, None] ** 2 + f**2 + 1 / LARGEST**2) ** (-decay / 2)
    correlation = torch.fft.ifft2(power).real
    at = torch.arange(side)
    apart = (at[:, None] - at).abs()
    rows, columns = apart[:, None, :, None], apart[None, :, None, :]
    return correlation[rows, columns].reshape(side**2, side**2) * (spread**2 / correlation[0, 0])


def shrinking(side: int = SIDE) -> Tensor:
    """The resampler's downscale to a quarter as a matrix, (side²/16, side²)."""
    basis = torch.eye(side**2, dtype=torch.float64).reshape(side**2, 1, side, side)
    small = range(side // LR_FACTOR)
    return resample(basis, (LR_FACTOR, LR_FACTOR), small, small).reshape(side**2, -1).T


def posterior(priors: Sequence[tuple[Tensor, Tensor]], shrink: Tensor, small: Tensor) -> Posterior:
    """Of a mixture of priors (mean, covariance), equally probable, given the small picture."""
    parts: list[tuple[Tensor, ...]] = []
    for mean, prior in priors:
        seen = shrink @ prior @ shrink.T + ROUNDING**2 * torch.eye(len(shrink), dtype=torch.float64)
        gain, missing = torch.linalg.solve(seen, shrink @ prior).T, small - shrink @ mean
        values, vectors = torch.linalg.eigh(prior - gain @ shrink @ prior)
        evidence = -0.5 * (missing @ torch.linalg.solve(seen, missing) + torch.linalg.slogdet(seen).logabsdet)
        parts.append((evidence, mean + gain @ missing, values.clamp(min=0), vectors))
    return Posterior(*map(torch.stack, zip(*parts, strict=True)))


def natural(seed: int = 0, decay: float = 2.0, spread: float = SPREAD, side: int = SIDE) -> Problem:
    """A Gaussian: pictures with the power spectrum of natural ones."""
    return _problem([(torch.zeros(side**2, dtype=torch.float64), covariance(side, decay, spread))], seed)


def textures(seed: int = 0, apart: float = 0.95, parts: int = 12, side: int = SIDE) -> Problem:
    """A mixture: textures that the small picture cannot tell from each other.

    apart: share of the standard deviation that lies between the parts, the rest within each.
    """
    prior, shrink = covariance(side), shrinking(side)
    unseen = posterior([(prior.new_zeros(side**2), prior)], shrink, prior.new_zeros(len(shrink)))
    generator = torch.Generator("cpu").manual_seed(seed + 100)
    drawn = torch.randn((parts, side**2), generator=generator, dtype=torch.float64)
    means = apart * (drawn * unseen.values.sqrt()) @ unseen.vectors[0].T
    return _problem([(mean, (1 - apart**2) * prior) for mean in means], seed)


def edges(seed: int = 0, side: int = SIDE) -> Problem:
    """A mixture: an edge, whose place is not known to a part of a pixel, or a flat, or texture."""
    generator = torch.Generator("cpu").manual_seed(seed)
    angle, contrast = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    at = torch.arange(side, dtype=torch.float64) + 0.5 - side / 2
    along = math.cos(math.pi * angle) * at + math.sin(math.pi * angle) * at[:, None]
    smooth, flat = covariance(side, 2.0, 0.05), torch.zeros(side**2, dtype=torch.float64)
    places = torch.linspace(-0.75, 0.75, 7, dtype=torch.float64).tolist()
    drawn = [((0.4 + contrast) * (along - place).clamp(-0.5, 0.5)).reshape(-1) for place in places]  # as pixels draw it
    priors = [*((edge, smooth) for edge in drawn), (flat, smooth), (flat, covariance(side))]
    return _problem(priors, seed, len(drawn) // 2)


def _problem(priors: Sequence[tuple[Tensor, Tensor]], seed: int, true: int = 0) -> Problem:
    """The posterior of these priors, given what the small picture of one drawn from the `true` one of them shows."""
    generator = torch.Generator("cpu").manual_seed(seed)
    mean, prior = priors[true]
    side = math.isqrt(len(mean))
    shrink = shrinking(side)
    picture = mean + torch.linalg.cholesky(prior) @ torch.randn(side**2, generator=generator, dtype=torch.float64)
    small = shrink @ picture + ROUNDING * torch.randn(len(shrink), generator=generator, dtype=torch.float64)
    image = small.reshape(1, 1, side // LR_FACTOR, -1)
    up = resample(image, (1 / LR_FACTOR, 1 / LR_FACTOR), range(side), range(side), (-1, 1))
    return Problem(priors, posterior(priors, shrink, small), up, shrink, small)

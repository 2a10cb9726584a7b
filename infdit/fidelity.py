"""How faithful a result is to the picture given, and how it is made so: without a network, on the host, in strips.

    A x           the result x made as small as the picture given, y: the antialiased bicubic of `conditioning`
    consistency   10·log10(1 / mean (A x − y)²), dB
    fit           of all pictures with values in 0..1 whose downscale is A x + fidelity·(y − A x), the nearest to x
    match         x → M (x − mean A x) + mean y, with the M that makes the colours' covariance y's and moves them least

The nearest is a projection onto a convex set, and its dual has one number for each of y's: x(λ) = clamp(x + Aᵀλ) is
the answer for the λ at which the residual, the dual's gradient, is zero. So the large picture is read strip by strip,
and all that is kept is as small as y. λ is found by Nesterov's ascent, whose step 1/‖A Aᵀ‖ is known: A averages, so
the norm is the ratio of the sizes but for the edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .conditioning import BICUBIC, PIECE, kernel_matrix, take_colour

STRIP = 64  # rows of the result at a time
PASSES = 24  # over the result, at most; six or so are enough unless much is clipped
CLOSE = 1e-4  # of the residual's root mean square: 80 dB
FALLING = 0.98  # of the least residual so far, above which a pass was in vain
VAIN = 3  # passes in a row after which nothing more is to be had
EDGES = 1.1  # by how much ‖A Aᵀ‖ is above the ratio of the sizes
FLAT = 1e-6  # variance of colours below which there is nothing to stretch

Told = Callable[[int], None]


@dataclass(frozen=True)
class Likeness:
    """How alike a picture given and its result made small again are.

    Attributes:
        consistency: dB, of R, G and B with a peak of 1.
        colour: mean ΔE2000; below 1 nobody sees.
    """

    consistency: float
    colour: float

    def __str__(self) -> str:
        return f"{self.consistency:.1f} dB, ΔE2000 {self.colour:.2g}"


@dataclass(frozen=True)
class _Piece:
    """Some of the result's pixels along one axis, those of y that see them, and how much: (y's, result's) float64."""

    large: slice
    small: slice
    weights: Tensor


def _pieces(large: int, small: int, size: int) -> list[_Piece]:
    """One axis of A, cut by the result's pixels."""
    ratio, found = large / small, []
    for start in range(0, large, size):
        stop = min(start + size, large)
        first = max(0, math.floor(start / ratio - BICUBIC.reach - 0.5))
        last = min(small, math.ceil(stop / ratio + BICUBIC.reach + 0.5))
        taps, weights = kernel_matrix(large, ratio, range(first, last), BICUBIC)
        own = weights.new_zeros(last - first, stop - start)
        low, high = max(start, taps.start), min(stop, taps.stop)
        own[:, low - start : high - start] = weights[:, low - taps.start : high - taps.start]
        found.append(_Piece(slice(start, stop), slice(first, last), own))
    return found


class _Downscale:
    """A and its adjoint, between (3, H, W) and (3, h, w), float32."""

    def __init__(self, large: tuple[int, int], small: tuple[int, int]) -> None:
        self._small = small
        self.strips, self._across = _pieces(large[0], small[0], STRIP), _pieces(large[1], small[1], PIECE)

    def __call__(self, rows_of: Callable[[_Piece], Tensor]) -> Tensor:
        """A x; rows_of gives the rows (3, n, W) of x of a strip. Products are of float64, as in `resample`."""
        result = torch.zeros((3, *self._small), dtype=torch.float32, device="cpu")
        for strip in self.strips:
            rows = rows_of(strip)
            low = torch.zeros((3, rows.shape[1], self._small[1]), dtype=torch.float64, device="cpu")
            for part in self._across:
                low[..., part.small] += rows[..., part.large].double() @ part.weights.mT
            result[:, strip.small] += strip.weights @ low
        return result

    def add_adjoint(self, dual: Tensor, strip: _Piece, rows: Tensor) -> Tensor:
        """Add Aᵀλ to the rows of a strip, in place."""
        low = strip.weights.mT @ dual[:, strip.small].double()
        for part in self._across:
            rows[..., part.large] += low[..., part.small] @ part.weights
        return rows


def make_faithful(
    result: Tensor, given: Tensor, fidelity: float, colour_match: bool, grey: Tensor | None, told: Told
) -> Likeness:
    """Match colours and fit, in place, as far as that is asked for; then compare.

    Args:
        result: (3, H, W) float32 on the CPU in 0..1; given: (3, h, w) likewise, no side larger.
        fidelity: 0..1, see `fit` above; 0 leaves the result as it is.
        colour_match: whether colours are matched first.
        grey: where the result has no colour and keeps none, see `take_colour`.
        told: is called several times a second, with 1 for each of the `strips` of a fit and else with 0.
    """
    downscale = _Downscale((result.shape[1], result.shape[2]), (given.shape[1], given.shape[2]))

    rows_of = partial(_rows, result, told)  # no closure, see `Denoiser`: what is stopped here keeps no picture
    small = downscale(rows_of)
    if colour_match:
        matrix, shift = _transport(small, given)
        for strip in downscale.strips:
            rows = rows_of(strip)
            rows.copy_(torch.einsum("ij,jhw->ihw", matrix, rows.double()) + shift)
            _finish(rows, strip, grey, result.shape[1])
        small = downscale(rows_of)
    if fidelity:
        small = _fit(result, small.lerp_(given, fidelity), downscale, grey, told)
    return likeness(small, given)


def strips(height: int) -> int:
    """How many strips a fit of a picture of this height goes over, at most: in its passes, and when it is written."""
    return (PASSES + 1) * -(-height // STRIP)


def _fit(result: Tensor, target: Tensor, downscale: _Downscale, grey: Tensor | None, told: Told) -> Tensor:
    """Make `result` the nearest picture whose downscale is the target, in place; that downscale, as far as it got."""
    step = result[0].numel() / target[0].numel() / EDGES
    ahead, dual = torch.zeros_like(target), torch.zeros_like(target)
    best, least, reached, pace, vain = ahead, math.inf, target, 1.0, 0
    fitted = _Fitted(result, ahead, downscale, grey, told, strips(result.shape[1]))
    for _ in range(PASSES):
        small = downscale(fitted)
        error = (target - small).square_().mean().sqrt().item()
        vain = 0 if error < FALLING * least else vain + 1
        pace = 1.0 if error > least else (1 + math.sqrt(1 + 4 * pace**2)) / 2  # momentum gathers, until it overshoots
        if error < least:
            best, least, reached = ahead, error, small
        if vain == VAIN or error < CLOSE:
            break
        following = (target - small).mul_(step).add_(ahead)
        ahead, dual = following.lerp(dual, -max(0, pace - 2) / pace), following
        fitted.dual = ahead
    fitted.dual = best
    for strip in downscale.strips:
        result[:, strip.large] = fitted(strip)
    told(fitted.left)
    return reached


@dataclass
class _Fitted:
    """A result with Aᵀλ added, in the rows that are asked for; left: strips for which `told` has not been called."""

    result: Tensor
    dual: Tensor
    downscale: _Downscale
    grey: Tensor | None
    told: Told
    left: int

    def __call__(self, strip: _Piece) -> Tensor:
        self.left -= 1
        self.told(1)
        rows = self.downscale.add_adjoint(self.dual, strip, self.result[:, strip.large].clone())
        return _finish(rows, strip, self.grey, self.result.shape[1])


def _rows(result: Tensor, told: Told, strip: _Piece) -> Tensor:
    told(0)
    return result[:, strip.large]


def _finish(rows: Tensor, strip: _Piece, grey: Tensor | None, height: int) -> Tensor:
    """Rows as they may be: without colour where the picture has none, in 0..1. Both are projections, so is this."""
    if grey is not None:
        take_colour(rows[None], grey, strip.large.start, height)
    return rows.clamp_(0, 1)


def _transport(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The affine map of colours, (3, 3) and (3, 1, 1), from one picture's mean and covariance to another's.

    Of all that do so the one that moves colours least, which for normal distributions is optimal transport:
    M = S^−½ (S^½ T S^½)^½ S^−½. Where there is next to no variance it is the identity.
    """
    (mean, S), (wanted, T) = (_moments(picture) for picture in (source, target))
    root = _power(S, 0.5)
    inverse = _power(S, -0.5)
    matrix = inverse @ _power(root @ T @ root, 0.5) @ inverse
    return matrix, (wanted - matrix @ mean)[:, :, None]


def _moments(picture: Tensor) -> tuple[Tensor, Tensor]:
    """(3, h, w) → mean (3, 1) and covariance (3, 3), float64, with FLAT added to each colour's variance."""
    mean = picture.mean((1, 2), dtype=torch.float64)[:, None]
    covariance = torch.zeros((3, 3), dtype=torch.float64, device="cpu")
    for rows in picture.split(STRIP, 1):
        apart = rows.flatten(1).double() - mean
        covariance += apart @ apart.mT
    return mean, covariance / picture[0].numel() + FLAT * torch.eye(3, dtype=torch.float64, device="cpu")


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=FLAT**2) ** exponent @ vectors.mT


# ---- how alike


def likeness(small: Tensor, given: Tensor) -> Likeness:
    """Compare two pictures (3, h, w) in 0..1 of one size, the first maybe slightly beyond."""
    error = colour = 0.0
    for a, b in zip(small.split(STRIP, 1), given.split(STRIP, 1), strict=True):
        a, b = a.double(), b.double()
        error += (a - b).square().sum().item()
        colour += delta_e(lab(a), lab(b)).sum().item()
    pixels = given[0].numel()
    return Likeness(10 * math.log10(3 * pixels / error) if error else math.inf, colour / pixels)


def lab(rgb: Tensor) -> Tensor:
    """sRGB (3, …) in 0..1 → CIE L*, a*, b* under D65; what is beyond is clipped."""
    rgb = rgb.clamp(0, 1)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    matrix = torch.tensor(to_xyz, dtype=rgb.dtype, device=rgb.device)
    x, y, z = torch.tensordot(matrix / matrix.sum(1, keepdim=True), linear, 1)
    fx, fy, fz = (torch.where(t > 216 / 24389, t ** (1 / 3), t * (841 / 108) + 4 / 29) for t in (x, y, z))
    return torch.stack((116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)))


def delta_e(first: Tensor, second: Tensor) -> Tensor:
    """ΔE2000 of two colours in L*, a*, b*, (3, …) → (…): Sharma, Wu and Dalal 2005, equations 2 to 22."""
    (L1, a1, b1), (L2, a2, b2) = first, second
    mean = (a1.hypot(b1) + a2.hypot(b2)) / 2
    stretch = 1.5 - 0.5 * (mean**7 / (mean**7 + 25**7)).sqrt()
    a1, a2 = a1 * stretch, a2 * stretch
    C1, C2 = a1.hypot(b1), a2.hypot(b2)
    h1, h2 = (torch.atan2(b, a) % (2 * math.pi) for a, b in ((a1, b1), (a2, b2)))
    both = C1 * C2 != 0
    turn = torch.where(both, (h2 - h1 + math.pi) % (2 * math.pi) - math.pi, 0)
    turn = torch.where((h2 - h1 == math.pi) & both, math.pi, turn)  # either way around; the paper goes this one
    dL, dC, dH = L2 - L1, C2 - C1, 2 * (C1 * C2).sqrt() * (turn / 2).sin()
    L, C = (L1 + L2) / 2, (C1 + C2) / 2
    far = (h1 - h2).abs() > math.pi
    h = torch.where(both, torch.where(far, (h1 + h2 + 2 * math.pi) / 2, (h1 + h2) / 2), h1 + h2)
    T = 1 - 0.17 * (h - math.radians(30)).cos() + 0.24 * (2 * h).cos()
    T = T + 0.32 * (3 * h + math.radians(6)).cos() - 0.20 * (4 * h - math.radians(63)).cos()
    blue = math.radians(60) * torch.exp(-(((torch.rad2deg(h % (2 * math.pi)) - 275) / 25) ** 2))
    rotation = -2 * (C**7 / (C**7 + 25**7)).sqrt() * blue.sin()
    dL = dL / (1 + 0.015 * (L - 50) ** 2 / (20 + (L - 50) ** 2).sqrt())
    dC, dH = dC / (1 + 0.045 * C), dH / (1 + 0.015 * C * T)
    return (dL**2 + dC**2 + dH**2 + rotation * dC * dH).clamp(min=0).sqrt()

"""Samplers that were tried and left out: beside the others on the posteriors that are known, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from infdit.samplers import Callback, Denoise, SamplerInfo

ORDER = 3


def sample_deis(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """DEIS (Zhang and Chen 2022, tAB): the slope (x − D)/σ as a polynomial in σ through the last three, integrated."""
    known: list[tuple[float, Tensor]] = []
    for sigma, following in pairwise(sigmas.tolist()):
        denoised = denoise(x, torch.tensor(sigma, dtype=sigmas.dtype))
        if following <= 0:
            return denoised
        known = [*known, (sigma, (x - denoised) / sigma)][-ORDER:]
        h = following - sigma
        integrals = [h ** (k + 1) / (k + 1) for k in range(len(known))]
        x = x + _weighted(known, sigma, integrals)
    return x


def sample_unipc(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Predictor and corrector as in UniPC (Zhao et al. 2023), of data, in λ = −ln σ, with integrals that are exact.

    The answer at the end of a step, which the next begins with, is first used to make the step again, with one point
    more: so that takes no evaluation of its own.
    """
    known: list[tuple[float, Tensor]] = []
    begun, h = x, 0.0  # where the last step began, and how long it was
    for sigma, following in pairwise(sigmas.tolist()):
        denoised = denoise(x, torch.tensor(sigma, dtype=sigmas.dtype))
        here = -math.log(sigma)
        known = [*known, (here, denoised)]
        if known[1:]:
            x = math.exp(-h) * begun + _weighted(known, here - h, _integrals(h, len(known)))
        if following <= 0:
            return denoised
        known = known[-ORDER:]
        begun, h = x, math.log(sigma / following)
        x = math.exp(-h) * begun + _weighted(known, here, _integrals(h, len(known)))
    return x


TRIED = {
    "deis": SamplerInfo(sample_deis, 1, 6, 6, ORDER - 1),
    "unipc": SamplerInfo(sample_unipc, 1, 7, 7),
}


def _integrals(h: float, count: int) -> list[float]:
    """∫₀^h e^(s−h)·s^k ds for k < count."""
    found = [1 - math.exp(-h)]
    for k in range(1, count):
        found.append(h**k - k * found[-1])
    return found


def _weighted(known: Sequence[tuple[float, Tensor]], origin: float, integrals: Sequence[float]) -> Tensor:
    """The integral of the polynomial through these values, from those of its powers about `origin`."""
    places = torch.tensor([place - origin for place, _ in known], dtype=torch.float64)
    powers = torch.stack([places**k for k in range(len(known))])
    weights = torch.linalg.solve(powers, torch.tensor(integrals, dtype=torch.float64))
    return sum((weight * value for weight, (_, value) in zip(weights.tolist(), known, strict=True)), torch.zeros(()))

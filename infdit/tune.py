"""Noise levels that are fitted to a model: with few evaluations where many would have arrived.

The levels of n evaluations are σ₀ = sigma_max, then σ₀·exp(−Σ h), then 0, and ln h are the n − 1 numbers to be found:
levels fall whatever these are. The distance of a sampler's picture from that of Heun's method in 100 steps, from the
same noise, is a sum of squares, so Gauss and Newton find them (Levenberg's and Marquardt's form), with finite
differences. A little of the sum asks for steps of even size, which keeps what is extrapolated from them small.

Levels that differ from some place on only lead the same way up to there, and what the model said on it is not asked
again: that is half of all evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .config import SamplingDefaults
from .presets import FITTED, SAMPLER, resampled
from .samplers import Denoise, get_sampler, karras_sigmas, sample_heun
from .sidecar import MOST, Fit, Levels

REFERENCE = 100  # steps of Heun's method
ROUNDS = 8  # of Gauss and Newton
TRIES = 3  # dampings of a round
NUDGE = 0.02  # of ln h, for finite differences: far above the rounding of a network
EVEN = 0.01  # weight of even steps beside the distance, which Karras's levels have 1 of
FARTHEST = 1.0  # that ln h moves in a round


def reference(denoise: Denoise, start: Tensor, defaults: SamplingDefaults) -> Tensor:
    """Where sampling arrives with very many evaluations."""
    return sample_heun(denoise, start, karras_sigmas(REFERENCE, defaults.sigma_min, defaults.sigma_max))


def most_evaluations(count: int, rounds: int = ROUNDS) -> int:
    """That so many rounds of the fit of `count` levels take at most."""
    return rounds * count * (count // 2 + TRIES + 1)


class _Remembering:
    """D(x, σ) that answers as on the last way from the start, for as long as levels are those of that way."""

    def __init__(self, denoise: Denoise) -> None:
        self._denoise = denoise
        self._known: list[tuple[float, Tensor]] = []
        self._at = 0

    def begin(self) -> Denoise:
        """Back at the start."""
        self._at = 0
        return self

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.item()
        if self._at == len(self._known) or self._known[self._at][0] != level:
            del self._known[self._at :]
            self._known.append((level, self._denoise(x, sigma)))
        self._at += 1
        return self._known[self._at - 1][1]


class Fitting:
    """Fits levels for one denoiser.

    Args:
        denoise: D(x, σ) of a batch of pictures; start: where they start, (B, 3, h, w).
        goal: see `reference`.
        defaults: the model's.
    """

    def __init__(self, denoise: Denoise, start: Tensor, goal: Tensor, defaults: SamplingDefaults) -> None:
        self._denoise, self._start, self._goal = _Remembering(denoise), start, goal
        self._defaults, self._sample = defaults, get_sampler(SAMPLER).sample

    def begin(self, count: int, others: Sequence[Levels] = ()) -> Fit:
        """The best of Karras's levels, those of presets, and those found for other counts.

        Raises:
            ValueError: fewer than 2 evaluations, or more than MOST.
        """
        if not 2 <= count <= MOST:
            raise ValueError(f"{count} evaluations: levels are fitted for 2 to {MOST}")
        found = [(self._distance(levels), levels) for levels in _beginnings(self._defaults, count, others)]
        distance, levels = min(found)
        return Fit(levels, distance, found[0][0])

    def improve(self, fit: Fit) -> Fit:
        """One round; never worse."""
        steps = _steps(fit.levels)
        scale = fit.karras or 1.0
        here = self._residual(steps, scale)
        nudges = NUDGE * torch.eye(len(steps), dtype=torch.float64, device="cpu")
        # the last first: each leaves the way where the one after it still went along
        columns = [(self._residual(steps + nudge, scale) - here) / NUDGE for nudge in nudges.flip(0)]
        slopes = torch.stack(columns[::-1], 1)
        curvature, downhill = slopes.T @ slopes, -(slopes.T @ here)
        damping, best = fit.damping, here @ here
        for _ in range(TRIES):
            ridge = damping * (curvature.diag() + 1e-9 * curvature.diag().max() + 1e-30)
            move = torch.linalg.solve(curvature + torch.diag(ridge), downhill)
            there = steps + move.clamp(-FARTHEST, FARTHEST)
            residual = self._residual(there, scale)
            levels = _levels(self._defaults.sigma_max, there)
            if residual @ residual < best and (distance := self._distance_of(residual, scale)) <= fit.distance:
                return replace(fit, levels=levels, distance=distance, damping=damping / 8, rounds=fit.rounds + 1)
            damping *= 8
        return replace(fit, damping=damping, rounds=ROUNDS)  # nothing better is near

    def _distance(self, levels: Levels) -> float:
        return self._off(levels).square().mean().sqrt().item()

    def _off(self, levels: Levels) -> Tensor:
        """From the goal, in float64."""
        sigmas = torch.tensor([*levels, 0.0], dtype=torch.float32, device="cpu")
        return (self._sample(self._denoise.begin(), self._start, sigmas) - self._goal).double()

    def _residual(self, steps: Tensor, scale: float) -> Tensor:
        """Numbers whose squares are to be small: distances of pixels over `scale`, then how uneven steps are."""
        off = self._off(_levels(self._defaults.sigma_max, steps)).flatten().cpu()
        uneven = steps[1:].diff() * EVEN  # the first may be as long as it likes
        return torch.cat((off / (scale * math.sqrt(len(off))), uneven))

    def _distance_of(self, residual: Tensor, scale: float) -> float:
        return scale * residual[: self._goal.numel()].square().sum().sqrt().item()


def _beginnings(defaults: SamplingDefaults, count: int, others: Sequence[Levels]) -> list[Levels]:
    """Karras's first."""
    top, low = defaults.sigma_max, defaults.sigma_min
    karras = tuple(karras_sigmas(count, low, top).tolist()[:-1])
    even = tuple(karras_sigmas(count, low, top, 1000).tolist()[:-1])
    known = [resampled(levels, count, top, low) for levels in (*FITTED.values(), *others)]
    return [karras, even, *(levels for levels in known if levels)]


def _steps(levels: Levels) -> Tensor:
    """ln h of falling levels; (n,) → (n − 1,) float64."""
    return (-torch.tensor(levels, dtype=torch.float64, device="cpu").log().diff()).clamp(min=1e-6).log()


def _levels(top: float, steps: Tensor) -> Levels:
    return (top, *(top * torch.exp(-steps.exp().cumsum(0))).tolist())


def fit_levels(
    fitting: Fitting, count: int, others: Sequence[Levels] = (), fit: Fit | None = None,
    told: Callable[[Fit], None] = lambda fit: None,
) -> Fit:
    """Levels for `count` evaluations, from where a fit stands on; told: is called after each round."""
    fit = fit or fitting.begin(count, others)
    while fit.rounds < ROUNDS:
        fit = fitting.improve(fit)
        told(fit)
    return fit

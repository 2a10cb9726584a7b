"""Noise schedule and samplers: pure functions over denoise(x, σ), after k-diffusion's names and callback.

With D = denoise(x, σ) the probability-flow ODE is dx/dσ = (x − D)/σ (Karras et al. 2022, equation 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypedDict

import torch
from torch import Tensor

from .disk import each

Denoise = Callable[[Tensor, Tensor], Tensor]


class State(TypedDict):
    """Where a sampler stands after the first evaluation of a step, in k-diffusion's words."""

    x: Tensor
    i: int
    sigma: Tensor
    sigma_hat: Tensor
    denoised: Tensor


Callback = Callable[[State], None]
Sampler = Callable[..., Tensor]


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Karras et al. 2022, equation 5: `steps` noise levels from sigma_max to sigma_min, then 0.

    Returns:
        (steps + 1,) float32 on the CPU; one step gives [sigma_max, 0].

    Raises:
        ValueError: no step, or noise levels that do not fall.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: at least 1 is needed")
    if not 0 < sigma_min <= sigma_max < float("inf") or rho <= 0:
        raise ValueError(
            f"sigma_min {sigma_min:.10g} must be above 0 and at most sigma_max {sigma_max:.10g}, which must be finite, "
            f"and rho {rho:.10g} above 0"
        )
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat((sigmas, sigmas.new_zeros(1))).float()


def _steps(sigmas: Tensor) -> Iterator[tuple[int, float, float]]:
    """(i, σ_i, σ_{i+1}) as numbers, which scale a picture of any dtype and device without changing either."""
    return ((i, now, following) for i, (now, following) in enumerate(pairwise(sigmas.tolist())))


def sample_euler(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Euler's method: n evaluations for n steps.

    Args (of all samplers):
        denoise: D(x, σ), σ 0-d on the CPU.
        x: (B, 3, h, w), picture + σ_0·noise.
        sigmas: (n + 1,) falling noise levels, the last usually 0.
        callback: called after the first evaluation of each step with x, i, sigma, sigma_hat, denoised.
    """
    for i, sigma, following in _steps(sigmas):
        denoised = denoise(x, _level(sigma, sigmas))
        _report(callback, x, i, _level(sigma, sigmas), denoised)
        share = (following - sigma) / sigma
        x = each(lambda x, denoised, share=share: x + (x - denoised) * share, x, denoised)
    return x


def sample_heun(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Heun's method, the paper's (Karras et al. 2022, algorithm 1): 2n − 1 evaluations, as the step to 0 is Euler's."""
    for i, sigma, following in _steps(sigmas):
        denoised = denoise(x, _level(sigma, sigmas))
        _report(callback, x, i, _level(sigma, sigmas), denoised)
        step = following - sigma
        slope = each(lambda x, denoised, sigma=sigma: (x - denoised) / sigma, x, denoised)
        euler = each(lambda x, slope, step=step: x + slope * step, x, slope)
        if following > 0:
            again = denoise(euler, _level(following, sigmas))

            def heun(x: Tensor, slope: Tensor, euler: Tensor, again: Tensor, at: float, step: float) -> Tensor:
                return x + (slope + (euler - again) / at) / 2 * step

            euler = each(partial(heun, at=following, step=step), x, slope, euler, again)
        x = euler
    return x


def sample_dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2, data prediction; k-diffusion's form): n evaluations.

    In λ = −ln σ with h = λ_{i+1} − λ_i and r = h_last/h the exponential integrator's step is
    x ← σ_{i+1}/σ_i·x − (e^(−h) − 1)·((1 + 1/2r)·D_i − 1/2r·D_{i−1}); the first and the step to 0 are of first order.
    """
    last, h_last = None, 0.0  # D_{i−1} and its h
    for i, sigma, following in _steps(sigmas):
        denoised = denoise(x, _level(sigma, sigmas))
        _report(callback, x, i, _level(sigma, sigmas), denoised)
        h = math.log(sigma / following) if following > 0 else math.inf
        ratio, weight = following / sigma, 0.0 if last is None or following <= 0 else h / (2 * h_last)  # e^(−h)

        def stepped(x: Tensor, denoised: Tensor, last: Tensor, ratio: float, weight: float) -> Tensor:
            target = (1 + weight) * denoised - weight * last if weight else denoised
            return ratio * x + (1 - ratio) * target

        x = each(partial(stepped, ratio=ratio, weight=weight), x, denoised, denoised if last is None else last)
        last, h_last = denoised, h
    return x


def sample_dpmpp_3m(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """DPM-Solver++ of third order (Lu et al. 2022, appendix B, data prediction): n evaluations.

    In λ = −ln σ with h = λ_{i+1} − λ_i the parabola through the last three D is integrated exactly, in Newton's form:
    x ← e^(−h)·x + m₀·D_i + m₁·D[i, i−1] + (m₂ + h_last·m₁)·D[i, i−1, i−2], where m_k = ∫₀^h e^(s−h)·s^k ds. The first
    steps have fewer points; the step to 0 is of first order.
    """
    last = before = None  # D_{i−1} and D_{i−2}
    h_last = h_older = 0.0
    for i, sigma, following in _steps(sigmas):
        denoised = denoise(x, _level(sigma, sigmas))
        _report(callback, x, i, _level(sigma, sigmas), denoised)
        if following <= 0:
            return denoised
        h, ratio = math.log(sigma / following), following / sigma
        m1 = h - (1 - ratio)

        def stepped(
            x: Tensor, *known: Tensor, ratio: float = ratio, m1: float = m1, h: float = h, h_last: float = h_last,
            h_older: float = h_older,
        ) -> Tensor:
            """The step, from x and what is known of D: the last answer, and up to two before it."""
            x = ratio * x + (1 - ratio) * known[0]
            if known[1:]:
                slope = (known[0] - known[1]) / h_last  # D[i, i−1]
                x = x + m1 * slope
                if known[2:]:
                    slope = slope - (known[1] - known[2]) / h_older
                    x = x + (h * h - 2 * m1 + h_last * m1) / (h_last + h_older) * slope
            return x

        x = each(stepped, x, *(answer for answer in (denoised, last, before) if answer is not None))
        last, before, h_last, h_older = denoised, last, h, h_last
    return x


def _level(sigma: float, sigmas: Tensor) -> Tensor:
    """A noise level as denoise takes it, on the CPU: nobody has to wait for a device to look at it."""
    return torch.tensor(sigma, dtype=sigmas.dtype, device="cpu")


def _report(callback: Callback | None, x: Tensor, i: int, sigma: Tensor, denoised: Tensor) -> None:
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})


@dataclass(frozen=True)
class SamplerInfo:
    """A sampler and what it costs.

    Attributes:
        sample: takes the arguments of `sample_euler`.
        evaluations: of a step; the step to 0 takes one.
        pictures: that it holds at most between two evaluations; evaluating: during one, with x and the result.
        history: earlier answers that a step looks at, beside x, where one step is one evaluation; None: not known, so
            no run of it goes on within a picture, see `resume`.
        by_rows: whether its arithmetic is done some rows at a time, see `disk.each`, and so makes no further pictures.
    """

    sample: Sampler
    evaluations: int
    pictures: int
    evaluating: int
    history: int | None = None
    by_rows: bool = False


SAMPLER_INFO = {
    "heun": SamplerInfo(sample_heun, 2, 6, 5, 0, by_rows=True),
    "euler": SamplerInfo(sample_euler, 1, 3, 3, 0, by_rows=True),
    "dpmpp_2m": SamplerInfo(sample_dpmpp_2m, 1, 4, 4, 1, by_rows=True),
    "dpmpp_3m": SamplerInfo(sample_dpmpp_3m, 1, 5, 5, 2, by_rows=True),
}
SAMPLERS: dict[str, Sampler] = {name: info.sample for name, info in SAMPLER_INFO.items()}


def get_sampler(sampler: str | SamplerInfo) -> SamplerInfo:
    """The sampler of this name; one that is given itself is taken.

    Raises:
        ValueError: a name that is none of SAMPLERS.
    """
    if isinstance(sampler, SamplerInfo):
        return sampler
    if sampler not in SAMPLER_INFO:
        raise ValueError(f"sampler {sampler!r} is none of {', '.join(SAMPLER_INFO)}")
    return SAMPLER_INFO[sampler]


def evaluations(sampler: str | SamplerInfo, sigmas: Tensor) -> int:
    """How often a sampler calls `denoise` over these noise levels."""
    above = sum(level > 0 for level in sigmas[1:].tolist())
    return len(sigmas) - 1 + (get_sampler(sampler).evaluations - 1) * above

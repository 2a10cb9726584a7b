"""How carefully a model is sampled, by name: a sampler, a number of steps and where the noise levels lie.

Karras's levels spend half of the evaluations where the input already decides nearly everything (σ above 4), or on what
8 bits cannot show. One step leads from sigma_max, where sampling always begins, to where there is something to decide;
so the same picture is sampled, with fewer evaluations.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .config import SamplingDefaults
from .samplers import SamplerInfo, evaluations, karras_sigmas

SAMPLER = "dpmpp_3m"
# by `python -m benchmarks --fit 8,13`: fitted to posteriors that are known, see docs/sampling.md
FITTED: dict[int, tuple[float, ...]] = {
    8: (40.0, 2.52, 0.609, 0.183, 0.0695, 0.0342, 0.0175, 0.00715),
    13: (40.0, 4.58, 1.88, 0.939, 0.458, 0.241, 0.134, 0.0892, 0.0435, 0.0254, 0.0157, 0.00873, 0.00397),
}
PRESETS = {"paper": 20, "balanced": 13, "draft": 8}  # steps; paper: of Heun's method over Karras's levels
# grey levels from where many steps lead, on the worst of the posteriors of `python -m benchmarks --solvers`
OFF = {"paper": 0.8, "balanced": 0.1, "draft": 0.2}
Strength = float | Sequence[float]  # of all passes, or of each
Levels = Tensor | Sequence[Tensor] | None  # falling noise levels of all passes, or of each
RHO = 7.0  # of the Karras schedule, also the space in which `denoise` shortens it


@dataclass(frozen=True)
class Sampling:
    """How a run is sampled.

    Attributes:
        sampler: a name of SAMPLERS, or the one that was given; sigmas: (steps + 1,) float32, see `schedule`.
        words: about the preset, for people; empty without one.
    """

    sampler: str | SamplerInfo
    sigmas: Tensor
    words: str = ""


def sampling(
    defaults: SamplingDefaults, preset: str | None = None, steps: int | None = None,
    sampler: str | SamplerInfo | None = None, sigma_max: float | None = None, denoise: float = 1.0,
    sigmas: Tensor | None = None,
) -> Sampling:
    """How a model is sampled under a preset, or without one as it likes; what else is given goes before what that says.

    Raises:
        ValueError: a name that is none of PRESETS.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is none of {', '.join(PRESETS)}")
    if sigmas is not None:
        return Sampling(sampler or (defaults.sampler if preset is None else _sampler(preset)), sigmas)
    if preset is None or defaults.few_steps:
        words = f"preset: {preset} changes nothing, {defaults.few_steps}" if preset else ""
        return Sampling(sampler or defaults.sampler, schedule(defaults, steps, sigma_max, denoise), words)
    sampler = sampler or _sampler(preset)
    steps = PRESETS[preset] if steps is None else steps
    sigmas = schedule(defaults, steps, sigma_max, denoise)  # checks what was given
    words, tuned = f"preset: {preset}", {len(levels): levels for levels in defaults.tuned}
    if preset != "paper" and len(sigmas) > 2:
        fitted = tuned or FITTED
        nearest = fitted[min(fitted, key=lambda count: abs(count - steps))]
        if levels := resampled(nearest, steps, sigmas[0].item(), defaults.sigma_min):
            sigmas = sigmas.new_tensor([*levels, 0.0])
            words += ", noise levels tuned to this model" if tuned else ""
    words += f", {counted(evaluations(sampler, sigmas))}"
    if (sampler, steps, tuned) == (_sampler(preset), PRESETS[preset], {}) and sigmas[0] == FITTED[13][0]:
        words += f", within {OFF[preset]} of a grey level of many steps on known pictures"
    return Sampling(sampler, sigmas, words)


def samplings(
    defaults: SamplingDefaults, *asked: Any, denoise: Strength = 1.0, sigmas: Levels = None,  # noqa: ANN401 - passed on
) -> list[Sampling]:
    """`sampling` of each pass, where strengths or levels are given one a pass; else one that is for all of them."""
    if sigmas is not None:
        given = [sigmas] if isinstance(sigmas, Tensor) else sigmas
        return [sampling(defaults, *asked, sigmas=levels) for levels in given]
    strengths = denoise if isinstance(denoise, Sequence) else [denoise]
    return [sampling(defaults, *asked, denoise=strength) for strength in strengths]


def of_passes(levels: Sequence[Tensor], passes: int) -> list[Tensor]:
    """Noise levels of each pass of a run, from those that are given.

    Raises:
        ValueError: neither one for all of them nor one a pass.
    """
    if len(levels) not in (1, passes):
        count = "1 pass" if passes == 1 else f"{passes} passes"
        raise ValueError(f"denoise has {len(levels)} values, and this size takes {count}: give one, or one a pass")
    return [*levels] * (passes if len(levels) == 1 else 1)


def _sampler(preset: str) -> str:
    return "heun" if preset == "paper" else SAMPLER


def strengths_told(denoise: Sequence[float]) -> str:
    """Strengths of the passes, in words; empty where there is one for all."""
    return f"denoise {', '.join(f'{strength:g}' for strength in denoise)} of its passes" if denoise[1:] else ""


def counted(count: int) -> str:
    """Evaluations, in words."""
    return f"{count} evaluation{'' if count == 1 else 's'}"


def schedule(
    defaults: SamplingDefaults, steps: int | None = None, sigma_max: float | None = None, denoise: float = 1.0,
    rho: float = RHO,
) -> Tensor:
    """Noise levels of a run: a Karras schedule that begins a fraction `denoise` of the way from sigma_min to sigma_max.

    The way is measured as the schedule itself is spaced, in σ^(1/ρ). denoise = 0 has no step at all. A bridge always
    begins at sigma_max, where the enlarged picture is: it goes a fraction `denoise` of the way down to 0, and the
    result of one step is that fraction of the way from the enlarged picture to the model's.

    Returns:
        (steps + 1,) float32, the last 0, or (1 − denoise)·sigma_max for a bridge. At most `defaults.most_steps` steps.
    """
    if not 0 <= denoise <= 1:
        raise ValueError(f"denoise {denoise} must be between 0 (bicubic) and 1 (full strength)")
    sigma_max = defaults.sigma_max if sigma_max is None else sigma_max
    steps = defaults.steps if steps is None else operator.index(steps)
    steps = min(steps, defaults.most_steps or steps)
    low, high = defaults.sigma_min ** (1 / rho), max(sigma_max, 0) ** (1 / rho)
    if denoise not in (0, 1) and defaults.start_noise == 0:
        end = (1 - denoise) * sigma_max
        return karras_sigmas(steps, defaults.sigma_min, sigma_max, rho) * (1 - end / sigma_max) + end
    if denoise in (0, 1):
        return karras_sigmas(steps, defaults.sigma_min, sigma_max, rho)[0 if denoise else -1 :]
    return karras_sigmas(steps, defaults.sigma_min, (low + denoise * (high - low)) ** rho, rho)


def resampled(levels: Sequence[float], count: int, top: float, low: float) -> tuple[float, ...]:
    """`count` levels that lie as these do, from `top` on, and not below `low`; none where that leaves nothing.

    Between levels it is their logarithms that are interpolated. Those above `top` fall away; where the first is below
    `top`, `top` takes its place.
    """
    if top <= max(levels[-1], low) or count < 2:
        return ()
    if len(levels) == count and top >= levels[0] and levels[-1] >= low:
        return (top, *levels[1:])
    logs = [math.log(level) for level in (max(top, levels[0]), *levels[1:])]
    begin, end = _place(logs, math.log(top)), _place(logs, max(math.log(low), logs[-1]))
    inner = [math.exp(_at(logs, begin + (end - begin) * i / (count - 1))) for i in range(1, count)]
    return (top, *inner)


def _place(falling: Sequence[float], value: float) -> float:
    """The index, between two, at which a falling sequence has this value."""
    i = next(i for i in range(1, len(falling)) if falling[i] <= value)
    return i - (value - falling[i]) / (falling[i - 1] - falling[i])


def _at(values: Sequence[float], place: float) -> float:
    i = min(int(place), len(values) - 2)
    return values[i] + (values[i + 1] - values[i]) * (place - i)

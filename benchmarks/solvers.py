"""Presets, samplers and schedules on posteriors that are known: how far each ends from where the ODE leads.

All start at the same sigma_max, from the same noise: from another the ODE samples something else, and distances of its
ends mean nothing. Distances are RMS, of values in [-1, 1] where a grey level is 0.0078.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infdit.config import InfDiTConfig, SamplingDefaults
from infdit.memory.cost import seconds_per_evaluation
from infdit.memory.plan import MemoryPlan, Workload
from infdit.memory.planner import format_seconds
from infdit.presets import PRESETS, Sampling, sampling
from infdit.samplers import SAMPLERS, SamplerInfo, evaluations, get_sampler, karras_sigmas
from infdit.tune import Fit, Fitting, Levels, fit_levels

from . import solvable
from .tried import TRIED

PAPER = SamplingDefaults()
ON_A_CARD = Workload(InfDiTConfig(), 2048, 2048, device=torch.device("cuda"))  # what times are foretold of
END = 1e-4  # where paths that are stepped end: nothing is left to happen below
COUNTS = (8, 13, 20, 39)  # evaluations with Karras's levels, a row for each sampler
STARTS = (40, 20, 10, 4, 2, 1, 0.5, 0.2)  # noise levels to start from


@dataclass(frozen=True)
class Bench:
    """A problem, where sampling starts, and where the ODE leads from there."""

    problem: solvable.Problem
    start: Tensor
    goal: Tensor

    @classmethod
    def of(cls, problem: solvable.Problem, seed: int = 1, count: int = 2) -> Bench:
        """From `count` draws of the noise."""
        start = problem.start(PAPER.sigma_max, seed, count)
        end = 0.0 if len(problem.posterior.means) == 1 else END
        return cls(problem, start, problem.posterior.path(start, PAPER.sigma_max, end))

    def distance(self, sampler: str, sigmas: Tensor) -> float:
        """From the goal."""
        found = _method(sampler).sample(self.problem.posterior.denoise, self.start, sigmas)
        return (found - self.goal).square().mean().sqrt().item()


def fitted_to() -> list[Bench]:
    """What the levels of the presets are fitted to."""
    problems = [
        *(solvable.natural(seed, decay, spread) for seed, decay, spread in ((0, 2, 0.2), (2, 2, 0.4), (3, 1.5, 0.1))),
        solvable.edges(0),
        *(solvable.textures(seed, apart) for seed, apart in ((0, 0.95), (1, 0.9), (4, 0.98), (7, 0.95))),
    ]
    return [Bench.of(problem) for problem in problems]


def judged_on() -> dict[str, Bench]:
    """Others of their kind, by name."""
    problems = {
        "Gaussian 1/f²": solvable.natural(11),
        "1/f^1.5": solvable.natural(13, 1.5, 0.15),
        "1/f^2.5": solvable.natural(12, 2.5, 0.3),
        "edges": solvable.edges(6),
        "textures": solvable.textures(2),
        "apart": solvable.textures(3, 0.98),
    }
    return {name: Bench.of(problem) for name, problem in problems.items()}


def joined(benches: Sequence[Bench]) -> Fitting:
    """All as one batch, to fit levels to."""
    counts = [len(bench.start) for bench in benches]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        parts = zip(benches, x.split(counts), strict=True)
        return torch.cat([bench.problem.posterior.denoise(part, sigma) for bench, part in parts])

    start, goal = (torch.cat([getattr(bench, name) for bench in benches]) for name in ("start", "goal"))
    return Fitting(denoise, start, goal, PAPER)


def fit(counts: Sequence[int]) -> Iterator[str]:
    """The levels of presets, as `infdit/presets.py` has them."""
    fitting = joined(fitted_to())
    found: list[Levels] = []
    for count in counts:
        done: Fit = fit_levels(fitting, count, found)
        found.append(done.levels)
        levels = ", ".join(f"{level:.3g}" for level in done.levels)
        yield f"{count}: ({levels}),  # {done.distance:.2e} against Karras's {done.karras:.2e}"


def report() -> Iterator[str]:
    """A row for each preset, then for each sampler with Karras's levels."""
    benches = judged_on()
    yield f"| | sampler | evaluations | time | {' | '.join(benches)} |"
    yield f"|---|---|---|---|{'---|' * len(benches)}"
    for name in PRESETS:
        chosen = sampling(PAPER, name)
        yield _row(f"**{name}**", str(chosen.sampler), chosen.sigmas, benches)
    for name in TRIED:
        yield _row("levels of balanced", name, sampling(PAPER, "balanced").sigmas, benches)
    for sampler in (*SAMPLERS, *TRIED):
        each = _method(sampler).evaluations
        for count in COUNTS:
            yield _row("Karras", sampler, karras_sigmas((count + each - 1) // each, PAPER.sigma_min, 40), benches)
    yield from ("", *starts({name: bench.problem for name, bench in benches.items()}))


def starts(problems: Mapping[str, solvable.Problem]) -> Iterator[str]:
    """What comes of Heun's method, 20 steps, from less noise: LR consistency in dB, and how much detail there is.

    Detail is the variance of results about the posterior's mean, over what the posterior has: 1 is right. The distance
    of ends means nothing here, for another start leads to another picture.
    """
    yield f"| sigma_max | {' | '.join(problems)} |"
    yield f"|---|{'---|' * len(problems)}"
    for top in STARTS:
        sigmas, cells = karras_sigmas(20, PAPER.sigma_min, top), list[str]()
        for problem in problems.values():
            found = get_sampler("heun").sample(problem.posterior.denoise, problem.start(top, 1, 8), sigmas)
            mean, variance = problem.posterior.moments
            detail = (found.reshape(len(found), -1) - mean).square().sum(-1).mean() / variance
            cells.append(f"{20 * math.log10(2 / problem.consistency(found)):.1f} dB, {detail:.2f}")
        yield f"| {top:g} | {' | '.join(cells)} |"


def misreadings(seeds: Sequence[int] = range(6)) -> Iterator[str]:
    """How far a model that misreads the small picture ends from one that does not, fitted or not, and when.

    Fitted after sampling; or, below some σ, each answer of the model as well.
    """
    chosen, below = sampling(PAPER, "balanced"), (0.05, 0.3, 2.0)
    heads = "not fitted", "after sampling", *(f"and below σ {sigma:g}" for sigma in below)
    yield f"| | misread | {' | '.join(heads)} |"
    yield f"|---|---|{'---|' * len(heads)}"
    for name, make in (("Gaussian", solvable.natural), ("edges", solvable.edges), ("textures", solvable.textures)):
        for what, wrong in {"contrast": (0.9, 0, 0), "brightness": (1, 0.04, 0), "sharpness": (1, 0, 0.3)}.items():
            rows = torch.tensor([_misreading(make(seed), wrong, chosen, below) for seed in seeds])
            yield f"| {name} | {what} | {' | '.join(f'{distance:.2e}' for distance in rows.mean(0).tolist())} |"


def _misreading(
    problem: solvable.Problem, wrong: tuple[float, float, float], chosen: Sampling, below: Sequence[float]
) -> list[float]:
    model, start = problem.misread(*wrong), problem.start(PAPER.sigma_max, 1)
    sample = get_sampler(chosen.sampler).sample
    goal = sample(problem.posterior.denoise, start, chosen.sigmas)

    def end(fitted_below: float) -> Tensor:
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            answer = model.denoise(x, sigma)
            return problem.fitted(answer) if sigma < fitted_below else answer

        return sample(denoise, start, chosen.sigmas)

    plain = end(0)
    ends = plain, problem.fitted(plain), *(problem.fitted(end(sigma)) for sigma in below)
    return [(x - goal).square().mean().sqrt().item() for x in ends]


def _method(sampler: str) -> SamplerInfo:
    return TRIED.get(sampler) or get_sampler(sampler)


def _row(name: str, sampler: str, sigmas: Tensor, benches: Mapping[str, Bench]) -> str:
    distances = " | ".join(f"{bench.distance(sampler, sigmas):.1e}" for bench in benches.values())
    count = evaluations(_method(sampler), sigmas)
    seconds = count * seconds_per_evaluation(ON_A_CARD, MemoryPlan.default(ON_A_CARD.config))
    return f"| {name} | `{sampler}` | {count} | {format_seconds(seconds)} | {distances} |"

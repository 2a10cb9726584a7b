"""Samplers, presets and fitted noise levels on posteriors that are known in closed form."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.solvable import ROUNDING, Problem, covariance, edges, natural, textures
from benchmarks.solvers import Bench, judged_on, misreadings, starts
from benchmarks.tried import TRIED
from infdit import tune
from infdit.config import SamplingDefaults
from infdit.presets import FITTED, OFF, PRESETS, resampled, sampling, schedule
from infdit.samplers import SAMPLER_INFO, SAMPLERS, evaluations, karras_sigmas
from infdit.tune import Fit, Fitting, fit_levels, most_evaluations, reference

PAPER = SamplingDefaults()
BRIDGE = SamplingDefaults(1, "euler", 0.1, 0.01, start_noise=0.0, most_steps=1)
GAUSSIAN = natural(side=8)


def test_the_gaussian_is_the_posterior_by_bayes() -> None:
    """Its denoiser is what a prior, the small picture and the noisy picture say together, solved for at once."""

    prior, x, sigma = covariance(8), GAUSSIAN.start(0.3, 0, 1), 0.3
    precision = torch.linalg.inv(prior) + GAUSSIAN.shrink.T @ GAUSSIAN.shrink / ROUNDING**2
    seen = GAUSSIAN.shrink.T @ GAUSSIAN.small / ROUNDING**2 + x.flatten() / sigma**2
    expected = torch.linalg.solve(precision + torch.eye(64, dtype=torch.float64) / sigma**2, seen)
    found = GAUSSIAN.posterior.denoise(x, torch.tensor(sigma, dtype=torch.float64)).flatten()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("problem", [GAUSSIAN, edges(side=8), textures(side=8, parts=3)], ids=["one", "edges", "many"])
def test_the_denoiser_is_the_slope_of_the_log_density(problem: Problem) -> None:
    """Tweedie: D = x + σ²·∇ log p(x), here by differences of a mixture's density written out."""
    x, sigma = problem.start(0.1, 3, 1), torch.tensor(0.1, dtype=torch.float64)
    parts = problem.posterior

    def log_density(x: torch.Tensor) -> torch.Tensor:
        noisy = parts.vectors @ torch.diag_embed(parts.values + sigma**2) @ parts.vectors.mT
        normals = torch.distributions.MultivariateNormal(parts.means, noisy)
        return (parts.log_weights + normals.log_prob(x.flatten())).logsumexp(0)

    flat = x.detach().clone().requires_grad_()
    log_density(flat).backward()
    assert flat.grad is not None
    torch.testing.assert_close(parts.denoise(x, sigma), x + sigma**2 * flat.grad, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "order"),
    [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("dpmpp_3m", 3), ("deis", 3), ("unipc", 4)],
)
def test_order_of_convergence(name: str, order: int) -> None:
    x, errors = GAUSSIAN.start(40, 1, 1), []
    for n in (50, 100, 200):
        sigmas = karras_sigmas(n + 1, 0.01, 40.0)[:-1].double()
        found = {**SAMPLER_INFO, **TRIED}[name].sample(GAUSSIAN.posterior.denoise, x, sigmas)
        errors.append((found - GAUSSIAN.posterior.path(x, 40.0, sigmas[-1].item())).square().mean().sqrt().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(order - 0.25 < found < order + 0.3 for found in orders), orders


def test_closed_form_and_sampler_agree_to_a_millionth_at_200_evaluations() -> None:
    x, sigmas = GAUSSIAN.start(40, 1), karras_sigmas(201, 0.002, 40.0, 1000)[:-1].double()  # even steps of ln σ
    found = SAMPLERS["dpmpp_3m"](GAUSSIAN.posterior.denoise, x, sigmas)
    assert (found - GAUSSIAN.posterior.path(x, 40.0, sigmas[-1].item())).square().mean().sqrt() < 1e-6


def test_the_path_of_one_gaussian_by_steps_is_the_closed_form() -> None:
    one = GAUSSIAN.posterior
    twice = type(one)(*(torch.cat((part, part)) for part in (one.log_weights, one.means, one.values, one.vectors)))
    x = GAUSSIAN.start(40, 1, 1)
    torch.testing.assert_close(twice.path(x, 40, 0.01), one.path(x, 40, 0.01), rtol=0, atol=1e-6)


# ---- presets


@pytest.mark.parametrize(
    "problem",
    [natural(21), natural(22, 1.5, 0.15), natural(23, 2.5, 0.3), edges(24), textures(25), textures(26, 0.98)],
    ids=["natural", "rough", "smooth", "edges", "textures", "apart"],
)
def test_balanced_is_no_farther_than_the_paper_with_a_third_of_the_evaluations(problem: Problem) -> None:
    bench, balanced, paper = Bench.of(problem, 5, 1), sampling(PAPER, "balanced"), sampling(PAPER, "paper")
    assert evaluations(balanced.sampler, balanced.sigmas) == 13
    assert evaluations(paper.sampler, paper.sigmas) == 39
    distances = [bench.distance(str(chosen.sampler), chosen.sigmas) for chosen in (balanced, paper)]
    assert distances[0] <= distances[1], distances
    assert problem.consistency(SAMPLERS["dpmpp_3m"](problem.posterior.denoise, bench.start, balanced.sigmas)) < 0.004


def test_neutral_and_paper_are_what_was_before() -> None:
    for chosen in (sampling(PAPER), sampling(PAPER, "paper")):
        assert chosen.sampler == "heun"
        assert torch.equal(chosen.sigmas, karras_sigmas(20, 0.002, 40.0))
    assert sampling(PAPER).words == ""
    assert torch.equal(sampling(PAPER, steps=4, denoise=0.5).sigmas, schedule(PAPER, 4, denoise=0.5))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_of_one_step_is_sampled_as_ever_and_it_is_said(preset: str) -> None:
    chosen = sampling(BRIDGE, preset)
    assert chosen.sampler == "euler"
    assert torch.equal(chosen.sigmas, sampling(BRIDGE).sigmas)
    assert "changes nothing" in chosen.words
    assert "one step" in chosen.words


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="'best' is none of paper, balanced, draft"):
        sampling(PAPER, "best")


@pytest.mark.parametrize("preset", ["balanced", "draft"])
def test_levels_fall_for_any_model_strength_and_number_of_steps(preset: str) -> None:
    for top, low in ((40.0, 0.002), (80.0, 0.002), (0.1, 0.01), (5.0, 0.05), (0.003, 0.001)):
        for denoise in (0.01, 0.5, 0.999, 1.0):
            for steps in (1, 2, 3, 8, 13, 50):
                model = SamplingDefaults(sigma_max=top, sigma_min=low)
                sigmas = sampling(model, preset, steps, denoise=denoise).sigmas
                assert len(sigmas) == steps + 1
                assert sigmas[0] == schedule(model, steps, denoise=denoise)[0], "what is sampled stays"
                assert (sigmas.diff() < 0).all(), (top, denoise, steps)
                assert sigmas[-2] >= low * (1 - 1e-5)


def test_what_is_given_goes_before_the_preset() -> None:
    chosen = sampling(PAPER, "draft", steps=5, sampler="euler")
    assert (chosen.sampler, len(chosen.sigmas)) == ("euler", 6)


def test_levels_that_were_tuned_to_a_model_are_taken() -> None:
    mine = (40.0, *(0.7**i for i in range(12)))
    chosen = sampling(SamplingDefaults(tuned=(mine,)), "balanced")
    torch.testing.assert_close(chosen.sigmas, torch.tensor([*mine, 0.0]), rtol=1e-6, atol=0)
    assert "tuned to this model" in chosen.words
    assert resampled(mine, 13, 40.0, 0.002) == mine


# ---- tuning


def fitted(problem: Problem, counts: Sequence[int]) -> dict[int, Fit]:
    denoise, start = problem.posterior.denoise, problem.start(40, 2, 1)
    fitting = Fitting(denoise, start, reference(denoise, start, PAPER), PAPER)
    found: dict[int, Fit] = {}
    for count in counts:
        found[count] = fit_levels(fitting, count, [fit.levels for fit in found.values()][-1:])
    return found


@pytest.mark.parametrize("counts", [(5, 6, 13), pytest.param(range(5, 21), marks=pytest.mark.slow)], ids=str)
def test_tuned_levels_are_never_worse_than_karras_and_the_same_twice(counts: Sequence[int]) -> None:
    found = fitted(GAUSSIAN, counts)
    assert fitted(GAUSSIAN, counts[:2]).items() <= found.items()
    for count, fit in found.items():
        assert len(fit.levels) == count
        assert all(a > b for a, b in pairwise(fit.levels))
        assert fit.distance <= fit.karras
        sigmas, karras = torch.tensor([*fit.levels, 0.0]), karras_sigmas(count, 0.002, 40.0)
        bench = Bench.of(GAUSSIAN, 9)  # another noise
        assert bench.distance("dpmpp_3m", sigmas) <= bench.distance("dpmpp_3m", karras)


def test_a_fit_that_was_stopped_goes_on_to_the_same_levels() -> None:
    denoise, start = GAUSSIAN.posterior.denoise, GAUSSIAN.start(40, 2, 1)
    fitting = Fitting(denoise, start, reference(denoise, start, PAPER), PAPER)
    rounds: list[Fit] = []
    whole = fit_levels(fitting, 7, told=rounds.append)
    assert fit_levels(fitting, 7, fit=rounds[1]) == whole


def test_what_is_known_of_a_way_is_not_asked_again_and_the_same_levels_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, asked = GAUSSIAN.start(40, 2, 1), []
    goal = reference(GAUSSIAN.posterior.denoise, x, PAPER)

    def fit() -> tuple[Fit, int]:
        asked.clear()

        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            asked.append(sigma)
            return GAUSSIAN.posterior.denoise(x, sigma)

        return fit_levels(Fitting(denoise, x, goal, PAPER), 8), len(asked)

    found, count = fit()
    assert count <= most_evaluations(8)
    monkeypatch.setattr(tune._Remembering, "begin", lambda self: self._denoise)
    again, all_of_them = fit()
    assert found == again
    assert count < 0.6 * all_of_them


def test_fidelity_within_the_sampler_brings_next_to_nothing_beyond_fidelity_after_it() -> None:
    """As docs/sampling.md says why it is not there."""
    *_, edges, _, _, textures, _, _ = (row for row in misreadings([1]) if row)
    for row in (edges, textures):
        plain, after, *within = (float(cell) for cell in row.split("|")[3:-1])
        assert after < 0.97 * plain
        assert min(within) > 0.95 * after


def test_a_model_that_reads_rightly_is_the_posterior() -> None:
    problem = GAUSSIAN
    x, right = problem.start(1.0, 3, 2), problem.posterior
    assert torch.allclose(problem.misread(1, 0, 0).denoise(x, torch.tensor(1.0)), right.denoise(x, torch.tensor(1.0)))
    assert not torch.allclose(problem.misread(1, 0, 0.5).means, right.means)
    assert problem.fitted(x).shape == x.shape
    assert problem.consistency(problem.fitted(x)) < 1e-12


def test_the_bench_prints_a_row_for_each_preset(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.solvers.judged_on", lambda: {"one": Bench.of(GAUSSIAN)})
    assert main(["--solvers"]) == 0
    out = capsys.readouterr().out
    assert [f"**{name}**" in out for name in PRESETS] == [True] * len(PRESETS)
    assert set(FITTED) == {PRESETS["balanced"], PRESETS["draft"]}


def test_less_noise_to_start_from_is_less_detail() -> None:
    """Of a Gaussian in closed form: results are as consistent, and their variance falls by σ²/(λ + σ²)."""
    values = GAUSSIAN.posterior.values[0]
    rows = [row.strip("| ").split(" | ") for row in starts({"one": GAUSSIAN})][2:]
    for top, cell in rows:
        stretch = values / (values + float(top) ** 2)
        off = (GAUSSIAN.up.flatten() - GAUSSIAN.posterior.means[0]) @ GAUSSIAN.posterior.vectors[0]
        right = (stretch * (off**2 + float(top) ** 2)).sum() / values.sum()
        assert float(cell.split(", ")[1]) == pytest.approx(right.item(), rel=0.25), top


@pytest.mark.slow
def test_what_presets_are_off_at_most_is_what_the_bench_finds() -> None:
    for name in PRESETS:
        chosen = sampling(PAPER, name)
        worst = max(bench.distance(str(chosen.sampler), chosen.sigmas) for bench in judged_on().values())
        assert 0.5 * OFF[name] < worst * 255 / 2 <= OFF[name] + 0.05
        assert chosen.words.endswith(f", within {OFF[name]} of a grey level of many steps on known pictures")
    assert "grey level" not in sampling(PAPER, "balanced", steps=5).words

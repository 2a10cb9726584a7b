"""Samplers against the closed-form flow of Gaussian data, and against arithmetic written out by hand."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from infdit.samplers import SAMPLERS, evaluations, karras_sigmas

DATA = 0.5  # standard deviation


def gaussian_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """The posterior mean of N(0, DATA²) data: D = x·σ_d²/(σ_d² + σ²)."""
    return x * DATA**2 / (DATA**2 + sigma**2)


def exact_flow(x: Tensor, start: float, end: float) -> Tensor:
    """Its probability flow keeps x/√(σ_d² + σ²)."""
    return x * math.sqrt((DATA**2 + end**2) / (DATA**2 + start**2))


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_second_order(name: str) -> None:
    errors = []
    x = torch.tensor([[1.0]], dtype=torch.float64)
    for n in (20, 40, 80, 160):
        sigmas = karras_sigmas(n, 0.002, 40.0)
        y = SAMPLERS[name](gaussian_denoiser, 40 * x, sigmas[:-1])  # down to 0.002: the step to 0 is of first order
        errors.append((y - exact_flow(40 * x, float(sigmas[0]), float(sigmas[-2]))).abs().item())
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(3.5 < ratio < 5 for ratio in ratios), ratios


def test_euler_is_of_first_order() -> None:
    errors = []
    for n in (40, 80, 160):
        sigmas = karras_sigmas(n, 0.002, 40.0)
        y = SAMPLERS["euler"](gaussian_denoiser, torch.full((1,), 40.0, dtype=torch.float64), sigmas[:-1])
        errors.append((y - exact_flow(torch.tensor(40.0), 40.0, 0.002)).abs().item())
    assert all(1.7 < a / b < 2.3 for a, b in pairwise(errors)), errors


def test_dpmpp_2m_by_hand_on_three_unequal_steps() -> None:
    sigmas = [8.0, 2.0, 1.0, 0.4, 0.0]
    answers = [3.0, -1.0, 0.5, 2.0]  # what the denoiser says, whatever it is asked
    remaining = iter(answers)
    y = SAMPLERS["dpmpp_2m"](
        lambda x, sigma: torch.full_like(x, next(remaining)), torch.tensor([5.0]).double(), torch.tensor(sigmas)
    )
    x1 = 2 / 8 * 5 + (1 - 2 / 8) * 3  # first order
    r = math.log(8 / 2) / math.log(2 / 1)  # h_last/h
    x2 = 1 / 2 * x1 + (1 - 1 / 2) * ((1 + 1 / (2 * r)) * -1 - 1 / (2 * r) * 3)
    r = math.log(2 / 1) / math.log(1 / 0.4)
    x3 = 0.4 / 1 * x2 + (1 - 0.4 / 1) * ((1 + 1 / (2 * r)) * 0.5 - 1 / (2 * r) * -1)
    x4 = 2.0  # the step to 0 gives the denoised picture
    assert x3 != x4
    assert y.item() == pytest.approx(x4, abs=1e-12)
    remaining = iter(answers)
    y = SAMPLERS["dpmpp_2m"](
        lambda x, sigma: torch.full_like(x, next(remaining)), torch.tensor([5.0]).double(), torch.tensor(sigmas[:-1])
    )
    assert y.item() == pytest.approx(x3, abs=1e-7)  # float32 noise levels


def test_heun_by_hand() -> None:
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * x + sigma

    x, calls = torch.tensor([5.0]).double(), []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma))
        return denoise(x, sigma)

    y = SAMPLERS["heun"](counted, x, torch.tensor([4.0, 1.0, 0.0]))
    d = (5 - 6.5) / 4
    e = 5 - 3 * d
    x1 = 5 - 3 * (d + (e - (0.5 * e + 1)) / 1) / 2
    assert y.item() == pytest.approx(0.5 * x1 + 1, abs=1e-12)
    assert calls == [4.0, 1.0, 1.0]


@pytest.mark.parametrize(("name", "per_20"), [("heun", 39), ("euler", 20), ("dpmpp_2m", 20), ("dpmpp_3m", 20)])
def test_evaluations_and_callback(name: str, per_20: int) -> None:
    for n in (1, 2, 20):
        calls: list[float] = []
        states: list[dict] = []

        def denoise(x: Tensor, sigma: Tensor, calls: list[float] = calls) -> Tensor:
            assert sigma.dim() == 0
            calls.append(float(sigma))
            return gaussian_denoiser(x, sigma)

        sigmas = karras_sigmas(n, 0.002, 40.0)
        y = SAMPLERS[name](denoise, torch.ones(1, 3, 4, 4), sigmas, callback=states.append)
        assert (
            len(calls)
            == evaluations(name, sigmas)
            == {1: 1, 2: per_20 // 20 + (2 if name == "heun" else 1), 20: per_20}[n]
        )
        assert [state["i"] for state in states] == list(range(n))
        assert {"x", "i", "sigma", "sigma_hat", "denoised"} == set(states[0])
        assert y.dtype == torch.float32
        assert states[-1]["denoised"].shape == y.shape


def test_karras_schedule() -> None:
    sigmas = karras_sigmas(20, 0.002, 40.0)
    assert sigmas.shape == (21,)
    by_hand = [(40 ** (1 / 7) + i / 19 * (0.002 ** (1 / 7) - 40 ** (1 / 7))) ** 7 for i in range(20)]
    torch.testing.assert_close(sigmas, torch.tensor([*by_hand, 0.0]), rtol=1e-6, atol=0)
    assert karras_sigmas(1, 0.002, 40.0).tolist() == [40.0, 0.0]
    for bad in ((0, 0.002, 40.0), (5, 0.0, 40.0), (5, 2.0, 1.0), (5, 0.1, float("inf")), (5, float("nan"), 1.0)):
        with pytest.raises(ValueError, match=r"at least 1|must be above 0"):
            karras_sigmas(*bad)


def test_the_state_keeps_its_dtype() -> None:
    for name, sample in SAMPLERS.items():
        for dtype in (torch.float32, torch.float64):
            assert sample(gaussian_denoiser, torch.ones(1, dtype=dtype), karras_sigmas(4, 0.01, 5.0)).dtype == dtype, (
                name
            )

"""Faithfulness to the input: the adjoint, the projection and ΔE2000 against what others say they are."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import infdit
from infdit import Report, upscale
from infdit.fidelity import CLOSE, PASSES, _Downscale, delta_e
from infdit.model import InfDiT

FLOWERS = Path(__file__).parents[1] / "pictures" / "flowers.png"
FAST = {"steps": 1, "sampler": "euler", "sigma_max": 0.1}  # which leaves noise: the bundled model was made for none


@pytest.fixture(scope="module")
def bundled() -> InfDiT:
    """As it is: one step without noise."""
    return infdit.load_model("mini", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def crop() -> torch.Tensor:
    """(1, 40, 52, 3), of a photograph."""
    return torch.from_numpy(np.array(Image.open(FLOWERS).convert("RGB"))[60:100, 80:132] / 255).float()[None]


def downscaled(result: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """As torch makes it smaller, in float64."""
    small = F.interpolate(result.movedim(-1, 1).double(), like.shape[1:3], mode="bicubic", antialias=True)
    return small.movedim(1, -1)[..., :3]


def consistency(result: torch.Tensor, image: torch.Tensor) -> float:
    return -10 * math.log10(max(1e-20, (downscaled(result, image) - image[..., :3]).square().mean().item()))


def test_neutral_is_bit_equal_to_nothing(noisy_mini: InfDiT, crop: torch.Tensor) -> None:
    plain = upscale(noisy_mini, crop, 3.0, **FAST)
    assert torch.equal(plain, upscale(noisy_mini, crop, 3.0, fidelity=0, colour_match=False, report=Report(), **FAST))


@pytest.mark.parametrize(
    ("scale", "noise"),
    [
        *itertools.product([1.0, 1.3, 3.37, 6.0], [False]),
        *itertools.product([1.3, 4.0], [True]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product([2.0, 16.0], [False, True])),
        *(pytest.param(scale, True, marks=pytest.mark.slow) for scale in (1.0, 3.37, 6.0)),
    ],
)
def test_at_full_fidelity_the_result_made_small_is_the_input(
    noisy_mini: InfDiT, bundled: InfDiT, crop: torch.Tensor, scale: float, noise: bool
) -> None:
    """Torch's own downscale says so."""
    image = crop[:, :20, :20] if scale > 4 else crop
    model, given = (noisy_mini, FAST) if noise else (bundled, {})
    report, before = Report(), Report()
    upscale(model, image, scale, report=before, **given)
    result = upscale(model, image, scale, fidelity=1, report=report, **given)
    assert consistency(result, image) > 60
    assert (result.mean() - image.mean()).abs() < 1 / 255
    assert result.min() >= 0
    assert result.max() <= 1
    if scale > 1:  # there it is the input itself, and what is left is rounding
        assert report.faithful[0].consistency == pytest.approx(consistency(result, image), abs=0.5)
    assert report.faithful[0].consistency > before.faithful[0].consistency + 10
    assert report.faithful[0].colour < 0.2
    written = (result * 255 + 0.5).floor() / 255
    assert consistency(written, image) > 50


def test_the_downscale_is_torchs_and_its_adjoint_exact() -> None:
    """⟨A x, λ⟩ = ⟨x, Aᵀ λ⟩, over several strips and pieces and sizes that are no multiples."""
    downscale, generator = _Downscale((150, 301), (41, 77)), torch.Generator().manual_seed(0)
    x, dual = (torch.rand(3, *size, generator=generator) for size in ((150, 301), (41, 77)))
    small, back = downscale(lambda strip: x[:, strip.large]), torch.zeros_like(x)
    for strip in downscale.strips:
        downscale.add_adjoint(dual, strip, back[:, strip.large])
    expected = F.interpolate(x[None].double(), (41, 77), mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(small.double(), expected, atol=1e-6, rtol=0)
    assert (small.double() * dual).sum().item() == pytest.approx((x.double() * back).sum().item(), rel=1e-6)


def test_it_stops_where_the_residual_falls_no_more_and_the_best_is_kept(
    bundled: InfDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Black and white pixels, which no larger picture with values in 0..1 has for its downscale."""
    image = torch.rand((1, 12, 12, 3), generator=torch.Generator().manual_seed(0)).round()
    call, seen = _Downscale.__call__, list[torch.Tensor]()

    def watched(self: _Downscale, rows_of: Callable) -> torch.Tensor:
        seen.append(call(self, rows_of))
        return seen[-1].clone()

    monkeypatch.setattr(_Downscale, "__call__", watched)
    report = Report()
    upscale(bundled, image, 2.0, fidelity=1, report=report)
    reached = [-10 * math.log10((small.movedim(0, -1) - image[0]).square().mean().item()) for small in seen]
    assert max(reached) < 60
    assert len(reached) < PASSES
    assert report.faithful[0].consistency == pytest.approx(max(reached), abs=1e-3)
    assert max(reached) > reached[0] + 2


def test_the_nearest_of_all_consistent_pictures(bundled: InfDiT, crop: torch.Tensor) -> None:
    """Where nothing is clipped: x + A⁺(y − A x) by dense linear algebra."""
    image = crop[:, :10, :12] * 0.2 + 0.4
    result, plain = (upscale(bundled, image, 2.5, fidelity=fidelity) for fidelity in (1, 0))
    eye = [torch.eye(side, dtype=torch.float64) for side in result.shape[1:3]]
    down, across = (
        F.interpolate(one[None, None], (small, len(one)), mode="bicubic", antialias=True)[0, 0]
        for one, small in zip(eye, image.shape[1:3], strict=True)
    )
    missing = (image.double() - torch.einsum("ih,jw,bhwc->bijc", down, across, plain.double()))
    nearest = plain + torch.einsum("hi,wj,bijc->bhwc", down.pinverse(), across.pinverse(), missing)
    assert (nearest > 0).all()
    assert (nearest < 1).all()
    assert (result - nearest).abs().max() < 20 * CLOSE


def test_half_way_halves_what_is_wrong_in_a_batch_with_alpha(noisy_mini: InfDiT, crop: torch.Tensor) -> None:
    image = torch.cat((crop, crop.flip(1))) * 0.5 + 0.25
    image = torch.cat((image, torch.ones_like(image[..., :1])), -1)
    image[1, :9, :, 3] = 0
    report, before = Report(), Report()
    plain = upscale(noisy_mini, image, 2.0, report=before, **FAST)
    result = upscale(noisy_mini, image, 2.0, fidelity=0.5, report=report, **FAST)
    assert torch.equal(plain[..., 3], result[..., 3])
    for a, b in zip(before.faithful, report.faithful, strict=True):
        assert b.consistency - a.consistency == pytest.approx(20 * math.log10(2), abs=0.3)


def test_grey_stays_grey(bundled: InfDiT, crop: torch.Tensor) -> None:
    image = crop.mean(-1, keepdim=True).expand(-1, -1, -1, 3).contiguous()
    result = upscale(bundled, image, 3.0, fidelity=1, colour_match=True)
    assert torch.equal(result[..., 0], result[..., 1])
    assert torch.equal(result[..., 0], result[..., 2])
    assert consistency(result, image) > 60


def test_colour_match_takes_back_a_cast(bundled: InfDiT, crop: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that tints and flattens what it makes."""
    image = crop * 0.6 + 0.2
    good, original = upscale(bundled, image), infdit.Denoiser.__call__
    cast = torch.tensor([[0.8, 0.1, 0], [0, 0.9, 0.05], [0.1, 0, 0.7]])

    def tinting(self: infdit.Denoiser, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,bjhw->bihw", cast, original(self, x, sigma)) + 0.1

    monkeypatch.setattr(infdit.Denoiser, "__call__", tinting)
    tinted, matched = (upscale(bundled, image, colour_match=on) for on in (False, True))
    assert (tinted - good).abs().mean() > 0.03
    assert (matched - good).abs().mean() < 0.3 * (tinted - good).abs().mean()
    small = downscaled(matched, image)
    assert (small.mean((0, 1, 2)) - image.mean((0, 1, 2))).abs().max() < 1e-3
    torch.testing.assert_close(small.flatten(0, 2).T.cov(), image.double().flatten(0, 2).T.cov(), atol=5e-4, rtol=0)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_flat_picture_stays_flat(noisy_mini: InfDiT, value: float) -> None:
    result = upscale(noisy_mini, torch.full((1, 5, 1, 3), value), 2.5, fidelity=1, colour_match=True, denoise=0.0)
    torch.testing.assert_close(result, torch.full_like(result, value), atol=1e-3, rtol=0)


# Sharma, Wu and Dalal 2005, table 1: L*, a*, b* twice, and their ΔE2000
SHARMA = """
50.0000 2.6772 -79.7751 50.0000 0.0000 -82.7485 2.0425
50.0000 3.1571 -77.2803 50.0000 0.0000 -82.7485 2.8615
50.0000 2.8361 -74.0200 50.0000 0.0000 -82.7485 3.4412
50.0000 -1.3802 -84.2814 50.0000 0.0000 -82.7485 1.0000
50.0000 -1.1848 -84.8006 50.0000 0.0000 -82.7485 1.0000
50.0000 -0.9009 -85.5211 50.0000 0.0000 -82.7485 1.0000
50.0000 0.0000 0.0000 50.0000 -1.0000 2.0000 2.3669
50.0000 -1.0000 2.0000 50.0000 0.0000 0.0000 2.3669
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0009 7.1792
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0010 7.1792
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0011 7.2195
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0012 7.2195
50.0000 -0.0010 2.4900 50.0000 0.0009 -2.4900 4.8045
50.0000 -0.0010 2.4900 50.0000 0.0010 -2.4900 4.8045
50.0000 -0.0010 2.4900 50.0000 0.0011 -2.4900 4.7461
50.0000 2.5000 0.0000 50.0000 0.0000 -2.5000 4.3065
50.0000 2.5000 0.0000 73.0000 25.0000 -18.0000 27.1492
50.0000 2.5000 0.0000 61.0000 -5.0000 29.0000 22.8977
50.0000 2.5000 0.0000 56.0000 -27.0000 -3.0000 31.9030
50.0000 2.5000 0.0000 58.0000 24.0000 15.0000 19.4535
50.0000 2.5000 0.0000 50.0000 3.1736 0.5854 1.0000
50.0000 2.5000 0.0000 50.0000 3.2972 0.0000 1.0000
50.0000 2.5000 0.0000 50.0000 1.8634 0.5757 1.0000
50.0000 2.5000 0.0000 50.0000 3.2592 0.3350 1.0000
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644
63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.2630
61.2901 3.7196 -5.3901 61.4292 2.2480 -4.9620 1.8731
35.0831 -44.1164 3.7933 35.0232 -40.0716 1.5901 1.8645
22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373
36.4612 47.8580 18.3852 36.2715 50.5065 21.2231 1.4146
90.8027 -2.0831 1.4410 91.1528 -1.6435 0.0447 1.4441
90.9257 -0.5406 -0.9208 88.6381 -0.8985 -0.7239 1.5381
6.7747 -0.2908 -2.4247 5.8714 -0.0985 -2.2286 0.6377
2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082
"""


def test_delta_e_2000_of_published_pairs() -> None:
    table = torch.tensor([[float(v) for v in line.split()] for line in SHARMA.split("\n") if line], dtype=torch.float64)
    torch.testing.assert_close(delta_e(table[:, :3].T, table[:, 3:6].T), table[:, 6], atol=6e-5, rtol=0)
    torch.testing.assert_close(delta_e(table[:, 3:6].T, table[:, :3].T), table[:, 6], atol=6e-5, rtol=0)

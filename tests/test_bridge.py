"""Models that start from the enlarged picture itself, without noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import dense
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import infdit
from infdit import Conditioning, Denoiser, SamplingDefaults, upscale
from infdit.__main__ import main
from infdit.checkpoint import CheckpointError
from infdit.model import InfDiT
from infdit.upscale import schedule

BRIDGE = SamplingDefaults(steps=1, sampler="euler", sigma_max=0.1, sigma_min=0.01, start_noise=0.0, most_steps=1)


def made(tmp_path: Path, defaults: dict[str, object]) -> Path:
    path = tmp_path / "random.safetensors"
    weights = dense.random_weights(0, dtype=torch.float32, vector_dim=0)
    save_file(weights, path, {"defaults": json.dumps(defaults)})
    return path


@pytest.fixture
def bridge(tmp_path: Path) -> InfDiT:
    path = made(tmp_path, {"steps": 1, "sampler": "euler", "sigma_max": 0.1, "start_noise": 0, "most_steps": 1})
    return infdit.load_model(path, dtype=torch.float32, device="cpu")


def picture(seed: int = 0) -> torch.Tensor:
    coarse = torch.rand((1, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (24, 16), mode="bilinear").movedim(1, -1)


def one_evaluation(model: InfDiT, image: torch.Tensor) -> torch.Tensor:
    """D(up; sigma_max) put together by hand, (1, h, w, 3) in 0..1, not clipped."""
    low = image.movedim(-1, 1) * 2 - 1
    up = F.interpolate(low, scale_factor=4.0, mode="bicubic", antialias=True).clamp(-1, 1)
    padded = [-(-side // model.config.block_size) * model.config.block_size for side in up.shape[-2:]]
    assert list(up.shape[-2:]) == padded, "the test's picture is whole blocks"
    return Denoiser(model, Conditioning(low, up))(up, model.defaults.sigma_max).movedim(1, -1) / 2 + 0.5


def test_the_start_is_the_enlarged_picture(bridge: InfDiT) -> None:
    image = picture()
    expected = one_evaluation(bridge, image).clamp(0, 1)
    for seed in (0, 7):
        torch.testing.assert_close(upscale(bridge, image, seed=seed), expected, rtol=0, atol=2e-6)


def test_noise_that_is_given_is_used_as_it_is(bridge: InfDiT) -> None:
    image = picture()
    noise = torch.randn((1, 3, 96, 64), generator=torch.Generator().manual_seed(7))
    given = upscale(bridge, image, noise=lambda shape: noise.reshape(shape).clone())
    bridge.defaults = replace(bridge.defaults, start_noise=1.0)
    assert torch.equal(given, upscale(bridge, image, seed=7))
    assert not torch.equal(given, upscale(bridge, image, seed=8))


def test_a_share_of_the_noise(bridge: InfDiT) -> None:
    image = picture()
    bridge.defaults = replace(bridge.defaults, start_noise=0.25)
    noise = torch.randn((1, 3, 96, 64), generator=torch.Generator().manual_seed(7)) * 0.25
    assert torch.equal(upscale(bridge, image, seed=7), upscale(bridge, image, noise=lambda shape: noise.reshape(shape)))


def test_strength_is_the_share_of_the_way_from_the_enlarged_picture(bridge: InfDiT) -> None:
    image = picture()
    plain, full = upscale(bridge, image, denoise=0.0), one_evaluation(bridge, image)
    for strength in (0.25, 0.5, 0.9):
        expected = (plain + strength * (full - plain)).clamp(0, 1)
        torch.testing.assert_close(upscale(bridge, image, denoise=strength), expected, rtol=0, atol=2e-6)


def test_of_a_smaller_scale_less_is_missing(tmp_path: Path, bridge: InfDiT, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice as large takes its share of the noise levels, at once and as the first of two passes."""
    path = made(tmp_path, {**BRIDGE.stated(), "scales": [[2, 0.5], [4, 1.0]]})
    taught, image = infdit.load_model(path, dtype=torch.float32, device="cpu"), picture()
    bridge.defaults = replace(bridge.defaults, scales=((2, 1.0), (4, 1.0)), sigma_max=0.05)
    twice = upscale(bridge, image, 2)
    torch.testing.assert_close(upscale(taught, image, 2), twice, rtol=0, atol=2e-6)
    bridge.defaults = BRIDGE
    torch.testing.assert_close(upscale(taught, image), upscale(bridge, image), rtol=0, atol=2e-6)
    torch.testing.assert_close(upscale(taught, image, 8), upscale(bridge, twice), rtol=0, atol=2e-5)
    assert (upscale(bridge, image, 2) - twice).abs().max() > 1e-3, "which was asked for 4"
    assert main(["info", str(path)]) == 0
    assert "asked for ×2 and ×4" in capsys.readouterr().out


def test_schedule_of_a_bridge() -> None:
    torch.testing.assert_close(schedule(BRIDGE), torch.tensor([0.1, 0.0]))
    torch.testing.assert_close(schedule(BRIDGE, denoise=0.75), torch.tensor([0.1, 0.025]))
    assert len(schedule(BRIDGE, denoise=0)) == 1
    assert len(schedule(BRIDGE, steps=20)) == 2, "not more than the model gains from"
    several = schedule(replace(BRIDGE, most_steps=None), steps=5, denoise=0.6)
    assert several[0] == pytest.approx(0.1)
    assert several[-1] == pytest.approx(0.04)
    assert (several.diff() < 0).all()


def test_a_file_says_how_its_model_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path, {"steps": 1, "sampler": "euler", "sigma_max": 0.1, "start_noise": 0, "most_steps": 1})
    again = tmp_path / "again.safetensors"
    infdit.convert(path, again)
    assert infdit.load_model(again, device="cpu").defaults.start_noise == 0
    assert main(["info", str(again)]) == 0
    assert main(["plan", "64x64", "--model", str(again), "--budget", "1GiB"]) == 0
    assert capsys.readouterr().out.count("starts without noise: the seed changes nothing") == 2


def test_a_file_without_the_entry_starts_with_all_the_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made(tmp_path, {"steps": 3, "sampler": "euler", "sigma_max": 2.0})
    defaults = infdit.load_model(path, device="cpu").defaults
    assert (defaults.start_noise, defaults.most_steps) == (1.0, None)
    assert main(["info", str(path)]) == 0
    assert "starts" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"start_noise": 1.5}, "start_noise 1.5 must be a share"),
        ({"start_noise": -0.1}, "start_noise -0.1 must be a share"),
        ({"start_noise": float("nan")}, "start_noise nan must be a share"),
        ({"start_noise": "none"}, "defaults that cannot be used"),
        ({"steps": 4, "most_steps": 2}, "most_steps 2 must not be fewer than the 4"),
        ({"steps": 1, "most_steps": 1.5}, "whole number"),
        ({"scales": [[8, 1.0]]}, "must be whole, 2 to 4"),
        ({"scales": [[2, 0]]}, "with shares above 0"),
        ({"scales": 2}, "defaults that cannot be used"),
    ],
)
def test_defaults_that_cannot_be(tmp_path: Path, wrong: dict[str, object], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        infdit.load_model(made(tmp_path, wrong))


def test_grey_stays_grey(bridge: InfDiT) -> None:
    """A picture without colour comes back without any, whatever the weights: here random ones."""
    grey = picture().mean(-1, keepdim=True).expand(-1, -1, -1, 3)
    result = upscale(bridge, grey)
    assert (result.amax(-1) == result.amin(-1)).all()
    assert result.std() > 0.01
    coloured = grey.clone()
    coloured[0, 3, 3, 0] += 0.1
    result = upscale(bridge, coloured)[0]
    tint = result.amax(-1) - result.amin(-1)
    assert (tint[:28, :28] > 0).any(), "near a coloured pixel the model is free"
    assert (tint[32:] == 0).all(), "and nowhere else"
    assert (tint[:, 32:] == 0).all()

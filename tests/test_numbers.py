"""Not a number is not a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_cli import make_picture, run

import infdit
from infdit import MemoryPlan, SamplingDefaults, WrongNumbers, upscale
from infdit.model import InfDiT, Layer
from infdit.samplers import Denoise, SamplerInfo

WAYS_OUT = {torch.float16: "bf16 or fp32", torch.bfloat16: "fp32", torch.float32: "the model's file"}
IMAGE = torch.rand((1, 14, 20, 3), generator=torch.Generator().manual_seed(0))
NOISY = SamplingDefaults(steps=3, sampler="euler", sigma_max=0.1, sigma_min=0.01)


def mini(dtype: torch.dtype) -> InfDiT:
    model = infdit.load_model("mini", dtype=dtype, device="cpu")
    model.defaults = NOISY
    return model


class Broken:
    """The first layer gives one number that is none, in one block, from a number of evaluations on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, value: float) -> None:
        self.evaluations = 0
        original = Layer.forward

        def forward(layer: Layer, h: torch.Tensor, *inputs: object) -> torch.Tensor:
            out = original(layer, h, *inputs)
            if layer.cross is not None:
                self.evaluations += 1
                if self.evaluations >= first:
                    out[0, -1, -1, -1] = value
            return out

        monkeypatch.setattr(Layer, "forward", forward)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", list(WAYS_OUT), ids=str)
@pytest.mark.parametrize(("sampler", "evaluation", "step"), [("euler", 1, 1), ("euler", 2, 2), ("heun", 4, 2)])
def test_the_first_evaluation_that_is_not_finite_ends_the_run(
    sampler: str, evaluation: int, step: int, dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken(monkeypatch, evaluation, value)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(WrongNumbers, match=f"NaN or inf in step {step} in {name}: .*{WAYS_OUT[dtype]}") as refusal:
        upscale(mini(dtype), IMAGE, sampler=sampler, plan=MemoryPlan(6, 999))
    assert broken.evaluations == evaluation, "no time is spent on what follows"
    assert "\n" not in str(refusal.value)


def overflowing() -> InfDiT:
    """Weights that bfloat16 and float32 can bear: the MLP's inner numbers are some 1e6, its results as they were."""
    model = mini(torch.float32)
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp[0].weight.mul_(3e5)
            layer.mlp[2].weight.mul_(1e-6)
    return model


def test_float16_overflows_where_others_do_not() -> None:
    with pytest.raises(WrongNumbers, match="step 1 in float16"):
        upscale(overflowing().half(), IMAGE)
    for dtype in (torch.bfloat16, torch.float32):
        assert upscale(overflowing().to(dtype), IMAGE).isfinite().all()


def test_a_sampler_that_gives_no_numbers_is_told_from_a_model_that_does() -> None:
    def sample(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, callback: object) -> torch.Tensor:
        return denoise(x / 0, sigmas[0])

    with pytest.raises(WrongNumbers, match=r"^the sampler gave NaN or inf in step 1: choose another"):
        upscale(mini(torch.float32), IMAGE, sampler=SamplerInfo(sample, 1, 4, 4))


def test_large_numbers_are_numbers() -> None:
    """The largest noise that a node can ask for."""
    assert upscale(mini(torch.float32), IMAGE, sigma_max=5000.0, steps=2).isfinite().all()


def test_the_command_line_says_so_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [make_picture(tmp_path / name) for name in ("x.png", "y.png")]
    Broken(monkeypatch, 1, float("nan"))
    assert run("upscale", sources[0], "-o", tmp_path / "out.png", "--dtype", "fp16") == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert "step 1 in float16: choose bf16 or fp32" in last
    assert run("upscale", *sources, "-o", tmp_path / "out", "--dtype", "fp16") == 2
    assert capsys.readouterr().err.count("choose bf16 or fp32") == 2
    assert not list(tmp_path.glob("out*/*")), "nothing is written"

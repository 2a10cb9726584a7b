"""The published code's outputs, stored in float32, are reproduced through the published file and its conversion."""

import json
from pathlib import Path

import pytest
import torch
from conftest import DATA
from safetensors import safe_open
from safetensors.torch import load_file

import infdit
from infdit.conditioning import conditioning_pictures

PUBLISHED = DATA / "tiny.mp_rank_00_model_states.pt"
STORED = load_file(DATA / "tiny.safetensors")
CASES = sorted({name.split(".")[0] for name in STORED})
PLANS = [
    infdit.MemoryPlan(1, 1),
    infdit.MemoryPlan(2, 3, sweep="rows"),
    infdit.MemoryPlan(28, 2, sweep="columns"),
]


@pytest.fixture(scope="module")
def model() -> infdit.model.InfDiT:
    return infdit.load_model(PUBLISHED, dtype=torch.float32, device="cpu")


def test_the_conversion_is_the_published_model(model: infdit.model.InfDiT, tmp_path: Path) -> None:
    infdit.convert(PUBLISHED, tmp_path / "tiny.safetensors")
    converted = infdit.load_model(tmp_path / "tiny.safetensors", dtype=torch.float32, device="cpu")
    assert (converted.config, converted.defaults) == (model.config, model.defaults)
    state = converted.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("case", "plan"),
    [
        *((case, None) for case in CASES),
        *((CASES[i], plan) for i, plan in enumerate(PLANS)),  # each equals all others, see test_uniba
        *(pytest.param(case, plan, marks=pytest.mark.slow) for case in CASES for plan in PLANS),
    ],
    ids=str,
)
def test_stored_outputs(model: infdit.model.InfDiT, case: str, plan: infdit.MemoryPlan | None) -> None:
    stored = {name.removeprefix(case + "."): t for name, t in STORED.items() if name.startswith(case + ".")}
    conditioning = infdit.Conditioning(stored["lr"], stored["lr_upscaled"], stored["clip_embedding"])
    denoise = infdit.Denoiser(model, conditioning, plan, positions="wrapped")
    checked = 0
    for name, expected in stored.items():
        if name.startswith("denoised.sigma"):
            sigma = float(name.removeprefix("denoised.sigma"))
            result = denoise(stored["lr_upscaled"] + sigma * stored["noise"], torch.tensor(sigma))
            torch.testing.assert_close(result, expected, atol=2e-5, rtol=0)
        elif name.startswith("sampled.heun"):
            sigmas = infdit.samplers.karras_sigmas(int(name.removeprefix("sampled.heun")), 0.002, 40.0)
            x = stored["lr_upscaled"] + 40 * stored["noise"]
            result = infdit.samplers.SAMPLERS["heun"](denoise, x, sigmas)
            torch.testing.assert_close(result, expected, atol=1e-3, rtol=0)
        else:
            continue
        checked += 1
    assert checked


@pytest.mark.parametrize("case", CASES)
def test_conditioning_pictures_are_the_published_ones(case: str) -> None:
    up = STORED[case + ".lr_upscaled"]
    lr, upscaled = conditioning_pictures(STORED[case + ".image"], tuple(up.shape[-2:]), tuple(up.shape[-2:]))
    torch.testing.assert_close(lr, STORED[case + ".lr"], atol=1e-6, rtol=0)
    torch.testing.assert_close(upscaled, up, atol=1e-6, rtol=0)


def test_both_scales_and_wrapped_positions_are_covered() -> None:
    with safe_open(DATA / "tiny.safetensors", "pt") as file:
        cases = [json.loads(text) for name, text in file.metadata().items() if name.startswith("case")]
    assert {case["scale"] for case in cases} == {2, 4}
    assert max(case["w"] * case["scale"] for case in cases) > 512 < max(case["h"] * case["scale"] for case in cases)

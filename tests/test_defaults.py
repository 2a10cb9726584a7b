"""What another pack leaves behind in PyTorch's defaults changes nothing, not in one bit."""

import pytest
import torch

import infdit
from infdit import MemoryPlan
from infdit.model import InfDiT


def run(model: InfDiT) -> list[torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    shape = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    opaque, clear = torch.rand((1, 12, 17, 3), **shape), torch.rand((1, 9, 11, 4), **shape).round(decimals=1)
    plan = MemoryPlan(2, 3, "streamed", "host", "host")
    return [
        infdit.upscale(infdit.load_model("mini", torch.float32, "cpu"), opaque, 3.3),
        infdit.upscale(model, opaque, steps=2, sampler="heun", plan=plan),
        infdit.upscale(model, clear, steps=3, sampler="dpmpp_2m", size=(31, 40)),
    ]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64, "meta"], ids=str)
def test_defaults_of_dtype_and_device_do_not_matter(default: object, noisy_mini: InfDiT) -> None:
    expected = run(noisy_mini)
    before = torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        found = run(noisy_mini)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

"""What only a card can show: copies beside arithmetic give the CPU's picture, within the bytes foretold, and stop soon.

Skipped where there is no CUDA (or ROCm) device. `python -m benchmarks` times plans on the same device.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from test_memory import random_model

import infdit
from infdit import InfDiTConfig, MemoryPlan, Report, selfcheck
from infdit.memory.plan import Workload

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA = torch.device("cuda")
PLANS = [
    MemoryPlan(group, chunk, weights, hidden, images)
    for group, chunk in ((1, 1), (3, 4), (8, 64))
    for weights in ("resident", "streamed")
    for hidden in ("device", "host")
    for images in ("device", "host")
]
MIB = 2**20
ROUNDING = 1.05  # the allocator gives out whole 512 bytes; kernels of attention and of products take room of their own
LIBRARIES = 64 * MIB  # of theirs

plans = pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.group}-{p.chunk}-{p.weights}-{p.hidden}-{p.images}")


def picture(side: int) -> torch.Tensor:
    return torch.rand((1, side, side, 3), generator=torch.Generator().manual_seed(0))


@plans
def test_every_plan_gives_the_picture_of_the_cpu(plan: MemoryPlan) -> None:
    model = random_model(InfDiTConfig(8, 64, 2, 4, 32, 0, position_period=16), torch.float32)
    options = {"steps": 3, "sampler": "dpmpp_2m", "sigma_max": 5.0, "seed": 1}
    expected = infdit.upscale(model, picture(50), device="cpu", **options)
    for _ in range(3):  # an order that is wrong does not always show
        result = infdit.upscale(model, picture(50), plan=plan, device=CUDA, **options)
        assert (result - expected).abs().max() < 1e-4


@plans
def test_no_plan_takes_more_than_was_foretold(plan: MemoryPlan) -> None:
    config = InfDiTConfig(8, 1024, 16, 4, 64, 0)
    model = random_model(config, torch.bfloat16)
    foretold = Workload(config, 1024, 1024, device=CUDA, sampler="euler").footprint(plan).device
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    infdit.upscale(model, picture(256), steps=2, sampler="euler", plan=plan, device=CUDA)
    assert torch.cuda.max_memory_allocated(CUDA) - before <= ROUNDING * foretold + LIBRARIES
    assert torch.cuda.memory_allocated(CUDA) == before, "all is given back"


def test_a_run_stops_soon() -> None:
    """An exception in progress ends it; nothing that is queued already keeps the card busy for long."""

    class StopError(Exception):
        """The user's wish."""

    began = 0.0

    def progress(done: int, total: int, preview: object) -> None:
        nonlocal began
        if done >= total // 3:
            began = time.monotonic()
            raise StopError

    model = random_model(InfDiTConfig(8, 1280, 16, 4, 128, 0), torch.bfloat16)
    with pytest.raises(StopError):
        infdit.upscale(model, picture(512), steps=1, sampler="euler", device=CUDA, progress=progress)
    torch.cuda.synchronize(CUDA)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pinned", [True, False])
def test_the_card_computes_as_the_cpu_does(dtype: torch.dtype, pinned: bool) -> None:
    least = 0 if dtype == torch.float32 else 1e-4  # half precision that leaves no trace was not used
    assert least <= selfcheck.compare(CUDA, dtype, pinned) < selfcheck.LIMIT


AWAY = MemoryPlan(1, 2, "streamed", "host", "host")
SMALL = InfDiTConfig(8, 64, 2, 4, 32, 0, position_period=16)


def test_without_pinned_memory_the_picture_is_the_same() -> None:
    model = random_model(SMALL, torch.float32)
    plans = AWAY, replace(AWAY, pinned=False)
    results = [infdit.upscale(model, picture(50), steps=2, plan=plan, device=CUDA) for plan in plans]
    assert (results[0] - results[1]).abs().max() < 1e-4


@pytest.mark.parametrize("number", [1, 2, 30, 100])
def test_a_pin_that_fails_is_gone_on_without(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = random_model(SMALL, torch.float32), 0
    expected = infdit.upscale(model, picture(50), steps=2, plan=AWAY, device=CUDA)
    original = torch.Tensor.pin_memory

    def pin(tensor: torch.Tensor, *device: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == number:
            raise RuntimeError("CUDA error: out of memory")
        return original(tensor, *device)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    report = Report()
    result = infdit.upscale(model, picture(50), steps=2, plan=AWAY, device=CUDA, report=report)
    assert (result - expected).abs().max() < 1e-4
    assert report.plan == replace(AWAY, pinned=False)


def test_a_card_that_is_really_full_is_gone_on_with() -> None:
    """Half of what the plan foretells may be had; what a failed attempt held is given back before the next."""
    model = random_model(InfDiTConfig(8, 1024, 16, 4, 64, 0), torch.bfloat16)
    plan = MemoryPlan(8, 64)
    expected = infdit.upscale(model, picture(256), steps=1, plan=plan, device=CUDA)
    foretold = Workload(model.config, 1024, 1024, device=CUDA).footprint(plan).device
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(CUDA)[1]
    report = Report()
    torch.cuda.set_per_process_memory_fraction(foretold / 2 / total, CUDA)
    try:
        result = infdit.upscale(model, picture(256), steps=1, plan=plan, device=CUDA, report=report)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    assert report.replanned
    assert (result - expected).abs().max() < 0.05  # bfloat16

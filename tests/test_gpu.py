"""What only a card can show: copies beside arithmetic give the CPU's picture, within the bytes foretold, and stop soon.

Skipped where there is no CUDA (or ROCm) device. `python -m benchmarks` times plans on the same device.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import random_model
from torch.nn.attention import SDPBackend, sdpa_kernel

import infdit
from benchmarks.speed import time_plans
from infdit import InfDiTConfig, MemoryPlan, Report, attention, fuse, selfcheck
from infdit.device import empty_caches, empty_pinned_cache
from infdit.memory.footprint import Weights
from infdit.memory.measure import measured
from infdit.memory.plan import Workload
from infdit.memory.planner import PlannedRun
from infdit.model import Layer
from infdit.rotary import rotary_turns

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA = torch.device("cuda")
PLANS = [
    MemoryPlan(group, chunk, weights, hidden, images)
    for group, chunk in ((1, 1), (3, 4), (8, 64))
    for weights in ("resident", "streamed")
    for hidden in ("device", "host")
    for images in ("device", "host")
]
AWAY = MemoryPlan(1, 2, "streamed", "host", "host")
MIB = 2**20
ROUNDING = 1.05  # the allocator gives out whole 512 bytes; kernels of attention and of products take room of their own
LIBRARIES = 64 * MIB  # of theirs
HOLES = 1.25  # of what is foretold, where what was given back does not fit what is asked for

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


FIGURES = """
import sys, torch
sys.path[:0] = {path!r}
import test_gpu
for plan in test_gpu.PLANS:
    print(*test_gpu.taken(plan, torch.{dtype}))
"""


def taken(plan: MemoryPlan, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Bytes foretold; allocated and reserved at most in a run beyond what was before, and kept of each after it."""
    config = InfDiTConfig(8, 1024, 16, 4, 64, 0)
    model = random_model(config, dtype)
    foretold = Workload(config, 1024, 1024, dtype=dtype, device=CUDA, sampler="euler").footprint(plan).device
    empty_caches(CUDA)
    before = torch.cuda.memory_allocated(CUDA), torch.cuda.memory_reserved(CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    infdit.upscale(model, picture(256), steps=2, sampler="euler", plan=plan, device=CUDA)
    most = torch.cuda.max_memory_allocated(CUDA), torch.cuda.max_memory_reserved(CUDA)
    empty_caches(CUDA)
    after = torch.cuda.memory_allocated(CUDA), torch.cuda.memory_reserved(CUDA)
    return foretold, most[0] - before[0], most[1] - before[1], after[0] - before[0], after[1] - before[1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("backend", ["native", "cudaMallocAsync"])
def test_no_plan_takes_more_than_was_foretold(backend: str, dtype: str) -> None:
    """Of either allocator, which is chosen before PyTorch starts. In the first run libraries take room for good."""
    if torch.version.hip and backend != "native":
        pytest.skip("CUDA's alone")
    code = FIGURES.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1])], dtype=dtype)
    settings = {"PYTORCH_CUDA_ALLOC_CONF": f"backend:{backend}", "PYTORCH_ALLOC_CONF": f"backend:{backend}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    figures = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(figures) == len(PLANS)
    for number, (plan, (foretold, allocated, reserved, *kept)) in enumerate(zip(PLANS, figures, strict=True)):
        assert foretold / 4 < allocated <= ROUNDING * foretold + LIBRARIES, plan
        assert allocated <= reserved <= HOLES * foretold + LIBRARIES, plan
        assert max(kept) <= (LIBRARIES if number == 0 else 0), f"{plan}: all is given back"


def pinned_bytes() -> tuple[int, int]:
    """Of main memory: what somebody uses, and what PyTorch holds."""
    stats = torch.cuda.host_memory_stats()
    return stats["active_bytes.current"], stats["allocated_bytes.current"]


@pytest.mark.skipif(not hasattr(torch.cuda, "host_memory_stats"), reason="a PyTorch that does not count them")
@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_after_a_stop_nothing_is_pinned_and_nothing_on_the_card_though_the_traceback_lives(at: float) -> None:
    class StopError(Exception):
        """The user's wish."""

    most = 0

    def progress(done: int, total: int, preview: object) -> None:
        nonlocal most
        most = max(most, pinned_bytes()[0] - before[0])
        if done >= at * total:
            raise StopError

    model = random_model(InfDiTConfig(8, 256, 4, 4, 64, 0), torch.bfloat16)
    infdit.upscale(model, picture(64), steps=1, plan=AWAY, device=CUDA)  # tables that libraries keep
    empty_caches(CUDA)
    before, allocated = pinned_bytes(), torch.cuda.memory_allocated(CUDA)
    with pytest.raises(StopError) as kept:
        infdit.upscale(model, picture(256), steps=2, plan=AWAY, device=CUDA, progress=progress)
    torch.cuda.synchronize(CUDA)
    empty_pinned_cache(CUDA)
    assert kept.tb is not None
    assert most > 0, "something was pinned"
    assert pinned_bytes() <= before
    assert torch.cuda.memory_allocated(CUDA) == allocated


def test_copies_hide_behind_the_arithmetic() -> None:
    """Streamed weights and hidden states on the host: a little behind those in place, and ahead of plain copies."""
    away = MemoryPlan(4, 16, "streamed", "host")
    model = random_model(InfDiTConfig(num_layers=8), torch.bfloat16)
    timings = time_plans(model, [MemoryPlan(4, 16), away, replace(away, pinned=False)], 4096, 4096, CUDA)
    here, hidden, plain = (timing.measured for timing in timings)
    print(f"in place {here:.3f} s, copies beside {hidden:.3f} s, plain copies {plain:.3f} s")
    copies = 2 * 1024 * 1024 * 1280 * 2 + Weights.of(model.config, model.dtype).streamable
    speed = measured(CUDA, torch.bfloat16)
    assert speed is not None and speed.bus is not None
    assert hidden < plain
    assert hidden < 1.1 * max(here, copies / speed.bus) + 0.5 * min(here, copies / speed.bus)


def test_what_the_card_does_in_a_second_is_measured_soon_and_leaves_nothing() -> None:
    find = measured.__wrapped__
    find(CUDA, torch.bfloat16)
    before = torch.cuda.memory_allocated(CUDA), torch.cuda.memory_reserved(CUDA)
    began = time.perf_counter()
    speed = find(CUDA, torch.bfloat16)
    assert time.perf_counter() - began < 0.5
    assert 1e12 < speed.flops < 1e16
    assert 1e8 < speed.bus < 1e12
    assert 1e8 < speed.locking < 1e12
    assert (torch.cuda.memory_allocated(CUDA), torch.cuda.memory_reserved(CUDA)) <= before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_attention_without_a_fused_kernel_takes_what_was_foretold(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((2, n, 16, 80), generator=generator).transpose(1, 2) for n in (1024, 4096, 4096))
    expected = attention.attention(q, k, v)
    q, k, v = (x.to(CUDA, dtype) for x in (q, k, v))
    foretold = attention.piece_bytes((2, 16, 1024), 4096, 80, dtype.itemsize) + q.nbytes
    attention.fused.cache_clear()
    with sdpa_kernel(SDPBackend.MATH):
        assert not attention.fused(CUDA, dtype, 80)
        before = torch.cuda.memory_allocated(CUDA)
        torch.cuda.reset_peak_memory_stats(CUDA)
        result = attention.attention(q, k, v)
        most = torch.cuda.max_memory_allocated(CUDA) - before
    attention.fused.cache_clear()
    assert most <= ROUNDING * foretold + LIBRARIES
    assert (result.cpu().float() - expected).abs().max() < 0.02


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


SMALL = InfDiTConfig(8, 64, 2, 4, 32, 0, position_period=16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_kernel_of_triton_computes_as_operations_do(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv(fuse.SWITCH, "1")
    assert fuse._kernel(CUDA, dtype) is not None
    selfcheck.compare(CUDA, dtype)  # the toy network there with the kernel, on the CPU without
    generator = torch.Generator().manual_seed(0)
    qk = torch.randn((2, 3, 64, 2 * 16, 80), generator=generator).to(CUDA, dtype)
    norm, positions = torch.nn.LayerNorm(80, eps=1e-6, device=CUDA, dtype=dtype), torch.arange(24.0, device=CUDA)
    with torch.no_grad():
        turns = rotary_turns(positions.view(3, 8), positions.view(3, 8), 80, torch.float32)
        found = fuse.queries_and_keys(qk, norm, turns)
        monkeypatch.delenv(fuse.SWITCH)
        expected = fuse.queries_and_keys(qk, norm, turns)
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b.float()).abs().max() <= 4 * torch.finfo(dtype).eps * b.abs().max()


def test_without_pinned_memory_the_picture_is_the_same() -> None:
    model = random_model(SMALL, torch.float32)
    plans = AWAY, replace(AWAY, pinned=False)
    results = [infdit.upscale(model, picture(50), steps=2, plan=plan, device=CUDA) for plan in plans]
    assert (results[0] - results[1]).abs().max() < 1e-4


@pytest.mark.parametrize("number", [1, 2, 30, 100])
@pytest.mark.parametrize("kind", ["slabs", "numbers"])
def test_a_pin_that_fails_is_gone_on_without(kind: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of memory that is cut into weights and hidden states, or of a few numbers that a chunk is described by."""
    model, calls = random_model(SMALL, torch.float32), 0
    expected = infdit.upscale(model, picture(50), steps=2, plan=AWAY, device=CUDA)
    place, name = (torch, "empty") if kind == "slabs" else (torch.Tensor, "pin_memory")
    original = getattr(place, name)

    def pin(*args: object, **options: object) -> torch.Tensor:
        nonlocal calls
        calls += kind == "numbers" or bool(options.get("pin_memory"))
        if calls == number:
            calls += 1
            raise RuntimeError("CUDA error: out of memory")
        return original(*args, **options)

    if kind == "slabs" and number > 2:
        pytest.skip("there are fewer")
    monkeypatch.setattr(place, name, pin)
    report = Report()
    result = infdit.upscale(model, picture(50), steps=2, plan=AWAY, device=CUDA, report=report)
    assert (result - expected).abs().max() < 1e-4
    assert report.plan == replace(AWAY, pinned=False)


@pytest.mark.parametrize("number", [1, 5, 20])
@pytest.mark.parametrize("plan", [MemoryPlan(2, 4), AWAY], ids=["in place", "away"])
def test_memory_that_runs_out_at_any_layer_is_gone_on_with(
    plan: MemoryPlan, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the failed attempt held is gone when the next begins, and nothing is left after the run."""
    model, calls, between = random_model(SMALL, torch.float32), 0, []
    expected = infdit.upscale(model, picture(50), steps=2, plan=plan, device=CUDA)
    empty_caches(CUDA)
    before, layer, replan = torch.cuda.memory_allocated(CUDA), Layer.forward, PlannedRun.smaller

    def forward(self: Layer, *args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == number:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB")
        return layer(self, *args)

    def smaller(self: PlannedRun) -> PlannedRun:
        between.append(torch.cuda.memory_allocated(CUDA) - before)
        return replan(self)

    monkeypatch.setattr(Layer, "forward", forward)
    monkeypatch.setattr(PlannedRun, "smaller", smaller)
    report = Report()
    result = infdit.upscale(model, picture(50), steps=2, plan=plan, device=CUDA, report=report)
    assert len(report.replanned) == len(between) == 1
    assert between[0] < 2 * MIB, "what the sampler and its caller hold of a picture of 200 pixels a side"
    assert (result - expected).abs().max() < 1e-4
    assert torch.cuda.memory_allocated(CUDA) == before


def test_a_card_that_is_really_full_is_gone_on_with() -> None:
    """Half of what the plan foretells may be had; what a failed attempt held is given back before the next."""
    model = random_model(InfDiTConfig(8, 1024, 16, 4, 64, 0), torch.bfloat16)
    plan = MemoryPlan(8, 64)
    expected = infdit.upscale(model, picture(256), steps=1, plan=plan, device=CUDA)
    foretold = Workload(model.config, 1024, 1024, device=CUDA).footprint(plan).device
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    report = Report()
    torch.cuda.set_per_process_memory_fraction(foretold / 2 / total)
    try:
        result = infdit.upscale(model, picture(256), steps=1, plan=plan, device=CUDA, report=report)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert report.replanned
    assert (result - expected).abs().max() < 0.05  # bfloat16

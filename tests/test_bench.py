"""The speed bench: what it prints, and that plans are as fast as they should be (slow: a quiet machine is needed)."""

import statistics
import time
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import infdit
from benchmarks.__main__ import main
from benchmarks.kernels import Kernels
from benchmarks.peak_meter import PeakMeter
from benchmarks.speed import Timing, random_model, time_plans
from infdit import InfDiTConfig, MemoryPlan
from infdit.memory.footprint import Weights

CPU = torch.device("cpu")


def test_it_prints_constants_and_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "mini", "--size", "64x96", "--device", "cpu", "--dtype", "fp32"]) == 0
    out = capsys.readouterr().out
    assert "TFLOP/s in general" in out and "by a product measured here" in out
    assert out.count(" layers × ") == 6
    assert "weights streamed take" in out


def test_kernels_of_a_layer_and_seconds_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    """At the published width with four blocks: once 45 kernels, and 1.17 GB by those that only move numbers."""
    assert main(["--kernels", "4", "--size", "64x96"]) == 0
    *_, whole, triton, python = capsys.readouterr().out.splitlines()
    for line, most, megabytes in ((whole, 30, 585), (triton, 21, 420)):
        kernels, moved, unit, *_ = line.split()
        assert float(kernels) <= most
        assert float(moved) <= megabytes
        assert unit == "MB"
    assert 0 < float(python.split(": ")[1].split(" ms in Python")[0]) < 1000


def test_kernels_are_counted_as_an_accelerator_would_have_them() -> None:
    kernels, x = Kernels(), torch.ones(4, 6)
    kernels.on = True
    with kernels:
        y = x.view(6, 4).t()  # nothing
        y = y + torch.ones(6).expand(4, 6)  # made by one; 24 and 6 numbers are read, 24 written
        y.add_(1)
        y[:2] = x[:2]  # 12 and 12
        torch.add(x, x, out=y)
        F.layer_norm(y[:, 3:], (3,))  # 12 numbers, copied first; two more for each of four rows
        x.unfold(0, 2, 1).abs()  # three windows of two rows: 24 numbers are read, 36 written
        x @ y.t()
    assert kernels.names == {
        "ones": 1, "add": 2, "add_": 1, "copy_": 1, "native_layer_norm": 1, "copy for a norm": 1, "mm": 1,
        "abs": 1,
    }  # fmt: skip
    numbers = {name: count // 4 for name, count in kernels.moved.items()}
    assert numbers == {
        "ones": 6, "add": 54 + 72, "add_": 48, "copy_": 24, "native_layer_norm": 24 + 8, "copy for a norm": 24, "mm": 0,
        "abs": 60,
    }  # fmt: skip


def test_timings_are_of_the_plans_in_their_order() -> None:
    model = infdit.load_model("mini", dtype=torch.float32, device="cpu")
    plans = [MemoryPlan(6, 12), MemoryPlan(1, 1, "streamed", "host", "host")]
    timings = time_plans(model, plans, 96, 128, CPU, rounds=1)
    assert [t.plan for t in timings] == plans
    assert all(t.measured > 0 and t.predicted > 0 for t in timings)
    assert timings[0].peak > timings[1].peak


@pytest.fixture
def own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that this process, which has one thread, was at work: whatever else the machine does."""
    for clock in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, clock, time.process_time)


def fastest_of(timings: list[Timing]) -> Timing:
    return min(timings, key=lambda t: t.measured)


@pytest.mark.slow
@pytest.mark.usefixtures("own_time")
def test_the_chosen_of_five_plans_is_as_fast_as_the_fastest_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    model = infdit.load_model("mini", dtype=torch.float32, device="cpu")
    plans = [MemoryPlan(6, 256), MemoryPlan(6, 64), MemoryPlan(2, 16), MemoryPlan(1, 4), MemoryPlan(1, 1)]
    timings = time_plans(model, plans, 512, 512, CPU, rounds=5)
    with capsys.disabled():
        print()
        for t in timings:
            print(f"{t.plan.group} layers × {t.plan.chunk} blocks: {t.measured:.3f} s, predicted {t.predicted:.3f} s")
    for most in sorted(t.peak for t in timings):
        fitting = [t for t in timings if t.peak <= most]
        chosen = min(fitting, key=lambda t: (t.predicted, t.peak))
        assert chosen.measured <= 1.15 * fastest_of(fitting).measured, most


@pytest.mark.slow
@pytest.mark.usefixtures("own_time")
def test_the_smallest_plan_at_real_width(capsys: pytest.CaptureFixture[str]) -> None:
    """Width 1280, 2 layers, 512 × 512, float32: memory over the weights, and time against all blocks at once."""
    config = InfDiTConfig(num_layers=2, vector_dim=0)
    model = random_model(config, torch.float32)
    smallest, dense, streamed = MemoryPlan(1, 1), MemoryPlan(2, 16), MemoryPlan(1, 1, "streamed")
    generator = torch.Generator().manual_seed(0)
    x, up = (torch.randn((1, 3, 512, 512), generator=generator) for _ in range(2))
    conditioning = infdit.Conditioning(torch.randn((1, 3, 128, 128), generator=generator), up)
    seconds: dict[str, list[float]] = {}
    for _ in range(3):
        for name, plan in (("smallest", smallest), ("dense", dense), ("streamed", streamed)):
            denoise = infdit.Denoiser(model, conditioning, plan)
            began = time.perf_counter()
            with torch.no_grad():
                denoise(x, 1.0)
            seconds.setdefault(name, []).append(time.perf_counter() - began)
    with PeakMeter([x, up, conditioning.lr]) as meter, torch.no_grad():
        infdit.Denoiser(model, conditioning, smallest)(x, 1.0)
    working = meter.peak["device"]
    median = {name: statistics.median(times) for name, times in seconds.items()}
    with capsys.disabled():
        weights = Weights.of(config, torch.float32).total
        print(f"\nworking memory {working / 2**20:.0f} MiB over weights of {weights / 2**20:.0f} MiB")
        print(", ".join(f"{name} {value:.1f} s" for name, value in median.items()))
        print(f"streamed over resident: {median['streamed'] / median['smallest']:.3f}")
    assert working <= 280 * 2**20
    assert median["smallest"] <= 1.15 * median["dense"]


@pytest.mark.slow
@pytest.mark.usefixtures("own_time")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bar_moves_every_second_and_a_half_at_the_published_width(
    dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one thread, to which a layer of one block is 60 GFLOP, which cannot be parted."""
    model = random_model(InfDiTConfig(num_layers=2), dtype)
    moves: list[float] = []
    image = torch.rand(1, 80, 80, 3)
    infdit.upscale(model, image, steps=2, sampler="euler", progress=lambda *_: moves.append(time.monotonic()))
    longest = max(after - before for before, after in pairwise(moves))
    with capsys.disabled():
        print(f"\n{dtype}: {len(moves)} moves of the bar, {longest:.2f} s between two at most")
    assert longest < 1.5

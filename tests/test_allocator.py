"""What a card must have free for a run: its tensors, as they come and go, through a model of CUDA's allocator."""

from __future__ import annotations

import random

import pytest
import torch
from runs import MUCH, assert_within, cards, least_of, shares

from benchmarks.allocator import MIB, Allocator, Full, least_limit, works
from benchmarks.dry_run import counted
from benchmarks.peak_meter import PeakMeter
from infdit import InfDiTConfig, MemoryPlan
from infdit.memory.plan import SEGMENTS, WeightsKept, Workload
from infdit.memory.planner import fastest_plan

CUDA = torch.device("cuda")


def test_sizes_come_from_segments() -> None:
    allocator = Allocator()
    for size, reserved in ((1, 2), (MIB, 2), (MIB + 1, 22), (9 * MIB, 22), (11 * MIB, 34), (100 * MIB + 1, 136)):
        allocator.allocate(size)
        assert allocator.reserved == reserved * MIB, size


def test_what_is_free_is_used_again_and_neighbours_become_one() -> None:
    allocator = Allocator()
    whole = allocator.allocate(64 * MIB)
    allocator.release(whole)
    pieces = [allocator.allocate(16 * MIB) for _ in range(4)]
    assert allocator.reserved == 64 * MIB
    for i in (0, 2, 1, 3):
        allocator.release(pieces[i])
    allocator.allocate(64 * MIB)
    assert allocator.reserved == 64 * MIB


def test_a_hole_is_not_enough_and_what_is_free_altogether_goes_back() -> None:
    allocator = Allocator(100 * MIB)
    first, kept = allocator.allocate(30 * MIB), allocator.allocate(30 * MIB)
    allocator.release(first)
    allocator.allocate(60 * MIB)  # 30 go back to the driver, which then has 70
    assert allocator.reserved == 90 * MIB
    with pytest.raises(Full):
        allocator.allocate(20 * MIB)
    allocator.release(kept)


def test_the_least_limit_is_found() -> None:
    events = [(1, 30 * MIB), (2, 30 * MIB), (1, -1), (3, 60 * MIB), (2, -1), (3, -1)]
    least = least_limit(events)
    assert works(events, least)
    assert not works(events, least - 2 * MIB)
    assert least == 90 * MIB


def assert_foretold(workload: Workload, plan: MemoryPlan, seed: int = 0) -> PeakMeter:
    """Each device gets along with little more than is foretold for it, which is little more than what it needs."""
    meter = counted(workload, plan, seed=seed)
    for number, (device, held) in enumerate(workload.footprints(plan)):
        least = least_limit(meter.events[f"lazy:{device.index or 0}"])
        told = f"{number} of {workload} {plan}: {least} {held.device}"
        assert least <= 1.1 * held.device, told
        assert held.device <= 1.25 * least + SEGMENTS, told
    return meter


def fastest(workload: Workload, more: float) -> MemoryPlan:
    """Within so many times the least budget."""
    budget = int(more * least_of(workload))
    plan = fastest_plan(workload, budget, MUCH)
    assert workload.footprint(plan).device <= budget
    return plan


@pytest.mark.parametrize(
    ("side", "more", "sampler"),
    [
        (256, 3.0, "euler"),
        pytest.param(768, 3.0, "euler", marks=pytest.mark.slow),
        pytest.param(512, 1.0, "heun", marks=pytest.mark.slow),
    ],
)
def test_the_memory_foretold_is_enough_for_a_real_allocator(side: int, more: float, sampler: str) -> None:
    workload = Workload(InfDiTConfig(num_layers=3), side, side, device=CUDA, sampler=sampler)
    assert_foretold(workload, fastest(workload, more))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "gib", "weights", "layers"),
    [
        (1024, 0.3, "streamed", 3),
        (2048, 0.4, "streamed", 3),
        (4096, 0.4, "streamed", 3),
        (4096, 4.0, "resident", 3),
        (8192, 0.6, "streamed", 3),
        (16384, 1.0, "streamed", 3),
        (2048, 5.0, "resident", 28),
        (4096, 8.0, "resident", 28),
    ],
)
def test_it_is_for_the_promised_sizes(side: int, gib: float, weights: WeightsKept, layers: int) -> None:
    """Streamed: of first, middle and last layer; more only add weights on the host, of which closed forms tell."""
    workload = Workload(InfDiTConfig(num_layers=layers), side, side, device=CUDA, weights=weights)
    plan = fastest_plan(workload, int(gib * 2**30), MUCH)
    peak = assert_foretold(workload, plan).peak
    assert peak["device"] <= gib * 2**30
    assert_within(peak, workload.footprint(plan), saved=2 * 12 * side**2 if plan.images == "device" else 0)


@pytest.mark.parametrize("layers", [(2, 2), pytest.param((1, 1, 1, 1), marks=pytest.mark.slow)], ids=str)
def test_it_is_on_each_of_several_devices(layers: tuple[int, ...]) -> None:
    first, *beside = cards(len(layers))
    config = InfDiTConfig(4, 512, 8, 4, 128, 0)
    workload = Workload(config, 256, 384, device=first, beside=tuple(beside), sampler="euler")
    assert_foretold(workload, MemoryPlan(4, 2, images="host", layers=layers))


def random_workload(rng: random.Random, devices: int = 1, most: float = 11) -> Workload:
    """Sides from 256 pixels to 2^most."""
    config = rng.choice([InfDiTConfig(num_layers=max(3, devices)), InfDiTConfig(8, 512, 8, 4, 128, 768)])
    h, w = (int(2 ** rng.uniform(8, most)) for _ in range(2))
    dtype = rng.choice([torch.bfloat16, torch.float16, torch.float32])
    first, *beside = cards(devices)
    return Workload(config, h, w, 1, dtype, first, rng.choice(["heun", "euler", "dpmpp_2m"]), beside=tuple(beside))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_it_is_for_many_plans(seed: int) -> None:
    rng = random.Random(seed)
    workload = random_workload(rng)
    assert_foretold(workload, fastest(workload, 2 ** rng.uniform(0, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_it_is_for_many_plans_of_several_devices(seed: int) -> None:
    """Any schedule, whether the planner would take it or not, and devices that are some faster, some slower."""
    rng = random.Random(seed)
    devices = rng.choice([2, 4])
    workload = random_workload(rng, devices, most=10)
    plan = MemoryPlan(
        rng.choice([1, 2, 28]), rng.choice([1, 2, 4, 8]), rng.choice(["resident", "streamed"]),
        rng.choice(["device", "host"]), rng.choice(["device", "host"]),
        layers=shares(rng, workload.config.num_layers, devices),
    )  # fmt: skip
    assert_foretold(workload, plan, seed)

"""Peaks counted on fake tensors: as in real runs, as over whole evaluations, and as predicted up to 16384 × 16384."""

import math
import random

import pytest
import torch
from runs import MUCH, assert_within, least_of, random_case, random_model

import infdit
from benchmarks.dry_run import counted_peak
from benchmarks.peak_meter import PeakMeter
from infdit import InfDiTConfig, MemoryPlan
from infdit.memory.plan import Workload
from infdit.memory.planner import fastest_plan

PUBLISHED, CUDA, CPU = InfDiTConfig(), torch.device("cuda"), torch.device("cpu")
MOST_BLOCKS = 2**10  # of a case: counting takes a millisecond for each, many times over


@pytest.mark.parametrize("seed", [41, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 1, 2, 3, 7, 48))])
def test_fake_tensors_count_what_a_real_run_holds(seed: int) -> None:
    config, h, w, plan, dtype, sampler, batch = random_case(random.Random(seed))
    model = random_model(config, dtype)
    with PeakMeter(model.parameters()) as meter:
        infdit.upscale(
            model, torch.rand(batch, -(-h // 4), -(-w // 4), 3), size=(h, w), steps=3, sampler=sampler, plan=plan
        )
    fake = counted_peak(Workload(config, h, w, batch, dtype, CPU, sampler), plan, whole=True)
    assert fake["device"] == pytest.approx(meter.peak["device"], rel=0.02)  # real positions are numbers of 8 bytes
    assert fake["host"] == 0, "one memory"


@pytest.mark.parametrize("seed", [None, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 1, 2, 6, 7, 31))])
def test_the_chunks_where_the_peak_can_lie_are_enough(seed: int | None) -> None:
    """At random, and where layers hold far more than pictures."""
    workload = Workload(InfDiTConfig(2, 512, 4, block_size=16, vector_dim=0), 16, 96, device=CUDA, sampler="euler")
    plan = MemoryPlan(1, 1, hidden="host", images="host")
    if seed is not None:
        rng = random.Random(100 + seed)
        config, h, w, plan, dtype, sampler, _ = random_case(rng)
        workload = Workload(config, h, w, 1, dtype, CPU if rng.random() < 0.5 else CUDA, sampler)
    whole, part = (counted_peak(workload, plan, whole) for whole in (True, False))
    assert part == whole


@pytest.mark.slow
@pytest.mark.parametrize("side", [300, 600, 1500])
def test_what_an_apple_chip_holds_is_counted_in_its_one_memory(side: int) -> None:
    """The pictures given, those on their way and those on the device: nothing is left out for being on the host.

    Blocks are large, for counting takes as long as there are blocks.
    """
    workload = Workload(InfDiTConfig(3, 64, 2, 4, 256, 0), side, side, 2, device=torch.device("mps"), sampler="euler")
    plan = fastest_plan(workload, least_of(workload), MUCH)
    assert_within(counted_peak(workload, plan), workload.footprint(plan), unified=True)


def random_workload(rng: random.Random, most: float = 14) -> Workload:
    """Sides from 64 pixels to 2^most."""
    config = rng.choice(
        [
            PUBLISHED,
            InfDiTConfig(6, 128, 4, 4, 32, 0),
            InfDiTConfig(3, 256, 4, 4, 64, 0),
            InfDiTConfig(8, 512, 8, 4, 128, 768),
        ]
    )
    h, w = (int(2 ** rng.uniform(6, most)) for _ in range(2))
    kind = rng.random()
    if kind < 0.2:
        w = rng.choice([64, 65, 127, 1000])  # a strip
    elif kind < 0.3 and most == 14:
        h = w = rng.choice([4096, 8192, 16384])
    while h * w > MOST_BLOCKS * config.block_size**2:
        h //= 2
    batch = rng.choice([1, 1, 1, 3])
    dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    sampler = rng.choice(list(infdit.samplers.SAMPLERS))
    return Workload(config, h, w, batch, dtype, rng.choice([CUDA, CUDA, CPU]), sampler)


def assert_kept(seed: int, cases: int, most: float = 14) -> None:
    """Counted ≤ predicted ≤ budget, and predicted ≤ 1.25 × counted + 16 MiB, on both tiers."""
    rng = random.Random(seed)
    for _ in range(cases):
        workload = random_workload(rng, most)
        budget = int(least_of(workload) * rng.choice([1, 1.3, 2, 2 ** rng.uniform(0, 5)]))
        plan = fastest_plan(workload, budget, MUCH)
        counted, predicted = counted_peak(workload, plan), workload.footprint(plan)
        try:
            assert plan.peak_bytes == predicted.device
            assert predicted.device <= budget
            assert_within(counted, predicted, workload.unified_memory)
        except AssertionError as error:
            raise AssertionError(f"{workload} {plan} counted {counted} predicted {predicted}: {error}") from error


def test_random_budgets_are_kept() -> None:
    assert_kept(seed=16, cases=1, most=8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 25))
def test_many_random_budgets_are_kept(seed: int) -> None:
    assert_kept(seed, cases=1)


@pytest.mark.parametrize("device", [pytest.param(CUDA, marks=pytest.mark.slow), CPU], ids=str)
def test_least_is_honest(device: torch.device) -> None:
    """No plan at all, whether the planner would look at it or not, holds much less than `least`."""
    workload = Workload(InfDiTConfig(2, 512, 8, 4, 64, 0), 128, 64, 1, torch.float32, device, "euler")
    least, smallest, unified_memory = least_of(workload), math.inf, workload.unified_memory
    for group, chunk in ((1, 1), (2, 1)):
        for weights in ("resident",) if unified_memory else ("resident", "streamed"):
            for hidden in ("device",) if unified_memory else ("device", "host"):
                for images in ("device",) if unified_memory else ("device", "host"):
                    plan = MemoryPlan(group, chunk, weights, hidden, images)
                    smallest = min(smallest, counted_peak(workload, plan)["device"])
    assert smallest <= least
    assert smallest >= (least - 16 * 2**20) / 1.25

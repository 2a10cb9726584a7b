"""The planner: budgets are kept, the choice is the best of those enumerated, what cannot be is refused with numbers."""

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import assert_within, random_model

import infdit
from benchmarks.peak_meter import PeakMeter
from infdit import BudgetTooSmall, InfDiTConfig, MemoryPlan, plan_memory
from infdit.device import one_memory
from infdit.grid import BlockGrid
from infdit.memory import measure
from infdit.memory.cost import MAX_LAYER_SECONDS, CostModel, seconds_per_evaluation
from infdit.memory.measure import Speed
from infdit.memory.measure import measured as measure_device
from infdit.memory.plan import Workload
from infdit.memory.planner import (
    GIB,
    candidates,
    fastest_plan,
    format_seconds,
    free_bytes,
    schedules,
    thrifty_plan,
)

PUBLISHED, BF16, CUDA, CPU = InfDiTConfig(), torch.bfloat16, torch.device("cuda"), torch.device("cpu")
MUCH = 2**50


def seconds(config: InfDiTConfig, h: int, w: int, plan: MemoryPlan, dtype: torch.dtype, device: torch.device) -> float:
    return seconds_per_evaluation(Workload(config, h, w, 1, dtype, device), plan)


def random_request(rng: random.Random) -> dict:
    config = rng.choice([PUBLISHED, InfDiTConfig(6, 128, 4, 4, 32, 0), InfDiTConfig(12, 512, 8, 4, 64, 768)])
    h, w = (int(2 ** rng.uniform(6, 14)) for _ in range(2))
    if rng.random() < 0.2:
        w = 64  # a strip
    return {
        "config": config,
        "height": h,
        "width": w,
        "batch": rng.choice([1, 1, 4]),
        "dtype": rng.choice([torch.bfloat16, torch.float16, torch.float32]),
        "device": rng.choice([CUDA, CUDA, CPU]),
        "sampler": rng.choice(list(infdit.samplers.SAMPLERS)),
    }


def least_of(request: dict) -> int:
    with pytest.raises(BudgetTooSmall) as error:
        plan_memory(**request, budget=1, host_budget=MUCH)
    return error.value.least


def test_random_budgets_are_kept_and_least_is_honest() -> None:
    rng = random.Random(0)
    for _ in range(20):
        request = random_request(rng)
        least = least_of(request)
        for budget in (least, int(least * rng.uniform(1, 3)), int(least * rng.uniform(3, 100))):
            plan = plan_memory(**request, budget=budget, host_budget=MUCH)
            assert plan.peak_bytes is not None
            assert plan.peak_bytes <= budget
            assert plan.reason
        with pytest.raises(BudgetTooSmall, match="at least") as error:
            plan_memory(**request, budget=least - 1, host_budget=MUCH)
        assert error.value.least == least


def test_no_schedule_that_fits_is_faster_and_time_never_rises_with_the_budget() -> None:
    rng = random.Random(1)
    for _ in range(3):
        request = random_request(rng)
        config, h, w, dtype, device = (request[k] for k in ("config", "height", "width", "dtype", "device"))
        grid = BlockGrid.covering(h, w, config.block_size)
        one = device.type == "cpu"
        workload = Workload(config, h, w, request["batch"], dtype, device, request["sampler"])
        plans = list(schedules(config, grid, one, CostModel.of(device, dtype).longest_chunk(config)))
        known = [(workload.footprint(plan).device, seconds(config, h, w, plan, dtype, device)) for plan in plans]
        least, last = least_of(request), float("inf")
        for factor in (1, 1.2, 2, 5, 20, 1000):
            budget = int(least * factor)
            chosen = plan_memory(**request, budget=budget, host_budget=MUCH)
            time = seconds(config, h, w, chosen, dtype, device)
            assert all(peak > budget or other >= time for peak, other in known)
            assert time <= last
            last = time


def test_a_layer_of_a_chunk_is_short_so_that_the_bar_moves_and_a_run_can_be_stopped() -> None:
    """Or it is of one block, which is as small as pieces are."""
    chunks: dict[str, int] = {}
    for name, config in (("published", PUBLISHED), ("small", InfDiTConfig(6, 128, 4, 4, 32, 0))):
        plan = plan_memory(config, 2048, 2048, dtype=torch.float32, device="cpu", budget=MUCH, host_budget=MUCH)
        grid = BlockGrid.covering(2048, 2048, config.block_size)
        visits = -(-grid.blocks // plan.chunk) * config.num_layers
        each = seconds(config, 2048, 2048, plan, torch.float32, CPU) / visits
        assert plan.chunk == 1 or each < 2 * MAX_LAYER_SECONDS
        chunks[name] = plan.chunk
    assert chunks["small"] > 16 > chunks["published"]


@pytest.mark.parametrize(("side", "gib"), [(4096, 0.4), (8192, 0.6), (16384, 1.0)])
def test_the_promise(side: int, gib: float) -> None:
    plan = plan_memory(PUBLISHED, side, side, dtype=BF16, device="cuda", budget=int(gib * GIB), host_budget=MUCH)
    assert plan.weights == "streamed"


def test_weights_stay_where_there_is_room() -> None:
    plan = MemoryPlan(1, 4, "resident", "host", "host")
    assert Workload(PUBLISHED, 4096, 4096, device=CUDA).footprint(plan).device <= 4 * GIB
    chosen = plan_memory(PUBLISHED, 4096, 4096, dtype=BF16, device="cuda", budget=24 * GIB, host_budget=MUCH)
    assert chosen.weights == "resident"


def test_a_host_that_is_too_small_is_refused_with_the_numbers() -> None:
    request = {"config": PUBLISHED, "height": 16384, "width": 16384, "dtype": BF16, "device": "cuda", "budget": GIB}
    with pytest.raises(BudgetTooSmall, match=r"of host memory, and 32 GiB is free") as error:
        plan_memory(**request, host_budget=32 * GIB)
    assert error.value.least > 60 * GIB
    plan_memory(**request, host_budget=error.value.least)


def test_runs_on_a_cpu_stay_within_their_budget() -> None:
    rng = random.Random(2)
    for _ in range(2):
        config = InfDiTConfig(rng.randint(2, 5), 64, 2, 4, rng.choice([16, 32]), 0)
        h, w, batch = rng.randint(60, 200), rng.randint(60, 200), rng.choice([1, 2])
        sampler = rng.choice(list(infdit.samplers.SAMPLERS))
        request = {"config": config, "height": h, "width": w, "batch": batch, "sampler": sampler}
        request["dtype"] = torch.float32
        budget = int(least_of(request) * rng.choice([1, 1.3, 3]))
        model = random_model(config, torch.float32)
        plan = plan_memory(**request, budget=budget)
        image = torch.rand(batch, -(-h // 4), -(-w // 4), 3)
        with PeakMeter(model.parameters()) as meter:
            infdit.upscale(model, image, size=(h, w), steps=2, sampler=sampler, budget=budget)
        assert plan.peak_bytes is not None
        assert meter.peak["device"] <= plan.peak_bytes <= budget
        held = Workload(config, h, w, batch, torch.float32, sampler=sampler).footprint(plan)
        assert_within(meter.peak, held, unified=True)


def test_upscale_refuses_a_budget_that_is_too_small_before_it_starts() -> None:
    model = infdit.load_model("mini", device="cpu")
    with pytest.raises(BudgetTooSmall, match=r"1 MiB is too little for 256×256: at least \d+\.\d+ MiB"):
        infdit.upscale(model, torch.zeros(1, 64, 64, 3), budget=2**20)


def test_without_pinned_memory_plans_are_priced_by_plain_copies() -> None:
    """They take longer, no copy hides behind arithmetic, and no more is pinned than may be."""
    workload, plan = Workload(PUBLISHED, 4096, 4096, 1, BF16, CUDA), MemoryPlan(1, 4, "streamed", "host", "host")
    held = workload.footprint(plan)
    pinned = held.host_weights + held.host_hidden
    for pinnable, expected in ((None, True), (pinned, True), (pinned // 2, False), (0, False)):
        asked = replace(workload, pinnable=pinnable)
        plans = [c.plan for c in candidates(asked) if c.plan.weights == "streamed" and c.plan.hidden == "host"]
        least = fastest_plan(asked, int(0.4 * GIB), MUCH)
        assert plan in plans or not expected
        assert least.pinned is expected
        nothing_away = [c.plan for c in candidates(asked) if c.held.host_weights + c.held.host_hidden == 0]
        assert all(c.pinned for c in nothing_away)
        if not expected:
            assert least.host_bytes == workload.footprint(replace(least, pinned=False)).host < held.host
    plain = replace(plan, pinned=False)
    assert workload.footprint(plain).device == held.device
    times = [seconds(PUBLISHED, 4096, 4096, p, BF16, CUDA) for p in (MemoryPlan(1, 4), plain)]
    traffic = held.host_weights * 0.8 + 2 * 27 * held.host_hidden * 0.8
    assert times[1] - times[0] > traffic / 20e9, "the whole of the copies, at less than a pinned copy's speed"


def test_without_pinned_memory_a_plan_that_copies_less_is_preferred() -> None:
    workload = Workload(PUBLISHED, 4096, 4096, 1, BF16, CUDA)
    budget = 3 * GIB
    chosen = fastest_plan(replace(workload, pinnable=0), budget, MUCH)
    assert chosen != replace(fastest_plan(workload, budget, MUCH), pinned=False)
    assert chosen == fastest_plan(replace(workload, pinnable=0), budget, MUCH)


def test_a_device_is_measured_once_and_soon() -> None:
    measured = measure_device.__wrapped__
    measured(CPU, torch.float32)
    began = time.perf_counter()
    speed = measured(CPU, torch.float32)
    assert time.perf_counter() - began < 1
    a = torch.ones(512, 512)
    began = time.perf_counter()
    a @ a
    assert 0.05 < speed.flops / (2 * 512**3 / (time.perf_counter() - began)) < 20
    assert (speed.bus, speed.locking) == (None, None), "one memory"
    assert measure_device(CPU, torch.float32) is measure_device(CPU, torch.float32)
    for kind in ("xpu", "mps", "privateuseone"):
        assert measured(torch.device(kind), torch.float32) is None, "not here"


def figures(monkeypatch: pytest.MonkeyPatch, *speed: float) -> None:
    monkeypatch.setattr(measure, "measured", lambda device, dtype: Speed(*speed))


def test_times_and_plans_follow_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a card a hundred times as slow copies cost little; of one whose bus is slow what is copied least is taken."""
    workload, away = Workload(PUBLISHED, 4096, 4096, 1, BF16, CUDA), MemoryPlan(1, 4, "streamed", "host", "host")
    seconds, plans = [], []
    for speed in ((200e12, 20e9, 4e9), (2e12, 20e9, 4e9), (200e12, 1e9, 4e9)):
        figures(monkeypatch, *speed)
        seconds.append([seconds_per_evaluation(workload, plan) for plan in (MemoryPlan(1, 4), away)])
        plans.append(fastest_plan(workload, 3 * GIB, MUCH))
    fast, slow, narrow = seconds
    assert 50 < slow[0] / fast[0] < 150
    assert slow[1] / slow[0] < fast[1] / fast[0] < narrow[1] / narrow[0] / 2
    assert plans[2].hidden == "device" or plans[2].group > plans[0].group


def test_what_is_pinned_is_paid_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, away = Workload(PUBLISHED, 2048, 2048, 2, BF16, CUDA), MemoryPlan(1, 4, "streamed", "host")
    held = workload.footprint(away)
    pinned = held.host_weights + held.host_hidden
    figures(monkeypatch, 200e12, 20e9, 4e9)
    once, often = (seconds_per_evaluation(replace(workload, evaluations=n), away) for n in (1, 10))
    assert once - often == pytest.approx(0.9 * pinned / 4e9 / 2)
    for plan in (MemoryPlan(1, 4), replace(away, pinned=False)):
        once, often = (seconds_per_evaluation(replace(workload, evaluations=n), plan) for n in (1, 10))
        assert once == often


@pytest.mark.parametrize("side", [1024, 4096])
def test_the_thrifty_plan_in_place_moves_nothing(side: int) -> None:
    workload = Workload(PUBLISHED, side, side, 1, BF16, CUDA)
    away, here = (thrifty_plan(workload, MUCH, in_place=kept) for kept in (False, True))
    assert (here.weights, here.hidden) == ("resident", "device")
    times = [seconds_per_evaluation(workload, plan) for plan in (fastest_plan(workload, MUCH, MUCH), here, away)]
    assert times[0] <= times[1] <= 1.1 * times[0]
    assert (away.peak_bytes or 0) <= (here.peak_bytes or 0)
    chosen = fastest_plan(workload, 2 * (here.peak_bytes or 0), MUCH)
    assert (chosen.weights, chosen.hidden) == ("resident", "device"), "library and shell too, if half is enough"
    streamed = thrifty_plan(replace(workload, weights="streamed"), MUCH, in_place=True)
    assert streamed.weights == "streamed", "where nothing else may be"


@pytest.fixture
def integrated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A graphics card that is a part of the processor."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(is_integrated=1))
    one_memory.cache_clear()
    yield
    one_memory.cache_clear()


@pytest.mark.usefixtures("integrated")
@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_where_there_is_one_memory_everything_stays_in_place_within_one_budget(kind: str) -> None:
    workload = Workload(PUBLISHED, 2048, 1024, 2, BF16, torch.device(kind))
    for candidate in candidates(workload):
        plan, held = candidate.plan, candidate.held
        assert (plan.weights, plan.hidden, plan.images, held.host) == ("resident", "device", "device", 0)
    plan = MemoryPlan(1, 4)
    apart = replace(workload, device=torch.device("xpu")).footprint(plan)
    assert apart.device < workload.footprint(plan).device <= apart.device + apart.host, "pictures given count too"
    least = least_of({"config": PUBLISHED, "height": 2048, "width": 1024, "dtype": BF16, "device": kind})
    assert plan_memory(PUBLISHED, 2048, 1024, device=kind, budget=least, host_budget=0).peak_bytes == least


@pytest.mark.usefixtures("integrated")
@pytest.mark.parametrize(("by_driver", "by_system"), [(6, 9), (9, 6)])
def test_no_more_is_free_in_one_memory_than_driver_and_system_say(
    by_driver: int, by_system: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_number(device: int | None) -> tuple[int, int]:
        assert device is None or isinstance(device, int), "as an older PyTorch wants it"
        return (by_driver - 1) * GIB, 16 * GIB

    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=by_system * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", by_number)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: (by_driver + 2) * GIB, raising=False)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 2 * GIB)
    for kind in ("cuda", "mps"):
        assert free_bytes(torch.device(kind)) == int(6 * GIB * 0.9)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "1 s"), (119, "119 s"), (121, "2 min"), (7199, "120 min"), (7200, "2.0 h"), (1e6, "12 days")],
)
def test_a_time_foretold_has_no_more_digits_than_are_known(seconds: float, words: str) -> None:
    assert format_seconds(seconds) == words

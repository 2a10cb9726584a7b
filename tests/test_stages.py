"""Several devices on one picture: the same in every bit, none holds more than foretold, and one that fails ends all."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from PIL import Image
from runs import cards, shares
from sweeps import EXACT, PERIOD, SIZES, random_inputs, reference

import infdit
from benchmarks.dry_run import counted
from infdit import Denoiser, InfDiTConfig, MemoryPlan, Report, upscale
from infdit.__main__ import main
from infdit.device import DeviceFailed
from infdit.memory.cost import CostModel, seconds_per_evaluation
from infdit.memory.plan import SEGMENTS, Workload
from infdit.memory.planner import BudgetTooSmall, PlannedRun, fastest_plan
from infdit.model import InfDiT, Layer
from infdit.samplers import SAMPLERS

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    assert not any(thread.name.startswith("infdit") for thread in threading.enumerate())


@pytest.mark.parametrize("devices", [1, 2, 3, 5])
def test_any_number_of_devices_equals_the_dense_transcription(devices: int, make_model: MakeModel) -> None:
    rng = random.Random(devices)
    model, weights = make_model(period=PERIOD, **SIZES | {"layers": 5})
    for _ in range(6):
        rows, columns, batch = rng.randint(1, 4), rng.randint(1, 4), rng.choice([1, 2])
        x, conditioning, sigma = random_inputs(rows, columns, batch)
        plan = MemoryPlan(
            rng.choice([1, 2, 9]), rng.randint(1, rows * columns), rng.choice(["resident", "streamed"]),
            rng.choice(["device", "host"]), rng.choice(["device", "host"]), rng.choice(["rows", "columns"]),
            layers=shares(rng, 5, devices),
        )  # fmt: skip
        expected = reference(weights, x, sigma, conditioning, positions="continuous")
        result = Denoiser(model, conditioning, plan, device=[CPU] * devices)(x, sigma)
        torch.testing.assert_close(result, expected, msg=lambda m, plan=plan: f"{plan}: {m}", **EXACT)


@pytest.mark.parametrize(
    ("layers", "dtype"),
    [
        ((3, 3), torch.bfloat16),
        ((1, 1, 0, 2, 2), torch.float32),
        ((0, 6), torch.float32),
        pytest.param((1, 5), torch.float32, marks=pytest.mark.slow),
        pytest.param((1, 1, 0, 2, 2), torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_the_picture_of_one_device_in_every_bit(
    layers: tuple[int, ...], dtype: torch.dtype, noisy_mini: InfDiT
) -> None:
    model = infdit.load_model("mini", dtype=dtype, device="cpu")
    model.defaults = noisy_mini.defaults
    image = torch.rand((2, 9, 17, 3), generator=torch.Generator().manual_seed(0))
    options = {"steps": 2, "sampler": "dpmpp_2m", "seed": 5}
    one = upscale(model, image, plan=MemoryPlan(6, 2), **options)
    seen: list[tuple[int, int]] = []
    several = upscale(
        model, image, plan=MemoryPlan(6, 2, images="host", layers=layers), device=["cpu"] * len(layers),
        progress=lambda done, total, preview: seen.append((done, total)), **options,
    )  # fmt: skip
    assert torch.equal(one, several)
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_command_line_writes_the_same_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Image.fromarray((torch.rand(30, 40, 3) * 255).byte().numpy()).save(tmp_path / "in.png")
    for name, devices in (("one", "cpu"), ("two", "cpu,cpu")):
        out = str(tmp_path / f"{name}.png")
        assert main(["upscale", str(tmp_path / "in.png"), "-o", out, "--devices", devices]) == 0
    one, two = (Image.open(tmp_path / f"{name}.png") for name in ("one", "two"))
    assert one.tobytes() == two.tobytes()


class Trouble:
    """Something goes wrong in a call of a layer in one of the threads; without a name in the caller's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, call: int, caller: bool = False) -> None:
        original, self.calls = Layer.forward, 0

        def forward(layer: Layer, *inputs: object) -> torch.Tensor:
            if (threading.current_thread() is threading.main_thread()) == caller:
                self.calls += 1
                if self.calls == call:
                    raise error
            return original(layer, *inputs)

        monkeypatch.setattr(Layer, "forward", forward)


def run(model: InfDiT, height: int = 30, **options: object) -> torch.Tensor:
    image = torch.rand((1, height, 30, 3), generator=torch.Generator().manual_seed(0))
    plan = MemoryPlan(6, 2, images="host", layers=(2, 2, 2))
    return upscale(model, image, **{"plan": plan, "device": ["cpu"] * 3, "steps": 2, "sampler": "euler"} | options)


@pytest.mark.parametrize("caller", [False, True])
def test_a_device_that_fails_ends_the_run_with_one_sentence(
    caller: bool, noisy_mini: InfDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trouble(monkeypatch, RuntimeError("CUDA error: unspecified launch failure\nCompile with…"), 3, caller)
    with pytest.raises(DeviceFailed, match=r"^cpu, one of several devices, failed \(CUDA error: unspec.*\): try witho"):
        run(noisy_mini)


@pytest.mark.parametrize("caller", [False, True])
def test_memory_that_runs_out_on_one_device_is_planned_anew(
    caller: bool, noisy_mini: InfDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, report = run(noisy_mini), Report()
    Trouble(monkeypatch, torch.cuda.OutOfMemoryError("CUDA out of memory."), 5, caller)
    result = run(noisy_mini, report=report)
    assert len(report.replanned) == 1
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


class StopError(RuntimeError):
    """The user's wish; ComfyUI's is no RuntimeError, others' may be."""


def test_a_stop_at_any_move_of_the_bar_ends_all_and_keeps_nothing(noisy_mini: InfDiT) -> None:
    moves: list[int] = []
    run(noisy_mini, progress=lambda done, total, preview: moves.append(done))
    gc.collect()
    before = sum(type(x) is torch.Tensor for x in gc.get_objects())
    for stop in random.Random(0).sample(range(len(moves) // 2), 4):
        count = iter(range(len(moves) + 1))

        def progress(done: int, total: int, preview: object, stop: int = stop, count: Iterator[int] = count) -> None:
            if next(count, stop) >= stop:
                raise StopError

        with pytest.raises(StopError) as caught:
            run(noisy_mini, progress=progress)
        del caught
        gc.collect()
        assert sum(type(x) is torch.Tensor for x in gc.get_objects()) <= before


def test_a_stop_while_a_picture_is_shown_is_no_failure_of_a_device(noisy_mini: InfDiT) -> None:
    def painted(canvas: object, up: object) -> None:
        raise StopError

    x, conditioning, _ = random_inputs(6, 6, 1)
    options = {"plan": MemoryPlan(6, 4, layers=(3, 3)), "device": [CPU, CPU], "painted": painted}
    with pytest.raises(StopError):
        Denoiser(noisy_mini, replace(conditioning, clip_embedding=None), **options)(x.float(), 1.0)


def test_layers_that_do_not_fit_the_model_are_refused(noisy_mini: InfDiT) -> None:
    for layers in ((3, 2), (7, -1), (2, 2, 1, 1)):
        with pytest.raises(ValueError, match=r"layers .* over 3 devices must be all 6, some on each"):
            run(noisy_mini, plan=MemoryPlan(6, 2, layers=layers))


# foretold


MORE = (2, 2), (1, 1, 1, 1), (2, 0, 2)


@pytest.mark.parametrize("layers", [(1, 3), *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)], ids=str)
def test_no_device_holds_more_than_is_foretold_for_it(layers: tuple[int, ...]) -> None:
    first, *beside = cards(len(layers))
    config = InfDiTConfig(4, 256, 4, 4, 64, 0)
    workload = Workload(config, 192, 128, device=first, beside=tuple(beside), sampler="euler")
    plan = MemoryPlan(4, 2, images="host", layers=layers)
    meter = counted(workload, plan, whole=True)
    for device, held in workload.footprints(plan):
        found = meter.most[f"lazy:{device.index}"]
        assert found <= held.device - SEGMENTS <= 1.25 * found + 2**21, device
    assert meter.peak["host"] <= workload.footprint(plan).host


def published(devices: int, size: int = 4096, **given: object) -> Workload:
    first, *beside = cards(devices)
    return Workload(InfDiTConfig(), size, size, device=first, beside=tuple(beside), **given)


def test_equal_devices_share_evenly_and_each_more_saves_time() -> None:
    seconds = []
    for devices, layers in ((2, (14, 14)), (4, (7, 7, 7, 7))):
        plan = fastest_plan(published(devices), 24 * GIB, 64 * GIB)
        assert plan.layers == layers
        assert plan.peak_bytes is not None
        assert plan.peak_bytes <= 24 * GIB
        seconds.append(seconds_per_evaluation(published(devices), plan))
    assert seconds[1] < 0.55 * seconds[0]


def test_a_device_that_is_twice_as_fast_takes_twice_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    original = CostModel.of.__func__

    def of(cls: type, device: torch.device, dtype: torch.dtype) -> CostModel:
        costs = original(cls, device, dtype)
        return replace(costs, flops=costs.flops / (2 if device.index == 1 else 1), launch_overhead=0)

    monkeypatch.setattr(CostModel, "of", classmethod(of))
    assert fastest_plan(published(2), 48 * GIB, 64 * GIB).layers == (19, 9)


@pytest.mark.parametrize("budget", [None, 11 * GIB])
def test_each_device_takes_what_it_has_room_for(budget: int | None) -> None:
    workload = published(2)
    free = {0: 12 * GIB, 1: 3 * GIB}
    plan = fastest_plan(workload, budget, 64 * GIB, free=lambda device: free[device.index])
    assert plan.layers[0] > plan.layers[1] > 0
    for device, held in workload.footprints(plan):
        assert held.device <= min(budget or 2**63, free[device.index])
    smaller = PlannedRun(workload, plan, lambda device: free[device.index] // 2).smaller()
    for device, held in smaller.workload.footprints(smaller.plan):
        assert held.device <= free[device.index] // 2


def test_where_there_is_no_room_for_all_layers_the_first_device_does_it_alone() -> None:
    plan = fastest_plan(published(2), GIB, 64 * GIB)
    assert plan.layers == ()
    assert plan == fastest_plan(published(1), GIB, 64 * GIB)
    with pytest.raises(BudgetTooSmall):
        fastest_plan(published(2), GIB // 10, 64 * GIB)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "dpmpp_2m"])  # of which every bit is compared above
def test_any_sampler(sampler: str, noisy_mini: InfDiT) -> None:
    options: dict[str, object] = {"sampler": sampler, "steps": 3, "height": 15}
    assert torch.equal(run(noisy_mini, **options), run(noisy_mini, **options, plan=MemoryPlan(6, 2), device="cpu"))

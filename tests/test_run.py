"""Memory that runs out in the middle of a run: a smaller plan, the same picture; after the smallest, one sentence."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import infdit
from benchmarks.dry_run import ACCELERATOR, FakeAccelerator
from benchmarks.peak_meter import PeakMeter
from infdit import BudgetTooSmall, Conditioning, MemoryPlan, OutOfMemory, Report, upscale
from infdit.device import PinFailed, out_of_memory
from infdit.memory.offload import HostMemory
from infdit.memory.plan import Workload
from infdit.memory.planner import PlannedRun
from infdit.model import InfDiT, Layer
from infdit.run import Run
from infdit.samplers import Denoise, SamplerInfo, get_sampler
from infdit.upscale import upscale_batch

STEPS = 3


@pytest.fixture
def mini(noisy_mini: InfDiT) -> InfDiT:
    return noisy_mini


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand((1, 14, 20, 3), generator=torch.Generator().manual_seed(0))


class FullDevice:
    """Runs out of memory in the calls of a layer that are named, as another program that takes it would have it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: set[int] | None) -> None:
        self.calls, self.failing = 0, failing
        original = Layer.forward

        def forward(layer: Layer, *inputs: object) -> torch.Tensor:
            self.calls += 1
            if self.failing is None or self.calls in self.failing:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return original(layer, *inputs)

        monkeypatch.setattr(Layer, "forward", forward)


def calls_per_evaluation(model: InfDiT, image: torch.Tensor, plan: MemoryPlan) -> int:
    seen: list[int] = []
    upscale(model, image, steps=1, sampler="euler", plan=plan, progress=lambda done, total, preview: seen.append(done))
    return len(set(seen))


@pytest.mark.parametrize(
    ("sampler", "moments"), [("heun", (0.5, 1.5, 2.5)), *((s, (1.5,)) for s in infdit.samplers.SAMPLERS if s != "heun")]
)
def test_the_step_is_repeated_with_a_smaller_plan_and_the_picture_is_the_same(
    mini: InfDiT, image: torch.Tensor, sampler: str, moments: tuple[float, ...], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """In the first, second or third evaluation."""
    plan = MemoryPlan(6, 4)
    options = {"steps": STEPS, "sampler": sampler, "sigma_max": 5.0, "seed": 3, "plan": plan}
    expected = upscale(mini, image, **options)
    each = calls_per_evaluation(mini, image, plan)
    for when in moments:
        report, done = Report(), []
        caplog.clear()
        with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
            FullDevice(patch, {int(when * each)})
            progress = lambda n, total, preview, done=done: done.append((n, total))  # noqa: E731
            result = upscale(mini, image, report=report, progress=progress, **options)
        assert (result - expected).abs().max() < 1e-4
        assert len([r for r in caplog.records if "out of memory: going on" in r.message]) == 1
        assert len(report.replanned) == 1
        assert "the picture is the same" in report.replanned[0]
        assert report.plan is not None
        assert report.plan.peak_bytes is not None
        assert report.plan != plan
        assert done[-1][0] == done[-1][1], "the bar ends full although a step was repeated"
        assert len(report.seconds) == STEPS


@pytest.mark.parametrize("when", [0.5, 0.95], ids=["in the first pass", "in the last pass"])
def test_memory_that_runs_out_in_any_pass(mini: InfDiT, when: float, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand((1, 9, 7, 3), generator=torch.Generator().manual_seed(0))
    plan, options, each = MemoryPlan(6, 4), {"scale": 7.0, "steps": 1, "sampler": "euler"}, mini.config.num_layers
    expected = upscale(mini, image, plan=plan, **options)
    first, last = (-(-36 // 32) * -(-28 // 32) // 4 + 1) * each, (-(-63 // 32) * -(-49 // 32) // 4) * each
    FullDevice(monkeypatch, {int(first * when) if when < 0.9 else first + last - 1})
    report, done = Report(), []
    progress = lambda n, total, preview: done.append((n, total))  # noqa: E731
    result = upscale(mini, image, plan=plan, report=report, progress=progress, **options)
    assert (result - expected).abs().max() < 1e-4
    assert len(report.replanned) == 1
    assert done[-1][0] == done[-1][1]


def test_what_the_failed_attempt_held_is_free_before_the_next_begins(
    mini: InfDiT, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = MemoryPlan(6, 999)
    FullDevice(monkeypatch, {6})  # the last layer: hidden states, keys and values are there
    live: list[int] = []
    with PeakMeter() as meter:
        original = PlannedRun.smaller

        def smaller(self: PlannedRun) -> PlannedRun:
            live.append(meter.live["device"])
            return original(self)

        monkeypatch.setattr(PlannedRun, "smaller", smaller)
        upscale(mini, image, plan=plan, steps=1, sampler="euler")
    pictures = 3 * 4 * 64 * 96
    assert len(live) == 1
    assert live[0] < 6 * pictures + 2**17, "pictures only: input, result, lr, up, x"


def test_several_times_and_each_plan_is_smaller(mini: InfDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand((1, 40, 40, 3), generator=torch.Generator().manual_seed(2))
    expected = upscale(mini, image, steps=2, sampler="heun", sigma_max=5.0)
    FullDevice(monkeypatch, {3, 60})
    plans: list[int] = []
    report = Report()

    def progress(done: int, total: int, preview: object) -> None:
        assert report.plan is not None
        plans.append(report.plan.peak_bytes or 0)

    result = upscale(mini, image, steps=2, sampler="heun", sigma_max=5.0, report=report, progress=progress)
    assert (result - expected).abs().max() < 1e-4
    assert len(report.replanned) == 2
    distinct = list(dict.fromkeys(plans))
    assert len(distinct) == 3
    assert distinct == sorted(distinct, reverse=True)


def test_after_the_smallest_plan_one_clear_error(
    mini: InfDiT, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = FullDevice(monkeypatch, None)
    with pytest.raises(OutOfMemory, match=r"^out of memory on cpu, and no smaller plan works: .* at least .* MiB"):
        upscale(mini, image, steps=1, sampler="euler")
    assert full.calls < 30, "it gives up soon"
    monkeypatch.undo()
    assert upscale(mini, image, steps=1, sampler="euler").isfinite().all(), "a good run after it"


def test_with_the_least_budget_there_is_nothing_smaller(
    mini: InfDiT, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BudgetTooSmall) as refusal:
        upscale(mini, image, steps=1, sampler="euler", budget=1)
    full = FullDevice(monkeypatch, None)
    with pytest.raises(OutOfMemory):
        upscale(mini, image, steps=1, sampler="euler", budget=refusal.value.least)
    assert full.calls == 1


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), False),
        (RuntimeError("CUDA error: out of memory"), False),
    ],
    ids=["python", "allocator", "cuda", "cuda error"],
)
def test_a_full_host_is_not_answered_with_a_plan_that_takes_more_of_it(
    mini: InfDiT, image: torch.Tensor, error: Exception, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside an accelerator; on a CPU there is one memory, and a smaller plan is the answer."""
    smaller: list[MemoryPlan] = []

    def shrink(planned: PlannedRun) -> PlannedRun:
        smaller.append(planned.plan)
        raise OutOfMemory("no smaller plan")

    def fail(*inputs: object, **more: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(PlannedRun, "smaller", shrink)
    workload = Workload(mini.config, 64, 64, device=torch.device("cuda"))
    run = Run(mini, PlannedRun(workload, MemoryPlan(images="host"), lambda device: 0), lambda done: None, Report())
    monkeypatch.setattr("infdit.run.distribute_weights", fail)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    lr = torch.zeros(1, 3, 8, 8)
    with pytest.raises(OutOfMemory, match=r"^the computer's own memory is full" if full else r"^no smaller plan"):
        run.denoiser(Conditioning(lr, lr))(lr, 1.0)
    assert len(smaller) == (not full)


def test_a_foreign_sampler_recovers_too(
    mini: InfDiT, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that knows nothing of steps: three evaluations at one noise level, the second of which fails."""
    calls: list[float] = []

    def sample(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, callback: object) -> torch.Tensor:
        for _ in range(3):
            calls.append(float(sigmas[0]))
            x = x + 0.5 * (denoise(x, sigmas[0]) - x)
        return x

    method = SamplerInfo(sample, 3, 4, 4)
    options = {"sampler": method, "sigmas": torch.tensor([0.1, 0.0]), "plan": MemoryPlan(6, 4)}
    expected = upscale(mini, image, **options)
    each = calls_per_evaluation(mini, image, MemoryPlan(6, 4))
    calls.clear()
    FullDevice(monkeypatch, {int(1.5 * each)})
    report = Report()
    assert (upscale(mini, image, report=report, **options) - expected).abs().max() < 1e-4
    assert len(report.replanned) == 1
    assert len(calls) == 3, "the sampler was not started anew"


def test_after_a_failure_the_pictures_leave_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on fake tensors: with a plan that keeps pictures on the host, only the sampler's own stay where it is."""
    config = infdit.InfDiTConfig(num_layers=2, hidden_size=16, num_heads=2, block_size=64, vector_dim=0)
    target = (256, 256)
    plans = [MemoryPlan(2, 1), MemoryPlan(1, 1, "streamed", "host", "host")]
    live: list[int] = []
    sigmas = torch.tensor([0.1, 0.0])
    with FakeTensorMode(allow_non_fake_inputs=True), FakeAccelerator():
        model = InfDiT(config).requires_grad_(False)
        report = Report()
        planned = PlannedRun(Workload(config, *target, device=ACCELERATOR), plans[0], lambda device: 0)
        run = Run(model, planned, lambda done: None, report)
        with PeakMeter(device=ACCELERATOR) as meter:
            original = Layer.forward

            def smaller(self: PlannedRun) -> PlannedRun:
                live.append(meter.live["device"])
                return replace(self, plan=plans[1])

            monkeypatch.setattr(PlannedRun, "smaller", smaller)

            def forward(layer: Layer, *inputs: object) -> torch.Tensor:
                live.append(meter.live["device"])
                if len(live) == 1:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
                return original(layer, *inputs)

            monkeypatch.setattr(Layer, "forward", forward)
            image, noises = torch.empty(1, 64, 64, 3), [iter([torch.empty(1, 3, 256, 256)])]
            upscale_batch(run, image, None, get_sampler("euler"), [sigmas], noises, lambda state: None)
    picture = 3 * 4 * 256 * 256
    assert len(report.replanned) == 1
    assert live[0] > 2 * picture, "x, up and lr"
    assert live[1] == picture, "x, which the sampler has; nothing else when a smaller plan is sought in what is free"
    assert live[2] < 1.5 * picture, "and what is computed now"


class FailingPin:
    """Of the tensors that are asked for on the host, the one of this number cannot be had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.calls = 0
        original = HostMemory.empty

        def empty(memory: HostMemory, *shape: object) -> torch.Tensor:
            self.calls += 1
            if self.calls == number:
                raise PinFailed("main memory could not be pinned (CUDA error: out of memory)")
            return original(memory, *shape)

        monkeypatch.setattr(HostMemory, "empty", empty)


def test_a_pin_that_fails_is_no_full_card() -> None:
    """For a card that is not here nothing can be pinned: a real failure."""
    with pytest.raises(PinFailed, match=r"^main memory could not be pinned \(.+\): use a MemoryPlan with "):
        HostMemory(9, torch.device("cuda")).empty((9,), torch.float32)
    assert not out_of_memory(PinFailed("CUDA error: out of memory"))


def test_a_pin_that_fails_at_any_time_changes_neither_picture_nor_plan(
    mini: InfDiT, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = MemoryPlan(2, 3, "streamed", "host", "host")
    options = {"plan": plan, "steps": 2, "sampler": "euler"}
    expected, number = upscale(mini, image, **options), 0
    while True:
        number += 1
        report = Report()
        with monkeypatch.context() as patch:
            failing = FailingPin(patch, number)
            result = upscale(mini, image, report=report, **options)
        assert (result - expected).abs().max() < 1e-4
        if failing.calls < number:
            break
        assert report.plan == replace(plan, pinned=False)
        assert [note.split(":")[0] for note in report.replanned] == ["main memory could not be pinned"]
    assert number > 2, "weights, and hidden states, which are taken once"
    assert report.plan == plan
    assert report.replanned == []


def test_a_pin_that_fails_at_any_time_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and hidden states of a planned run, on fake tensors; and the new plan takes no more of the card."""
    config = infdit.InfDiTConfig(num_layers=2, hidden_size=16, num_heads=2, block_size=16, vector_dim=0)
    workload = Workload(config, 32, 48, device=torch.device("cuda"), dtype=torch.float32)
    plan = MemoryPlan(1, 2, "streamed", "host", "host")
    plan = replace(plan, peak_bytes=workload.footprint(plan).device)  # as if a planner had made it
    live: list[int] = []
    original = PlannedRun.unpinned

    def unpinned(planned: PlannedRun) -> PlannedRun:
        live.append(meter.live["host"])
        return original(planned)

    monkeypatch.setattr(PlannedRun, "unpinned", unpinned)
    number, tried = 0, 0
    with FakeTensorMode(allow_non_fake_inputs=True), FakeAccelerator():
        model = InfDiT(config).requires_grad_(False)
        while number == tried:
            number, report = number + 14, Report()  # of weights all are alike; the last are hidden states
            planned = PlannedRun(replace(workload, device=ACCELERATOR), plan, lambda device: 0)
            run = Run(model, planned, lambda done: None, report)
            with PeakMeter(device=ACCELERATOR) as meter, monkeypatch.context() as patch:
                failing, picture = FailingPin(patch, number), torch.zeros(1, 3, 32, 48)
                run.denoiser(Conditioning(picture[..., :8, :12], picture))(picture, 1.0)
                tried = min(failing.calls, number)
                if number == tried:
                    assert live.pop() <= 5 * picture.nbytes, "pictures only"
                    assert report.plan is not None
                    needs_none = (report.plan.weights, report.plan.hidden) == ("resident", "device")
                    assert needs_none or not report.plan.pinned
                    assert report.plan.peak_bytes is not None
                    assert report.plan.peak_bytes <= (plan.peak_bytes or 0)
                    assert meter.peak["host"] <= workload.footprint(plan).host + picture.nbytes
                del run
    assert number > len(list(model.layers.parameters()))


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyboardInterrupt()])
def test_other_errors_pass_through_at_once(
    mini: InfDiT, image: torch.Tensor, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(layer: Layer, *inputs: object) -> Iterator[torch.Tensor]:
        raise error

    monkeypatch.setattr(Layer, "forward", forward)
    with pytest.raises(type(error)):
        upscale(mini, image, steps=1, sampler="euler")


def test_a_batch_goes_on_with_the_smaller_plan(
    mini: InfDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.rand((3, 20, 20, 3), generator=torch.Generator().manual_seed(1))
    expected = upscale(mini, image, steps=1, sampler="euler")
    full = FullDevice(monkeypatch, {8})
    report = Report()
    result = upscale(mini, image, steps=1, sampler="euler", report=report)
    assert (result - expected).abs().max() < 1e-4
    assert len(report.replanned) == 1
    assert full.calls > 8

"""Memory that runs out in the middle of a run: a smaller plan, the same picture; after the smallest, one sentence."""

import logging
from collections.abc import Iterator

import pytest
import torch

import infdit
from infdit import BudgetTooSmall, Conditioning, MemoryPlan, OutOfMemory, Report, upscale
from infdit.measure import PeakMeter
from infdit.model import InfDiT, Layer
from infdit.run import Run
from infdit.samplers import method_of

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


@pytest.mark.parametrize("sampler", list(infdit.samplers.SAMPLERS))
@pytest.mark.parametrize("when", [0.5, 1.5, 2.5], ids="in evaluation {}".format)
def test_the_step_is_repeated_with_a_smaller_plan_and_the_picture_is_the_same(
    mini: InfDiT, image: torch.Tensor, sampler: str, when: float, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    plan = MemoryPlan(6, 4)
    options = {"steps": STEPS, "sampler": sampler, "sigma_max": 5.0, "seed": 3}
    expected = upscale(mini, image, plan=plan, **options)
    each = calls_per_evaluation(mini, image, plan)
    FullDevice(monkeypatch, {int(when * each)})
    report, done = Report(), []
    with caplog.at_level(logging.WARNING):
        result = upscale(
            mini, image, plan=plan, report=report, progress=lambda n, total, preview: done.append((n, total)), **options
        )
    assert (result - expected).abs().max() < 1e-4
    assert len([r for r in caplog.records if "out of memory in step" in r.message]) == 1
    assert len(report.replanned) == 1
    assert "the picture is the same" in report.replanned[0]
    assert report.plan is not None
    assert report.plan.peak_bytes is not None
    assert report.plan != plan
    assert done[-1][0] == done[-1][1], "the bar ends full although a step was repeated"
    assert STEPS <= len(report.seconds) <= STEPS + 1, "one step was repeated"


def test_what_the_failed_attempt_held_is_free_before_the_next_begins(
    mini: InfDiT, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = MemoryPlan(6, 999)
    FullDevice(monkeypatch, {6})  # the last layer: hidden states, keys and values are there
    live: list[int] = []
    with PeakMeter() as meter:
        from infdit import run

        original = run.Run._make_room

        def spy(self: run.Run, *inputs: object) -> None:
            original(self, *inputs)
            live.append(meter.live["device"])

        monkeypatch.setattr(run.Run, "_make_room", spy)
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

    def shrink(plan: MemoryPlan) -> MemoryPlan:
        smaller.append(plan)
        raise OutOfMemory("no smaller plan")

    def fail(*inputs: object) -> torch.Tensor:
        raise error

    run = Run(mini, MemoryPlan(), torch.device("cuda"), shrink, lambda done: None, Report())
    monkeypatch.setattr(run, "_attempt", fail)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    lr = torch.zeros(1, 3, 8, 8)
    with pytest.raises(OutOfMemory, match=r"^the computer's own memory is full" if full else r"^no smaller plan"):
        run.sample(Conditioning(lr, lr), [lr], method_of("euler"), torch.tensor([1.0, 0.0]), lambda state: None)
    assert len(smaller) == (not full)


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

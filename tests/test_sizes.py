"""Sizes from 1 to 16 times: the way there, and runs of any size within the budget that was foretold."""

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from runs import SLACK, random_model

import infdit
from benchmarks.dry_run import counted_peak
from benchmarks.peak_meter import PeakMeter
from infdit import BudgetTooSmall, InfDiTConfig, Report, upscale
from infdit.memory.cost import seconds_per_evaluation
from infdit.memory.plan import Workload
from infdit.memory.planner import fastest_plan
from infdit.samplers import SAMPLERS
from infdit.sizes import passes, passes_by, target_size

TINY = InfDiTConfig(2, 16, 1, block_size=16, vector_dim=0)


def test_every_pass_is_within_what_the_model_can_and_few_are_needed() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        source = rng.randint(1, 300), rng.randint(1, 300)
        target = tuple(rng.randint(side, 16 * side) for side in source)
        sizes = passes(source, target)
        assert sizes[-1] == target
        assert len(sizes) == 1 + any(b > 4 * a for a, b in zip(source, target, strict=True))
        for before, after in pairwise([source, *sizes]):
            assert all(a <= b <= 4 * a for a, b in zip(before, after, strict=True))


def test_scales_up_to_4_are_one_pass() -> None:
    for side in range(1, 500):
        for scale in (1, 1.01, 1.3333, 3.99, 4.0):
            target = target_size(side, 1, scale)
            assert passes((side, 1), target) == [target]


def test_what_grows_by_less_than_it_was_taught_is_made_from_the_next_that_it_was() -> None:
    """Not what stays as large, or grows by nearly that."""
    for scales, target, computed in (
        ((4,), (100, 80), [((200, 160), (100, 80))]),
        ((4,), (199, 80), [((200, 160), (199, 80))]),
        ((4,), (200, 160), [((200, 160), (200, 160))]),
        ((4,), (50, 40), [((50, 40), (50, 40))]),
        ((4,), (400, 320), [((200, 160), (100, 80)), ((400, 320), (400, 320))]),
        ((4,), (50, 600), [((200, 160), (50, 150)), ((200, 600), (50, 600))]),
        ((2, 4), (100, 80), [((100, 80), (100, 80))]),
        ((2, 4), (75, 60), [((100, 80), (75, 60))]),
        ((2, 4), (101, 80), [((200, 160), (101, 80))]),
        ((2, 4), (400, 320), [((100, 80), (100, 80)), ((400, 320), (400, 320))]),
        ((2,), (200, 160), [((100, 80), (100, 80)), ((200, 160), (200, 160))]),
    ):
        assert [(size, made) for size, made, _ in passes_by(scales, (50, 40), target)] == computed
    rng = random.Random(0)
    for _ in range(2000):
        source = rng.randint(1, 300), rng.randint(1, 300)
        target = tuple(rng.randint(side, 16 * side) for side in source)
        for scales in ((4,), (2, 4), (3, 4, 2)):
            found = passes_by(scales, source, target)
            assert found[-1][1] == target
            assert len(found) == len(passes(source, target))
            befores = [source, *(made for _, made, _ in found[:-1])]
            for before, (computed, made, scale) in zip(befores, found, strict=True):
                assert scale in scales and computed in (made, (scale * before[0], scale * before[1]))
                assert all(a <= b <= c for a, b, c in zip(before, made, computed, strict=True))
    asked = Workload(TINY, 100, 80, source=(50, 40, 3))
    assert (asked.way, replace(asked, scales=((4, 1.0),)).way) == ("", "by way of 160×200")
    asked = replace(asked, height=300, width=240)
    assert asked.way == "2 passes, by way of 160×200"
    assert replace(asked, scales=((4, 1.0),)).way == "2 passes, by way of 160×200, 60×75"
    assert [part.strength for part in replace(asked, scales=((2, 0.5), (4, 1.0))).passes] == [0.5, 1]


def test_plans_foretell_all_passes() -> None:
    whole = Workload(InfDiTConfig(), 8192, 8192, source=(512, 512, 3), device=torch.device("cuda"))
    first = replace(whole, height=2048, width=2048)
    last = replace(whole, source=(2048, 2048, 3))
    plan = fastest_plan(whole, 2**33, 2**40)
    plain = replace(plan, pinned=False)  # what is pinned for the first pass serves the last one too
    assert seconds_per_evaluation(whole, plain) == sum(seconds_per_evaluation(part, plain) for part in (first, last))
    assert seconds_per_evaluation(whole, plan) < sum(seconds_per_evaluation(part, plan) for part in (first, last))
    for tier in ("device", "host"):
        held, *parts = (getattr(workload.footprint(plan), tier) for workload in (whole, first, last))
        assert max(parts) <= held <= 1.01 * max(parts)
    assert whole.way == "2 passes, by way of 2048×2048"


@pytest.mark.parametrize(
    ("source", "scales"),
    [
        ((6, 12, 4), ()),
        ((6, 12, 4), ((2, 0.5), (4, 1.0))),
        ((63, 48, 3), ((4, 1.0),)),
        ((96, 47, 3), ()),
        ((96, 47, 3), ((2, 0.5), (4, 1.0))),
    ],
    ids=str,
)
def test_what_an_accelerator_and_its_host_hold_is_foretold(
    source: tuple[int, int, int], scales: tuple[tuple[int, float], ...]
) -> None:
    """In two passes, in one, and where only detail is added; made faithful."""
    workload = Workload(TINY, 96, 48, source=source, device=torch.device("cuda"), sampler="euler", fitted=True)
    workload = replace(workload, scales=scales)
    plan = fastest_plan(workload, 2**30, 2**40)
    counted, held = counted_peak(workload, plan), workload.footprint(plan)
    assert counted["device"] <= held.device <= 1.25 * counted["device"] + SLACK
    assert counted["host"] <= held.host


def content(rng: random.Random, h: int, w: int) -> torch.Tensor:
    """A picture, maybe with alpha: noise, black and white dots, a gradient, or flat."""
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    image = torch.rand((rng.choice([1, 1, 2]), h, w, rng.choice([3, 3, 4])), generator=generator)
    ramp = torch.linspace(0, 1, w)[:, None].expand(image.shape)
    return rng.choice([image, image.round(), ramp, torch.full_like(image, rng.choice([0.0, 0.5, 1.0]))]).clone()


def assert_any_run_works(seed: int, cases: int, most: int) -> None:
    """most: pixels of a result."""
    rng = random.Random(seed)
    model = random_model(TINY, torch.float32)
    for number in range(cases):
        h, w = (max(1, int(math.exp(rng.uniform(0, 5)))) for _ in range(2))
        if rng.random() < 0.2:
            h = 1  # a strip
        scale = rng.choice([1.0, 4.0, 16.0, rng.uniform(1, 4), rng.uniform(4, 16)])
        if h * w * scale**2 > most:
            h, w = max(1, int(most / scale**2 / w)), min(w, int(most / scale**2) or 1)
        image = content(rng, h, w)
        target = target_size(h, w, scale)
        model.defaults = infdit.SamplingDefaults(1, "euler", 0.5, 0.01, rng.choice([0.0, 1.0]))
        given = {
            "steps": rng.choice([1, 2]),
            "sampler": rng.choice(list(SAMPLERS)),
            "fidelity": rng.choice([0.0, 0.3, 1.0]),
            "colour_match": rng.random() < 0.3,
            "seed": number,
        }
        case = h, w, scale, tuple(image.shape), given
        try:
            with pytest.raises(BudgetTooSmall) as refused:
                upscale(model, image, scale, budget=1, **given)
            budget, report = int(refused.value.least * rng.choice([1, 1, 2, 50])), Report()
            with PeakMeter(model.parameters()) as meter:
                result = upscale(model, image, scale, budget=budget, report=report, **given)
            assert result.shape == (len(image), *target, image.shape[-1])
            assert result.isfinite().all()
            assert 0 <= result.min() <= result.max() <= 1
            assert len(report.faithful) == len(image)
            assert report.plan is not None
            assert report.plan.peak_bytes is not None
            assert meter.peak["device"] <= report.plan.peak_bytes <= budget
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error


def test_runs_of_any_size_work_within_the_budget_foretold() -> None:
    assert_any_run_works(seed=0, cases=6, most=6000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_runs_of_any_size_work_within_the_budget_foretold(seed: int) -> None:
    assert_any_run_works(seed, cases=30, most=60_000)

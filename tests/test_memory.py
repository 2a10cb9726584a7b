"""Closed forms of bytes against what is counted while it runs."""

import gc
import random
import weakref
from dataclasses import replace

import pytest
import torch
from runs import SLACK, assert_within, random_case, random_model
from torch._subclasses.fake_tensor import FakeTensorMode

import infdit
from benchmarks.dry_run import ACCELERATOR, FakeAccelerator, counted_peak
from benchmarks.peak_meter import PeakMeter
from infdit import InfDiTConfig, MemoryPlan
from infdit.memory.footprint import Weights
from infdit.memory.plan import Workload
from infdit.model import InfDiT

MIB = 2**20


def assert_predicted(seed: int, cases: int) -> None:
    """And every fifth time with pictures on disk: the same bits, and what is there foretold too."""
    rng = random.Random(seed)
    for i in range(cases):
        config, h, w, plan, dtype, sampler, batch = case = random_case(rng)
        model = random_model(config, dtype)
        image, fitted = torch.rand(batch, -(-h // 4), -(-w // 4), rng.choice([3, 4])), rng.random() < 0.3
        workload = Workload(config, h, w, batch, dtype, sampler=sampler, source=image.shape[1:], fitted=fitted)
        results = []
        for each in (plan, replace(plan, images="disk"))[: 2 if i % 5 == 0 else 1]:
            with PeakMeter(model.parameters()) as meter:
                results.append(
                    infdit.upscale(model, image, size=(h, w), steps=3, sampler=sampler, plan=each, fidelity=fitted)
                )
            try:
                held = workload.footprint(each)
                assert_within(meter.peak, held, unified=True)
                assert meter.peak["disk"] <= held.disk <= 1.25 * meter.peak["disk"] + 2**16
            except AssertionError as error:
                raise AssertionError(f"{case} {each.images}: {error}") from error
        assert torch.equal(results[0], results[-1])


def test_counted_peaks_of_random_runs_are_predicted() -> None:
    assert_predicted(seed=0, cases=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_counted_peaks_of_many_random_runs_are_predicted(seed: int) -> None:
    assert_predicted(seed, cases=20)


@pytest.mark.parametrize(
    ("side", "plan"),
    [
        (256, MemoryPlan(1, 1, "streamed", "host", "host")),
        pytest.param(768, MemoryPlan(28, 2), marks=pytest.mark.slow),
        pytest.param(768, MemoryPlan(4, 4, "streamed"), marks=pytest.mark.slow),
        pytest.param(512, MemoryPlan(1, 1, "streamed", "host", "host", pinned=False), marks=pytest.mark.slow),
    ],
    ids=["everything on the host", "everything on the device", "weights streamed", "nothing pinned"],
)
def test_published_size_on_fake_tensors(side: int, plan: MemoryPlan) -> None:
    """Where 16 MiB of slack are little beside the whole; of three layers, for all are alike and each takes its time."""
    workload = Workload(InfDiTConfig(num_layers=3), side, side, device=torch.device("cuda"), sampler="euler")
    counted, held = counted_peak(workload, plan), workload.footprint(plan)
    assert counted["device"] <= held.device
    assert held.device <= 1.1 * counted["device"] + SLACK
    assert counted["host"] <= held.host <= 1.1 * counted["host"] + SLACK


def test_weights_are_counted_from_sizes() -> None:
    for config in (InfDiTConfig(), InfDiTConfig(2, 16, 2, 4, 16, 0, 64)):
        with torch.device("meta"):
            model = InfDiT(config)
        assert Weights.of(config, torch.bfloat16).total == 2 * sum(p.numel() for p in model.parameters())


def test_the_promised_sizes() -> None:
    """Published model, bf16, everything that can be away on the host."""
    plan = MemoryPlan(1, 1, "streamed", "host", "host")
    for side, gib in ((4096, 0.4), (8192, 0.6), (16384, 1.0)):
        workload = Workload(InfDiTConfig(), side, side, device=torch.device("cuda"))
        assert workload.footprint(plan).device <= gib * 2**30


def test_meter_counts_storages_once_and_what_is_freed() -> None:
    with FakeTensorMode(), PeakMeter(device=ACCELERATOR) as meter:
        a = torch.zeros(1000, device=ACCELERATOR)
        views = [a[i:] for i in range(10)]
        assert meter.live["device"] == 4000
        b = a + 1
        assert meter.live["device"] == 8000
        del a, views
        assert meter.live["device"] == 4000
        c = torch.zeros(10)
        d = c * 2
        assert meter.live["host"] == 80
        del b, c, d
    assert meter.live == {"device": 0, "host": 0, "disk": 0}
    assert meter.peak == {"device": 8000, "host": 80, "disk": 0}


def test_meter_leaves_nothing_on_weights_that_outlive_it() -> None:
    weight = torch.zeros(10)
    with PeakMeter([weight]) as meter:
        weight + 1
    gone = weakref.ref(meter)
    del meter
    gc.collect()
    assert gone() is None
    assert weakref.getweakrefcount(weight.untyped_storage()) == 0


def test_what_is_to_be_differentiated_takes_no_room_beside() -> None:
    """While training an accelerator holds what the graph holds; room for a chunk is for evaluations."""
    config = InfDiTConfig(num_layers=2, hidden_size=64, num_heads=2, block_size=16, vector_dim=0)
    taken = {}
    for trained in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True), FakeAccelerator():
            with ACCELERATOR:
                model = InfDiT(config).requires_grad_(trained)
            lr, up = (torch.empty((1, 3, side, side), device=ACCELERATOR) for side in (8, 32))
            denoise = infdit.Denoiser(model, infdit.Conditioning(lr, up), MemoryPlan(2, 9))
            with PeakMeter(model.parameters(), ACCELERATOR) as meter:
                result = denoise(up, 1.0)
                del result
                gc.collect()
                taken[trained] = meter.live["device"] - sum(p.nbytes for p in model.parameters())
    assert taken[False] > 2**19 > 4 * taken[True]

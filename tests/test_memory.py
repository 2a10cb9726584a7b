"""Closed forms of bytes against what is counted while it runs."""

import gc
import random
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import infdit
from infdit import Conditioning, Denoiser, InfDiTConfig, MemoryPlan
from infdit.measure import PeakMeter
from infdit.memory import Footprint, Weights, footprint
from infdit.model import InfDiT
from infdit.transfer import tier

MIB = 2**20
SLACK = 16 * MIB


def random_model(config: InfDiTConfig, dtype: torch.dtype) -> InfDiT:
    with torch.device("meta"):
        model = InfDiT(config).to(dtype)
    model.to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    return model


def held(model: InfDiT, plan: MemoryPlan) -> dict[str, list[torch.Tensor]]:
    """The parameters by the tier that a plan puts them on."""
    tiers: dict[str, list[torch.Tensor]] = {"device": [], "host": []}
    for name, parameter in model.named_parameters():
        moved = plan.weights == "streamed" and name.startswith(("layers.", "modulations."))
        tiers["host" if moved else "device"].append(parameter)
    return tiers


def random_case(rng: random.Random) -> tuple[InfDiTConfig, int, int, MemoryPlan, torch.dtype, str, int]:
    heads = rng.choice([1, 2, 4])
    config = InfDiTConfig(
        num_layers=rng.randint(1, 5),
        hidden_size=heads * rng.choice([8, 16, 32]),
        num_heads=heads,
        block_size=rng.choice([16, 32]),
        vector_dim=rng.choice([0, 8]),
        position_period=rng.choice([16, 32, 1024]),
    )
    plan = MemoryPlan(
        rng.randint(1, 6),
        rng.choice([1, 2, 3, 8, 64, 999]),
        rng.choice(["resident", "streamed"]),
        rng.choice(["device", "host"]),
        rng.choice(["device", "host"]),
        rng.choice(["auto", "rows", "columns"]),
    )
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    h, w = rng.randint(8, 200), rng.randint(8, 200)
    return config, h, w, plan, dtype, rng.choice(list(infdit.samplers.SAMPLERS)), rng.choice([1, 1, 2])


def assert_within(counted: dict[str, int], foretold: Footprint) -> None:
    for name, predicted in (("device", foretold.device), ("host", foretold.host)):
        assert counted[name] <= predicted
        assert predicted <= 1.25 * counted[name] + SLACK


def assert_foretold(seed: int, cases: int) -> None:
    rng = random.Random(seed)
    for _ in range(cases):
        config, h, w, plan, dtype, sampler, batch = case = random_case(rng)
        model = random_model(config, dtype)
        image = torch.rand(batch, -(-h // 4), -(-w // 4), 3)
        with PeakMeter(held(model, plan)) as meter:
            infdit.upscale(model, image, size=(h, w), steps=3, sampler=sampler, plan=plan)
        try:
            assert_within(meter.peak, footprint(config, h, w, plan, dtype, sampler, batch, one_memory=True))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_counted_peaks_of_random_runs_are_foretold() -> None:
    assert_foretold(seed=0, cases=25)


@pytest.mark.slow
def test_counted_peaks_of_many_random_runs_are_foretold() -> None:
    assert_foretold(seed=1, cases=200)


@pytest.mark.parametrize(
    ("side", "plan"),
    [
        (512, MemoryPlan(1, 1, "streamed", "host", "host")),
        (768, MemoryPlan(28, 2)),
        (768, MemoryPlan(4, 4, "streamed")),
    ],
    ids=["everything on the host", "everything on the device", "weights streamed"],
)
def test_published_size_on_fake_tensors(side: int, plan: MemoryPlan) -> None:
    """Where 16 MiB of slack are little beside the whole; one evaluation, pictures apart."""
    config, dtype = InfDiTConfig(), torch.bfloat16
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        model = InfDiT(config).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        with tier(plan.images):
            x, up, lr = (torch.zeros(1, 3, s, s) for s in (side, side, side // 4))
        pictures = [x, up, lr]
        parameters = held(model, plan)
        parameters[plan.images] += pictures
        denoise = Denoiser(model, Conditioning(lr, up), plan)
        with PeakMeter(parameters) as meter, torch.no_grad():
            denoise(x, 1.0)
    foretold = footprint(config, side, side, plan, dtype, "euler")
    assert meter.peak["device"] <= foretold.device
    assert foretold.device <= 1.1 * meter.peak["device"] + SLACK


def test_weights_are_counted_from_sizes() -> None:
    for config in (InfDiTConfig(), InfDiTConfig(2, 16, 2, 4, 16, 0, 64)):
        with torch.device("meta"):
            model = InfDiT(config)
        assert Weights.of(config, torch.bfloat16).total == 2 * sum(p.numel() for p in model.parameters())


def test_the_promised_sizes() -> None:
    """Published model, bf16, everything that can be away on the host."""
    plan = MemoryPlan(1, 1, "streamed", "host", "host")
    for side, gib in ((4096, 0.4), (8192, 0.6), (16384, 1.0)):
        assert footprint(InfDiTConfig(), side, side, plan, torch.bfloat16).device <= gib * 2**30


def test_meter_counts_storages_once_and_what_is_freed() -> None:
    with PeakMeter() as meter:
        a = torch.zeros(1000)
        views = [a[i:] for i in range(10)]
        assert meter.live["device"] == 4000
        b = a + 1
        assert meter.live["device"] == 8000
        del a, views
        assert meter.live["device"] == 4000
        with tier("host"):
            c = torch.zeros(10)
        d = c * 2
        assert meter.live["host"] == 80
        del b, c, d
    assert meter.live == {"device": 0, "host": 0}
    assert meter.peak == {"device": 8000, "host": 80}


def test_meter_leaves_nothing_on_weights_that_outlive_it() -> None:
    weight = torch.zeros(10)
    with PeakMeter({"device": [weight]}) as meter:
        weight + 1
    gone = weakref.ref(meter)
    del meter
    gc.collect()
    assert gone() is None
    assert weakref.getweakrefcount(weight.untyped_storage()) == 0

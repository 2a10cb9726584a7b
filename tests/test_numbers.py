"""Not a number is not a picture, and a device that computes wrongly makes none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from shell import make_picture, run

import infdit
from infdit import Denoiser, MemoryPlan, SamplingDefaults, WrongNumbers, selfcheck, uniba, upscale
from infdit.model import InfDiT, Layer
from infdit.samplers import Denoise, SamplerInfo

WAYS_OUT = {torch.float16: "bf16 or fp32", torch.bfloat16: "fp32", torch.float32: "the model's file"}
IMAGE = torch.rand((1, 14, 20, 3), generator=torch.Generator().manual_seed(0))
NOISY = SamplingDefaults(steps=3, sampler="euler", sigma_max=0.1, sigma_min=0.01)


def mini(dtype: torch.dtype) -> InfDiT:
    model = infdit.load_model("mini", dtype=dtype, device="cpu")
    model.defaults = NOISY
    return model


class Broken:
    """The first layer gives one number that is none, in one block, from a number of evaluations on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, value: float) -> None:
        self.evaluations = 0
        original = Layer.forward

        def forward(layer: Layer, h: torch.Tensor, *inputs: object) -> torch.Tensor:
            out = original(layer, h, *inputs)
            if layer.cross is not None:
                self.evaluations += 1
                if self.evaluations >= first:
                    out[0, -1, -1, -1] = value
            return out

        monkeypatch.setattr(Layer, "forward", forward)


@pytest.mark.parametrize(
    ("sampler", "evaluation", "step", "dtype", "value"),
    [
        ("euler", 1, 1, torch.float16, float("nan")),
        ("euler", 2, 2, torch.float32, float("inf")),
        ("heun", 4, 2, torch.float32, float("nan")),
        ("euler", 1, 1, torch.bfloat16, float("inf")),
    ],
)
def test_the_first_evaluation_that_is_not_finite_ends_the_run(
    sampler: str, evaluation: int, step: int, dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken(monkeypatch, evaluation, value)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(WrongNumbers, match=f"NaN or inf in step {step} in {name}: .*{WAYS_OUT[dtype]}") as refusal:
        upscale(mini(dtype), IMAGE, sampler=sampler, plan=MemoryPlan(6, 999))
    assert broken.evaluations == evaluation, "no time is spent on what follows"
    assert "\n" not in str(refusal.value)


def overflowing() -> InfDiT:
    """Weights that bfloat16 and float32 can bear: the MLP's inner numbers are some 1e6, its results as they were."""
    model = mini(torch.float32)
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp[0].weight.mul_(3e5)
            layer.mlp[2].weight.mul_(1e-6)
    return model


def test_float16_overflows_where_others_do_not() -> None:
    with pytest.raises(WrongNumbers, match="step 1 in float16"):
        upscale(overflowing().half(), IMAGE)
    for dtype in (torch.bfloat16, torch.float32):
        assert upscale(overflowing().to(dtype), IMAGE).isfinite().all()


def test_a_sampler_that_gives_no_numbers_is_told_from_a_model_that_does() -> None:
    def sample(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, callback: object) -> torch.Tensor:
        return denoise(x / 0, sigmas[0])

    with pytest.raises(WrongNumbers, match=r"^the sampler gave NaN or inf in step 1: choose another"):
        upscale(mini(torch.float32), IMAGE, sampler=SamplerInfo(sample, 1, 4, 4))


def test_large_numbers_are_numbers() -> None:
    """The largest noise that a node can ask for."""
    assert upscale(mini(torch.float32), IMAGE, sigma_max=5000.0, steps=2).isfinite().all()


def test_the_command_line_says_so_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [make_picture(tmp_path / name) for name in ("x.png", "y.png")]
    Broken(monkeypatch, 1, float("nan"))
    assert run("upscale", sources[0], "-o", tmp_path / "out.png", "--dtype", "fp16") == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert "step 1 in float16: choose bf16 or fp32" in last
    assert run("upscale", *sources, "-o", tmp_path / "out", "--dtype", "fp16") == 1
    assert capsys.readouterr().err.count("choose bf16 or fp32") == 2
    assert not list(tmp_path.glob("out*/*")), "nothing is written"


ATTENTION, SLICES = F.scaled_dot_product_attention, uniba.KVRing._slices


def zeros(chunk: uniba.Chunk, x: torch.Tensor) -> torch.Tensor:
    """What a ring gives that is empty."""
    return x.new_zeros((len(x), len(chunk.blocks), 4, *x.shape[2:]))


FAULTS: dict[str, tuple[object, str, Callable]] = {
    "rings are not read": (uniba.KVRing, "_gather", lambda ring, chunk, x, *added: zeros(chunk, x)),
    "neighbours change places": (
        uniba.KVRing, "_slices",
        lambda ring, chunk: ((slice(4 - at.stop, 4 - at.start, at.step), *where) for at, *where in SLICES(ring, chunk)),
    ),
    "attention is not scaled": (F, "scaled_dot_product_attention", lambda *qkv: ATTENTION(*qkv, scale=1.0)),
    "attention leaves keys out": (
        F, "scaled_dot_product_attention", lambda q, k, v: ATTENTION(q, k[..., :-4, :], v[..., :-4, :])
    ),
    "nothing is turned": ("infdit.fuse", "rotate", lambda x, angles: x),
    "nothing is turned at a seam": ("infdit.uniba", "rotate", lambda x, angles: x),
    "another activation": (torch.nn.GELU, "forward", lambda gelu, x: F.relu(x)),
}  # fmt: skip


class SecondMachine:
    """All evaluations but the first, which is the CPU's, are done by a machine with a fault."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fault: tuple[object, str, Callable] | None, sane: int = 0
    ) -> None:
        self.calls = 0
        original = Denoiser.__call__

        def evaluate(denoiser: Denoiser, *inputs: object) -> torch.Tensor:
            self.calls += 1
            with pytest.MonkeyPatch.context() as patch:
                if fault is not None and self.calls > 1 and self.calls != sane:
                    place, name, wrong = fault
                    if isinstance(place, str):
                        patch.setattr(f"{place}.{name}", wrong)
                    else:
                        patch.setattr(place, name, wrong)
                return original(denoiser, *inputs)

        monkeypatch.setattr(Denoiser, "__call__", evaluate)


@pytest.mark.parametrize("dtype", list(WAYS_OUT), ids=str)
def test_a_device_that_only_rounds_passes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SecondMachine(monkeypatch, None)
    monkeypatch.setattr(selfcheck, "LIMIT", selfcheck.LIMIT / 3)  # by far
    selfcheck.compare(torch.device("cpu"), dtype)
    assert machine.calls == 3, "in float32, with all on the device, with all that can be on the host"


@pytest.mark.parametrize("sane", [0, 2], ids=["always", "when states come from the host"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_a_device_with_a_fault_does_not_pass(
    fault: tuple[object, str, Callable], sane: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    SecondMachine(monkeypatch, fault, sane)
    words = r"^cpu with PyTorch \S+ computes other numbers than the CPU in float16 \(off by "
    with pytest.raises(WrongNumbers, match=words) as told:
        selfcheck.compare(torch.device("cpu"), torch.float16)
    assert "choose another dtype" in str(told.value)
    assert "\n" not in str(told.value)


def test_the_check_comes_first_once_a_process_and_never_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that is not here: a run that begins fails by itself."""
    asked: list[tuple] = []
    refused = [WrongNumbers("the card computes other numbers")]

    def compare(*what: object) -> None:
        asked.append(what)
        if refused:
            raise refused.pop()

    def card(model: InfDiT) -> None:
        with pytest.raises((RuntimeError, AssertionError)):
            upscale(model, IMAGE, device="xpu:7", plan=MemoryPlan())

    monkeypatch.setattr(selfcheck, "compare", compare)
    model = mini(torch.float32)
    with pytest.raises(WrongNumbers, match="the card computes other numbers"):
        upscale(model, IMAGE, device="xpu:7", plan=MemoryPlan())
    card(model)
    card(model)
    card(model.half())
    upscale(model.float(), IMAGE)
    device = torch.device("xpu:7")
    first, second = (device, torch.float32, True), (device, torch.float16, True)
    assert asked == [first, first, second], "again after a refusal, then no more; and for another dtype"
    monkeypatch.setenv("INFDIT_SKIP_SELF_CHECK", "1")
    card(model.bfloat16())
    assert len(asked) == 3

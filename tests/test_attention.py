"""Attention where PyTorch has no fused kernel: the same numbers, in pieces whose bytes are known beforehand."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from runs import assert_within, random_case, random_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import infdit
from benchmarks.dry_run import counted_peak
from benchmarks.peak_meter import PeakMeter
from infdit import InfDiTConfig, MemoryPlan
from infdit.attention import attention, fused, piece_bytes
from infdit.memory import offload
from infdit.memory.offload import Offloader
from infdit.memory.plan import Workload

MPS, CPU, CUDA = (torch.device(kind) for kind in ("mps", "cpu", "cuda"))


@pytest.fixture
def no_kernels() -> Iterator[None]:
    """PyTorch says that it has no fused kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        fused.cache_clear()
        yield
    fused.cache_clear()


def tensors(n: int, h: int, t: int, keys: int, d: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k and v as the network has them: heads of a token side by side."""
    generator = torch.Generator().manual_seed(n + t)
    shapes = (n, t, h, d), (n, keys, h, d), (n, keys, h, d)
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


# many blocks in a piece; some heads of one; some queries of one head; a query with more keys than a piece has scores
SHAPES = [(5, 2, 16, 64, 8), (2, 3, 1024, 4096, 80), (1, 2, 3000, 4000, 8), (1, 1, 2, 2**23 + 1, 4)]


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_give_what_the_fused_kernel_gives_within_bytes_foretold(shape: tuple[int, ...]) -> None:
    assert not fused(CPU, torch.float32, shape[-1])
    q, k, v = tensors(*shape)
    with PeakMeter() as meter:
        result = attention(q, k, v)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        expected = F.scaled_dot_product_attention(q, k, v)
    assert (result - expected).abs().max() < 1e-5
    n, h, t, keys, d = shape
    foretold = piece_bytes((n, h, t), keys, d, 4) + result.nbytes
    assert meter.peak["device"] <= foretold <= 1.1 * meter.peak["device"]


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_half_precision_is_summed_in_float32_and_gradients_flow(dtype: torch.dtype) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(3, 2, 16, 64, 8, dtype))
    result = attention(q, k, v)
    exact = F.scaled_dot_product_attention(*(x.detach().double() for x in (q, k, v)))
    error = (result.detach().double() - exact).abs().max()
    assert error < 4 * torch.finfo(dtype).eps
    result.sum().backward()
    assert all(x.grad is not None for x in (q, k, v))


@pytest.mark.usefixtures("no_kernels")
def test_runs_without_fused_kernels_hold_what_is_foretold() -> None:
    rng = random.Random(5)
    for _ in range(2):
        config, h, w, plan, dtype, sampler, batch = random_case(rng)
        model = random_model(config, dtype)
        with PeakMeter(model.parameters()) as meter:
            image = torch.rand(batch, -(-h // 4), -(-w // 4), 3)
            infdit.upscale(model, image, size=(h, w), steps=2, sampler=sampler, plan=plan)
        held = Workload(config, h, w, batch, dtype, sampler=sampler).footprint(plan)
        assert_within(meter.peak, held, unified=True)


@pytest.mark.parametrize("chunk", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_the_published_size_on_a_device_without_fused_kernels(chunk: int) -> None:
    """Two heads of scores of one block and their softmax are 64 MiB; those of all of a chunk would be gigabytes."""
    workload = Workload(InfDiTConfig(num_layers=2), 128, 256, device=MPS, sampler="euler")
    plan = MemoryPlan(1, chunk)
    peak, held = counted_peak(workload, plan)["device"], workload.footprint(plan)
    assert peak <= held.device <= 1.1 * peak + 16 * 2**20
    beside = held.workspace - replace(workload, device=CPU).footprint(plan).workspace
    assert 0 <= beside < 80 * 2**20


def test_no_array_passes_4_gib() -> None:
    """Neither scores, of which 4.25 GiB are computed here, nor hidden states, of which 10 GiB are kept."""
    lazy, h = torch.device("lazy:0"), (1, 24, 1024, 1280)
    with FakeTensorMode(), PeakMeter(device=lazy) as meter:
        attention(*(torch.empty((17, 16, n, 80), device=lazy) for n in (1024, 4096, 4096)))
        states = Offloader(MemoryPlan(1, 24), lazy).hidden_states(2048)
        for begin in range(0, 2048, 24):
            states.store(range(begin, min(begin + 24, 2048)), torch.empty(h, device=lazy)[:, : 2048 - begin])
        assert states.load(range(2040, 2048), None).shape[1] == 8
    assert 2**31 < max(size for _, size in meter.events[str(lazy)]) <= 2**32


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_hidden_states_in_several_arrays_give_the_same_picture(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config, plan = InfDiTConfig(3, 16, 2, 4, 16, 0), MemoryPlan(1, 3)
    model = random_model(config, torch.float32)
    results = []
    for most in (2**32, chunks * 3 * 16 * 16 * 4):
        monkeypatch.setattr(offload, "MOST_BYTES", most)
        results.append(infdit.upscale(model, torch.zeros(1, 20, 28, 3), steps=1, seed=0, plan=plan))
    assert torch.equal(*results)


def test_what_is_fused() -> None:
    """On a CPU as PyTorch says; for a card that is not here, as most have it."""
    assert fused(CPU, torch.float32, 80)
    if not torch.cuda.is_available():
        assert fused(CUDA, torch.float16, 80) and fused(CUDA, torch.float32, 80)
        assert not fused(CUDA, torch.float64, 80)
    assert not any(fused(torch.device(kind), torch.float16, 80) for kind in ("mps", "privateuseone"))

"""How fast plans are on this device, and how far off the planner's idea of it is.

Plans are timed in turns, round after round, so that a machine that slows down slows all of them; figures are medians.
What counts in the figures of `cost.CostModel` is that they put plans in order.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from infdit.config import InfDiTConfig
from infdit.denoiser import Conditioning, Denoiser
from infdit.grid import BlockGrid
from infdit.memory.cost import EFFICIENCY, CostModel, seconds_per_evaluation
from infdit.memory.measure import measured
from infdit.memory.plan import MemoryPlan, Workload
from infdit.memory.planner import GIB, format_bytes
from infdit.model import InfDiT

SIGMA = 1.0


@dataclass(frozen=True)
class Timing:
    """Median seconds of one evaluation under a plan, those predicted, and what the device held."""

    plan: MemoryPlan
    measured: float
    predicted: float
    peak: int
    allocated: int | None
    reserved: int | None


def random_model(config: InfDiTConfig, dtype: torch.dtype) -> InfDiT:
    """A network of small random weights on the CPU: as fast as a trained one."""
    with torch.device("meta"):
        model = InfDiT(config).to(dtype)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return model.requires_grad_(False).eval()


def default_plans(config: InfDiTConfig, device: torch.device) -> list[MemoryPlan]:
    """The largest, the usual and the smallest with everything on the device, and what streams and keeps on the host."""
    depth, usual = config.num_layers, MemoryPlan.default(config).chunk
    return [
        MemoryPlan(depth, 4 * usual),
        MemoryPlan(depth, usual),
        MemoryPlan(max(1, depth // 2), usual),
        MemoryPlan(1, 1),
        MemoryPlan(1, usual, "streamed"),
        MemoryPlan(1, usual, "streamed", "host", "host"),
    ]


@torch.no_grad()
def time_plans(
    model: InfDiT, plans: Sequence[MemoryPlan], height: int, width: int, device: torch.device, rounds: int = 3
) -> list[Timing]:
    """Time one evaluation of each plan in `rounds` interleaved rounds, after one that is not counted.

    Args:
        model: on the CPU; each plan places it.
        plans: to be compared; stages of one are all on the device.
        height, width: of the result in pixels.
    """
    grid = BlockGrid.covering(height, width, model.config.block_size)
    generator = torch.Generator().manual_seed(0)
    x, up = (torch.randn((1, 3, grid.height, grid.width), generator=generator) for _ in range(2))
    lr = torch.randn((1, 3, grid.height // 4, grid.width // 4), generator=generator)
    seconds: list[list[float]] = [[] for _ in plans]
    held: list[tuple[int | None, int | None]] = [(None, None)] * len(plans)
    for _ in range(rounds + 1):
        for i, plan in enumerate(plans):
            images = device if plan.images == "device" else torch.device("cpu")
            stages = [device] * max(1, len(plan.layers))
            denoise = Denoiser(model, Conditioning(lr.to(images), up.to(images)), plan, device=stages)
            start = x.to(images)
            _forget_peaks(device)
            seconds[i].append(_seconds(partial(denoise, start, SIGMA), device))
            held[i] = _peaks(device)
    workload = Workload(model.config, height, width, dtype=model.dtype, device=device, sampler="euler")
    return [
        Timing(
            plan,
            statistics.median(times[1:]),
            seconds_per_evaluation(work, plan),
            work.footprint(plan).device,
            *most,
        )
        for plan, times, most in zip(plans, seconds, held, strict=True)
        for work in [replace(workload, beside=(device,) * (len(plan.layers) - 1))]
    ]


def _forget_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peaks(device: torch.device) -> tuple[int | None, int | None]:
    """On CUDA: bytes allocated and reserved at most since they were forgotten; nothing elsewhere."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "xpu":
        torch.xpu.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def report(config: InfDiTConfig, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Lines: figures of the family beside what is measured, then plans with time predicted and measured."""
    costs, speed, (height, width) = CostModel.family(device, dtype), measured(device, dtype), size
    yield f"{device}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
    if speed is not None:
        product = EFFICIENCY * speed.flops / 1e12
        yield f"{'arithmetic':12}{costs.flops / 1e12:8.2f} TFLOP/s in general, {product:.2f} by a product measured here"
        for name, general, here in (("bus", costs.bus, speed.bus), ("pinning", costs.locking, speed.locking)):
            if here is not None:
                yield f"{name:12}{general / 1e9:8.1f} GB/s in general, {here / 1e9:.1f} measured here"
    yield f"one evaluation of {width}×{height}, {config.num_layers} layers of width {config.hidden_size}:"
    timings = time_plans(random_model(config, dtype), default_plans(config, device), height, width, device)
    fastest = min(timing.measured for timing in timings)
    yield f"{'seconds':>9} {'predicted':>9} {'off by':>7} {'of best':>8} {'peak':>10}   plan"
    for t in timings:
        plan = t.plan
        kept = f"weights {plan.weights}, hidden states on the {plan.hidden}, pictures on the {plan.images}"
        held = format_bytes(t.peak)
        if t.allocated is not None and t.reserved is not None:
            held += f" (allocated {t.allocated / GIB:.2f}, reserved {t.reserved / GIB:.2f} GiB)"
        yield (
            f"{t.measured:9.3f} {t.predicted:9.3f} {t.measured / t.predicted:7.2f} {t.measured / fastest:8.2f} "
            f"{held:>10}   {plan.group} layers × {plan.chunk} blocks; {kept}"
        )
    resident, streamed = timings[1].measured, timings[4].measured
    yield f"weights streamed take {streamed / resident:.2f} times as long as resident"

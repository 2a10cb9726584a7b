"""The planner: of all schedules that fit a budget, the fastest; or the smallest of those that are about as fast.

The constants are of a family of devices, not of one card: they order plans, and tell the time only roughly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

import psutil
import torch

from ..config import InfDiTConfig
from ..device import one_memory
from ..disk import free_in
from ..grid import BlockGrid
from ..samplers import SamplerInfo
from .plan import CPU, FLOAT32, Footprint, MemoryPlan, Place, Weights, WeightsKept, Workload, workspace

GIB = 2**30
MARGIN = 0.1  # of the free memory, left to allocators and to other programs
MAX_LAYER_SECONDS = 0.25  # between two moves of the bar, at which a run can be stopped; a block may take longer
DISK = 5e8  # bytes a second to and from a disk
PLAIN_BUS = 6e9  # bytes a second to and from memory that is not pinned, and no arithmetic hides them
MOST_TOKENS = 2**16  # of a chunk: far more than any device needs to run at full speed


class BudgetTooSmall(ValueError):  # noqa: N818 - the interface's name
    """No schedule fits.

    Attributes:
        least: the least number of bytes that works on `tier`.
        tier: "device", or "host" or "disk" where it is that that is too small.
    """

    def __init__(self, message: str, least: int, tier: Place = "device") -> None:
        super().__init__(message)
        self.least, self.tier = least, tier


class OutOfMemory(MemoryError):  # noqa: N818 - as torch.cuda's
    """Memory ran out, and no smaller plan is left."""


@dataclass(frozen=True)
class CostModel:
    """What a device does in a second, and how that depends on the schedule.

    Attributes:
        flops: of large matrix products in the network's dtype.
        rows: of a matrix product at which half of that is reached.
        cache: bytes of workspace up to which arithmetic runs at full speed; each doubling beyond costs `cache_penalty`.
        launch_overhead: seconds that a layer's kernels take to start, however small the chunk.
        bus: bytes between pinned memory of the host and the device.
        overlap_loss: share of the shorter of arithmetic and copies that the longer does not hide; 1: nothing is hidden.
    """

    flops: float
    rows: int
    cache: float
    cache_penalty: float
    launch_overhead: float
    bus: float
    overlap_loss: float

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> CostModel:
        """Round figures for a family: a card with 24 GB, an Intel card, an Apple chip, a CPU by its threads."""
        half = dtype.itemsize == 2
        if device.type == "cuda":
            return cls(150e12 if half else 40e12, 512, math.inf, 0, launch_overhead=4e-4, bus=20e9, overlap_loss=0.1)
        if device.type == "xpu":
            return cls(50e12 if half else 12e12, 512, math.inf, 0, launch_overhead=4e-4, bus=8e9, overlap_loss=1)
        if device.type == "mps":
            return cls(8e12, 256, math.inf, 0, launch_overhead=4e-4, bus=50e9, overlap_loss=1)
        flops = torch.get_num_threads() * (75e9 if half else 40e9)
        return cls(flops, 16, cache=32e6, cache_penalty=0.07, launch_overhead=4e-4, bus=8e9, overlap_loss=1)

    def evaluation(self, config: InfDiTConfig, grid: BlockGrid, plan: MemoryPlan, dtype: torch.dtype) -> float:
        """Seconds that one evaluation takes."""
        chunk = min(plan.chunk, grid.blocks)
        rows = chunk * config.block_tokens
        slower = 1 + self.cache_penalty * math.log2(max(1.0, workspace(config, dtype, grid, chunk) / self.cache))
        arithmetic = _flops(config, grid) / self.flops * (1 + self.rows / rows) * slower
        launches = -(-grid.blocks // chunk) * config.num_layers * self.launch_overhead
        compute = arithmetic + launches if self.overlap_loss == 1 else max(arithmetic, launches)
        bus, loss = (self.bus, self.overlap_loss) if plan.pinned else (min(self.bus, PLAIN_BUS), 1)
        copies = _traffic(config, grid, plan, dtype) / bus
        on_disk = 3 * 3 * FLOAT32 * grid.height * grid.width / DISK if plan.images == "disk" else 0  # x, up, result
        return max(compute, copies) + loss * min(compute, copies) + on_disk

    def longest_chunk(self, config: InfDiTConfig) -> int:
        """Blocks of which one layer takes at most MAX_LAYER_SECONDS; at least one."""
        return max(1, int(MAX_LAYER_SECONDS * self.flops / _layer_flops(config)))


@dataclass(frozen=True, order=True)
class Candidate:
    """A plan, the seconds that an evaluation takes under it, and what it holds."""

    seconds: float
    peak: int
    plan: MemoryPlan = field(compare=False)
    held: Footprint = field(compare=False)

    def explained(self, reason: str) -> MemoryPlan:
        """The plan, with what was predicted and why it was chosen."""
        held = self.held
        return replace(self.plan, peak_bytes=self.peak, host_bytes=held.host, disk_bytes=held.disk, reason=reason)


@dataclass(frozen=True)
class PlannedRun:
    """A run as it was planned, and what it needs to be planned again.

    Attributes:
        workload, plan: what is computed, and how it is cut.
        free: asks how many bytes the run may hold on the device now, when memory ran out in spite of the plan.
    """

    workload: Workload
    plan: MemoryPlan
    free: Callable[[], int]

    def unpinned(self) -> PlannedRun:
        """The same without pinned memory, and with the plan that is then the fastest of those that take no more."""
        workload, plan = replace(self.workload, pinnable=0), replace(self.plan, pinned=False)
        if plan.peak_bytes is not None:  # not made by hand
            with suppress(BudgetTooSmall):
                plan = fastest_plan(workload, plan.peak_bytes)
        return replace(self, workload=workload, plan=plan)

    def smaller(self) -> PlannedRun:
        """The same under a plan that takes less: what is free now, or a quarter less.

        Raises:
            OutOfMemory: there is none.
        """
        peak = self.plan.peak_bytes or self.workload.footprint(self.plan).device
        # pictures are made already, and stay out of the way only where they lie
        workload = self.workload if self.plan.images == "disk" else replace(self.workload, folder=None)
        try:
            return replace(self, plan=fastest_plan(workload, max(1, min(self.free(), peak * 3 // 4))))
        except BudgetTooSmall as error:
            if error.tier == "device" and error.least < peak:
                return replace(self, plan=fastest_plan(workload, error.least))
            refusal = str(error)
        raise OutOfMemory(f"out of memory on {self.workload.device}, and no smaller plan works: {refusal}")


def plan_memory(
    config: InfDiTConfig, height: int, width: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None, sampler: str | SamplerInfo = "heun", budget: int | None = None,
    host_budget: int | None = None, weights: WeightsKept | None = None,
) -> MemoryPlan:
    """The fastest plan within a budget.

    Args:
        config, height, width, batch, dtype, device, sampler, weights: see `Workload`; device None is the CPU.
        budget, host_budget: see `fastest_plan`.

    Returns:
        A plan with its predicted `peak_bytes` and `host_bytes`, and the `reason` for it.

    Raises:
        BudgetTooSmall: with the least number of bytes that works.
        ValueError: a budget under one byte.
    """
    workload = Workload(config, height, width, batch, dtype, torch.device(device or "cpu"), sampler, weights)
    return fastest_plan(workload, budget, host_budget)


def fastest_plan(
    workload: Workload, budget: int | None = None, host_budget: int | None = None, disk_budget: int | None = None
) -> MemoryPlan:
    """The fastest plan within a budget, and of equally fast ones the smallest; pictures are on disk if they must be.

    Args:
        workload: what is computed.
        budget: bytes on the device that the whole of `upscale()` may hold; None: what is free there, less a margin.
        host_budget: bytes on the host; None: what is free there, less a margin.
        disk_budget: bytes in the workload's folder; None: what is free there, less a margin.

    Raises:
        BudgetTooSmall: with the least number of bytes that works.
        ValueError: a budget under one byte.
    """
    if budget is not None and budget < 1:
        raise ValueError(f"budget {budget} must be at least one byte")
    budget = free_bytes(workload.device) if budget is None else budget
    try:
        return _fastest(workload, candidates(workload), budget, host_budget)
    except BudgetTooSmall:
        if workload.folder is None:
            raise
    plan = _fastest(workload, candidates(workload, on_disk=True), budget, host_budget)
    room = free_in(workload.folder) if disk_budget is None else disk_budget
    needed = plan.disk_bytes or 0
    if needed > room:
        raise BudgetTooSmall(
            f"{workload.width}×{workload.height} is more than memory holds, and takes {format_bytes(needed)} of the "
            f"disk of {workload.folder}, where {format_bytes(room)} are free: make room, or set TMPDIR to a folder on "
            "another disk",
            needed,
            "disk",
        )
    return plan


def _fastest(workload: Workload, plans: list[Candidate], budget: int, host_budget: int | None) -> MemoryPlan:
    fitting = [candidate for candidate in plans if candidate.peak <= budget]
    if not fitting:
        least = min(plans, key=lambda candidate: candidate.peak)
        parts = least.held.device_parts
        raise BudgetTooSmall(
            f"{format_bytes(budget)} is too little for {workload.width}×{workload.height}: at least "
            f"{format_bytes(least.peak)} (the largest part: the {max(parts, key=lambda name: parts[name])}); give "
            "more, or make a smaller picture",
            least.peak,
        )
    chosen, fastest = min(_affordable(workload, fitting, budget, host_budget)), min(plans)
    slower = f"{chosen.seconds / fastest.seconds:.2f} times as long as with {format_bytes(fastest.peak)}"
    reason = "no other schedule is faster" if chosen.seconds == fastest.seconds else slower
    return chosen.explained(reason)


def thrifty_plan(workload: Workload, host_budget: int | None = None, slower: float = 0.1) -> MemoryPlan:
    """The smallest plan that is at most `slower` behind the fastest that there is at any budget.

    Raises:
        BudgetTooSmall: the host cannot hold what it would.
    """
    affordable = _affordable(workload, candidates(workload), None, host_budget)
    limit = (1 + slower) * min(affordable).seconds
    chosen = min((c for c in affordable if c.seconds <= limit), key=lambda candidate: candidate.peak)
    return chosen.explained(f"more memory would save less than {slower:.0%} of the time")


def candidates(workload: Workload, on_disk: bool = False) -> list[Candidate]:
    """What `schedules` lists, with its cost; on_disk: with pictures there, wherever they were."""
    config, grid = workload.config, workload.grid
    costs = CostModel.of(workload.device, workload.dtype)
    found: list[Candidate] = []
    for plan in schedules(config, grid, workload.unified_memory, costs.longest_chunk(config)):
        if workload.weights in (None, plan.weights) and not (on_disk and plan.images == "host"):
            plan = replace(plan, images="disk") if on_disk else plan
            held = workload.footprint(plan)
            if workload.pinnable is not None and held.host_weights + held.host_hidden > workload.pinnable:
                plan = replace(plan, pinned=False)
                held = workload.footprint(plan)
            found.append(Candidate(seconds_per_evaluation(workload, plan), held.device, plan, held))
    return found


def _affordable(
    workload: Workload, plans: list[Candidate], budget: int | None, host_budget: int | None
) -> list[Candidate]:
    """Those that the host can hold."""
    host_budget = free_bytes(CPU) if host_budget is None else host_budget
    affordable = [candidate for candidate in plans if candidate.held.host <= host_budget]
    if affordable:
        return affordable
    needed = min(candidate.held.host for candidate in plans)
    within = "" if budget is None else f" within {format_bytes(budget)} on the device"
    raise BudgetTooSmall(
        f"{workload.width}×{workload.height}{within} takes {format_bytes(needed)} of host memory, and "
        f"{format_bytes(host_budget)} is free: close other programs, allow more on the device, or make a smaller "
        "picture",
        needed,
        "host",
    )


def schedules(config: InfDiTConfig, grid: BlockGrid, unified_memory: bool, most: int) -> Iterator[MemoryPlan]:
    """All plans worth a look: every group, chunks by powers of two up to `most` blocks, what can be on the host."""
    most = max(1, min(most, MOST_TOKENS // config.block_tokens))
    chunks = [2**i for i in range(math.ceil(math.log2(grid.blocks)) + 1) if 2**i <= most]
    for group in range(1, config.num_layers + 1):
        for chunk in chunks:
            yield MemoryPlan(group, chunk)
            if unified_memory:
                continue
            yield MemoryPlan(group, chunk, images="host")
            for weights in ("resident", "streamed"):
                for hidden in ("device", "host"):
                    for images in ("device", "host"):
                        if group < config.num_layers and (weights, hidden) != ("resident", "device"):
                            yield MemoryPlan(group, chunk, weights, hidden, images)


def seconds_per_evaluation(workload: Workload, plan: MemoryPlan) -> float:
    """Predicted time of one evaluation of one picture, in all its passes, by the cost model of the device's family."""
    costs = CostModel.of(workload.device, workload.dtype)
    return sum(costs.evaluation(part.config, part.grid, plan, part.dtype) for part in workload.passes)


def free_bytes(device: torch.device) -> int:
    """What a run may take of a device, or of the host for the CPU: what is free less a margin."""
    if device.type in ("cuda", "xpu"):
        card = torch.cuda if device.type == "cuda" else torch.xpu
        ours = card.memory_reserved(device)
        count = getattr(card, "mem_get_info", None)  # of xpu since 2.6
        free = count(device)[0] if count else card.get_device_properties(device).total_memory - ours
        free += ours - card.memory_allocated(device)
    elif device.type == "mps" and hasattr(torch.mps, "recommended_max_memory"):  # since 2.5
        free = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    else:
        free = psutil.virtual_memory().available
    if one_memory(device):  # which others fill too, whatever the device's driver counts
        free = min(free, psutil.virtual_memory().available)
    return int(free * (1 - MARGIN))


def format_bytes(count: int) -> str:
    """Bytes for people."""
    if count < GIB / 10:
        return f"{count / 2**20:.3g} MiB"
    return f"{count / GIB:.3g} GiB" if count < 999.5 * GIB else f"{count / 2**40:.3g} TiB"


def format_seconds(seconds: float) -> str:
    """A time that is foretold, for people: no more digits than are known."""
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < (48 if unit == "h" else 120) * length:
            return f"{seconds / length:.1f} h" if unit == "h" else f"{max(1, seconds / length):.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def _flops(config: InfDiTConfig, grid: BlockGrid) -> float:
    """Of one evaluation: linear layers, attention to four blocks, the low-resolution cross-attention."""
    T, D, W = config.block_tokens, config.hidden_size, config.window_tokens
    cross = 2 * (2 * T + 2 * W) * D * D + 4 * T * W * D
    return grid.blocks * (config.num_layers * _layer_flops(config) + cross)


def _layer_flops(config: InfDiTConfig) -> float:
    """Of one layer of one block."""
    T, D = config.block_tokens, config.hidden_size
    return 2 * T * 12 * D * D + 4 * T * 4 * T * D


def _traffic(config: InfDiTConfig, grid: BlockGrid, plan: MemoryPlan, dtype: torch.dtype) -> float:
    """Bytes over the bus in one evaluation."""
    groups = -(-config.num_layers // min(plan.group, config.num_layers))
    hidden = grid.blocks * config.block_tokens * config.hidden_size * dtype.itemsize
    pictures = 3 * grid.height * grid.width
    total = 0.0
    if plan.weights == "streamed":
        total += Weights.of(config, dtype).streamable
    if plan.hidden == "host":
        total += 2 * (groups - 1) * hidden
    if plan.images != "device":
        total += pictures * (2 * dtype.itemsize + 9 / 16 * dtype.itemsize + FLOAT32)
    return total

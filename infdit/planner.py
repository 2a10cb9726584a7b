"""The planner: of all schedules that fit a budget, the one with the least predicted time.

The constants are of a family of devices, not of one card: they order plans, and tell the time only roughly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import psutil
import torch

from .config import InfDiTConfig
from .grid import BlockGrid
from .memory import FLOAT32, Footprint, MemoryPlan, Weights, WeightsKept, footprint, workspace
from .samplers import Method
from .transfer import Tier

GIB = 2**30
CPU = torch.device("cpu")
MARGIN = 0.1  # of the free memory, left to allocators and to other programs
PATIENCE = 0.25  # seconds between two moves of the bar, at which a run can be stopped too; a block may take longer
MOST_TOKENS = 2**16  # of a chunk: far more than any device needs to run at full speed


class BudgetTooSmall(ValueError):  # noqa: N818 - the interface's name
    """No schedule fits.

    Attributes:
        least: the least number of bytes that works on `tier`.
        tier: "device", or "host" where it is the host that is too small.
    """

    def __init__(self, message: str, least: int, tier: Tier = "device") -> None:
        super().__init__(message)
        self.least, self.tier = least, tier


@dataclass(frozen=True)
class CostModel:
    """What a device does in a second, and how that depends on the schedule.

    Attributes:
        flops: of large matrix products in the network's dtype.
        rows: of a matrix product at which half of that is reached.
        cache: bytes of workspace up to which arithmetic runs at full speed; each doubling beyond costs `spill`.
        call: seconds that a layer's kernels take to start, however small the chunk.
        bus: bytes between host and device.
        exposed: share of the shorter of arithmetic and copies that the longer does not hide; 1: nothing is hidden.
    """

    flops: float
    rows: int
    cache: float
    spill: float
    call: float
    bus: float
    exposed: float

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> CostModel:
        """Round figures for a family: a card with 24 GB, an Apple chip, a CPU by its number of threads."""
        half = dtype.itemsize == 2
        if device.type == "cuda":
            return cls(150e12 if half else 40e12, rows=512, cache=math.inf, spill=0, call=4e-4, bus=20e9, exposed=0.1)
        if device.type == "mps":
            return cls(8e12, rows=256, cache=math.inf, spill=0, call=4e-4, bus=50e9, exposed=1)
        threads = torch.get_num_threads()
        flops = threads * (75e9 if half else 40e9)
        return cls(flops, rows=16, cache=32e6, spill=0.07, call=4e-4, bus=8e9, exposed=1)

    def evaluation(self, config: InfDiTConfig, grid: BlockGrid, plan: MemoryPlan, dtype: torch.dtype) -> float:
        """Seconds that one evaluation takes."""
        chunk = min(plan.chunk, grid.blocks)
        rows = chunk * config.block_tokens
        slower = 1 + self.spill * math.log2(max(1.0, workspace(config, dtype, grid, chunk) / self.cache))
        arithmetic = _flops(config, grid) / self.flops * (1 + self.rows / rows) * slower
        calls = -(-grid.blocks // chunk) * config.num_layers * self.call
        compute = arithmetic + calls if self.exposed == 1 else max(arithmetic, calls)
        copies = _traffic(config, grid, plan, dtype) / self.bus
        return max(compute, copies) + self.exposed * min(compute, copies)

    def longest_chunk(self, config: InfDiTConfig) -> int:
        """Blocks of which one layer takes at most PATIENCE; at least one."""
        return max(1, int(PATIENCE * self.flops / _layer_flops(config)))


@dataclass(frozen=True)
class Request:
    """A run to be planned.

    Attributes:
        config: of the model.
        height, width: of the result in pixels.
        batch: pictures of the run.
        dtype: of the network.
        device: that computes. On a CPU there is one memory, and everything is in it.
        sampler: whose state is held.
        weights: only plans that keep them so; None: any.
        source: height, width and channels of the pictures given; None: RGB of a quarter of the result's sides.
        noise_given: see `memory.footprint`.
    """

    config: InfDiTConfig
    height: int
    width: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = CPU
    sampler: str | Method = "heun"
    weights: WeightsKept | None = None
    source: tuple[int, int, int] | None = None
    noise_given: bool = False

    @property
    def one_memory(self) -> bool:
        """Whether the device's memory is the host's."""
        return self.device.type == "cpu"

    def footprint(self, plan: MemoryPlan) -> Footprint:
        """What a plan holds."""
        return footprint(
            self.config,
            self.height,
            self.width,
            plan,
            self.dtype,
            self.sampler,
            self.batch,
            self.one_memory,
            self.source,
            self.noise_given,
        )

    def candidates(self) -> list[_Candidate]:
        """All plans with their cost."""
        costs, grid = CostModel.of(self.device, self.dtype), self.grid
        found: list[_Candidate] = []
        for plan in schedules(self.config, grid, self.one_memory, costs.longest_chunk(self.config)):
            if self.weights in (None, plan.weights):
                held = self.footprint(plan)
                seconds = costs.evaluation(self.config, grid, plan, self.dtype)
                found.append(_Candidate(seconds, held.device, plan, held))
        return found

    @property
    def grid(self) -> BlockGrid:
        """Of the result."""
        return BlockGrid.covering(self.height, self.width, self.config.block_size)

    def plan(self, budget: int | None = None, host_budget: int | None = None) -> MemoryPlan:
        """The fastest plan within a budget: see `plan_memory`."""
        if budget is not None and budget < 1:
            raise ValueError(f"budget {budget} must be at least one byte")
        budget = free_bytes(self.device) if budget is None else budget
        candidates = self.candidates()
        fitting = [candidate for candidate in candidates if candidate.peak <= budget]
        if not fitting:
            least = min(candidates, key=lambda candidate: candidate.peak)
            raise BudgetTooSmall(
                f"{amount(budget)} is too little for {self.width}×{self.height}: at least {amount(least.peak)} "
                f"(the largest part: {_largest(least.held)}); give more, or make a smaller picture",
                least.peak,
            )
        # the fastest, and of equally fast ones the smallest
        chosen, fastest = (min(some) for some in (self._affordable(fitting, budget, host_budget), candidates))
        slower = f"{chosen.seconds / fastest.seconds:.2f} times as long as with {amount(fastest.peak)}"
        reason = "no other schedule is faster" if chosen.seconds == fastest.seconds else slower
        return chosen.explained(f"{amount(chosen.peak)} of {amount(budget)}; {reason}")

    def thrifty_plan(self, host_budget: int | None = None, slower: float = 0.1) -> MemoryPlan:
        """The smallest plan that is at most `slower` behind the fastest that there is at any budget.

        Raises:
            BudgetTooSmall: the host cannot hold what it would.
        """
        affordable = self._affordable(self.candidates(), None, host_budget)
        limit = (1 + slower) * min(affordable).seconds
        chosen = min((c for c in affordable if c.seconds <= limit), key=lambda candidate: candidate.peak)
        return chosen.explained(f"{amount(chosen.peak)}; more memory would save less than {slower:.0%} of the time")

    def _affordable(
        self, candidates: list[_Candidate], budget: int | None, host_budget: int | None
    ) -> list[_Candidate]:
        """Those that the host can hold."""
        host_budget = free_bytes(CPU) if host_budget is None else host_budget
        affordable = [candidate for candidate in candidates if candidate.held.host <= host_budget]
        if affordable:
            return affordable
        needed = min(candidate.held.host for candidate in candidates)
        within = "" if budget is None else f" within {amount(budget)} on the device"
        raise BudgetTooSmall(
            f"{self.width}×{self.height}{within} takes {amount(needed)} of host memory, and {amount(host_budget)} is "
            "free: close other programs, allow more on the device, or make a smaller picture",
            needed,
            "host",
        )


@dataclass(frozen=True, order=True)
class _Candidate:
    seconds: float
    peak: int
    plan: MemoryPlan = field(compare=False)
    held: Footprint = field(compare=False)

    def explained(self, reason: str) -> MemoryPlan:
        return replace(self.plan, peak_bytes=self.peak, host_bytes=self.held.host, reason=reason)


def plan_memory(
    config: InfDiTConfig,
    height: int,
    width: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    sampler: str | Method = "heun",
    budget: int | None = None,
    host_budget: int | None = None,
    weights: WeightsKept | None = None,
) -> MemoryPlan:
    """The fastest plan within a budget.

    Args:
        config, height, width, batch, dtype, device, sampler, weights: see `Request`; device None is the CPU.
        budget: bytes on the device that the whole of `upscale()` may hold; None: what is free there, less a margin.
        host_budget: bytes on the host; None: what is free there, less a margin.

    Returns:
        A plan with its predicted `peak_bytes` and `host_bytes`, and the `reason` for it.

    Raises:
        BudgetTooSmall: with the least number of bytes that works.
        ValueError: a budget under one byte.
    """
    request = Request(config, height, width, batch, dtype, torch.device(device or "cpu"), sampler, weights)
    return request.plan(budget, host_budget)


def seconds_per_evaluation(
    config: InfDiTConfig, grid: BlockGrid, plan: MemoryPlan, dtype: torch.dtype, device: torch.device
) -> float:
    """Predicted time of one evaluation of one picture, by the cost model of the device's family."""
    return CostModel.of(device, dtype).evaluation(config, grid, plan, dtype)


def schedules(config: InfDiTConfig, grid: BlockGrid, one_memory: bool, most: int) -> Iterator[MemoryPlan]:
    """All plans worth a look: every group, chunks by powers of two up to `most` blocks, what can be on the host."""
    groups = range(1, config.num_layers + 1)
    most = max(1, min(most, MOST_TOKENS // config.block_tokens))
    chunks = [2**i for i in range(math.ceil(math.log2(grid.blocks)) + 1) if 2**i <= most]
    for group in groups:
        for chunk in chunks:
            yield MemoryPlan(group, chunk)
            if one_memory:
                continue
            yield MemoryPlan(group, chunk, images="host")
            for weights in ("resident", "streamed"):
                for hidden in ("device", "host"):
                    for images in ("device", "host"):
                        if group < config.num_layers and (weights, hidden) != ("resident", "device"):
                            yield MemoryPlan(group, chunk, weights, hidden, images)


def free_bytes(device: torch.device) -> int:
    """What a run may take of a device, or of the host for the CPU: what is free less a margin."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    elif device.type == "mps":
        most = getattr(torch.mps, "recommended_max_memory", None)  # since 2.5
        free = most() - torch.mps.current_allocated_memory() if most else psutil.virtual_memory().available
    else:
        free = psutil.virtual_memory().available
    return int(free * (1 - MARGIN))


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
        total += Weights.of(config, dtype).movable
    if plan.hidden == "host":
        total += 2 * (groups - 1) * hidden
    if plan.images == "host":
        total += pictures * (2 * dtype.itemsize + 9 / 16 * dtype.itemsize + FLOAT32)
    return total


def amount(count: int) -> str:
    """Bytes for people."""
    if count < GIB / 10:
        return f"{count / 2**20:.3g} MiB"
    return f"{count / GIB:.3g} GiB" if count < 999.5 * GIB else f"{count / 2**40:.3g} TiB"


def _largest(held: Footprint) -> str:
    parts = {
        "the weights": held.weights,
        "the ring of keys and values": held.ring,
        "the hidden states": held.hidden,
        "the pictures": held.images,
        "the workspace": held.workspace,
    }
    return max(parts, key=lambda name: parts[name])

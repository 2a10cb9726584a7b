"""The planner: of all schedules that fit a budget, the fastest; or the smallest of those that are about as fast."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from ..config import InfDiTConfig
from ..device import one_memory
from ..disk import free_in
from ..grid import BlockGrid
from ..samplers import SamplerInfo
from .cost import CostModel, in_turn, seconds_per_evaluation
from .footprint import Footprint
from .plan import CPU, MemoryPlan, Place, WeightsKept, Workload

if TYPE_CHECKING:
    from ..stages import Elsewhere

GIB = 2**30
MARGIN = 0.1  # of the free memory, left to allocators and to other programs
SLOWER = 0.1  # share of the time that the thriftiest plan may take more than the fastest
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
        free: asks how many bytes the run may hold on a device now, when memory ran out in spite of the plan.
        elsewhere: other processes that have some of the layers.
    """

    workload: Workload
    plan: MemoryPlan
    free: Callable[[torch.device], int]
    elsewhere: Elsewhere | None = None

    @property
    def _disk(self) -> int | None:
        """Bytes of the disk that a new plan may take: as many as it likes where the pictures are there already."""
        return sys.maxsize if self.plan.images == "disk" else None

    def unpinned(self) -> PlannedRun:
        """The same without pinned memory, and with the plan that is then the fastest of those that take no more."""
        workload, plan = replace(self.workload, pinnable=0), replace(self.plan, pinned=False)
        if plan.peak_bytes is not None:  # not made by hand
            with suppress(BudgetTooSmall):
                plan = fastest_plan(workload, plan.peak_bytes, disk_budget=self._disk)
        return replace(self, workload=workload, plan=plan)

    def smaller(self) -> PlannedRun:
        """The same under a plan that takes less: what is free now, or a quarter less; at last on one device of several.

        Raises:
            OutOfMemory: there is none.
        """
        peak = self.plan.peak_bytes or self.workload.footprint(self.plan).device
        # pictures are made already, and stay out of the way only where they lie
        workload = self.workload if self.plan.images == "disk" else replace(self.workload, folder=None)
        try:
            smaller = max(1, peak * 3 // 4)
            return replace(self, plan=fastest_plan(workload, smaller, disk_budget=self._disk, free=self.free))
        except BudgetTooSmall as error:
            if error.tier == "device" and error.least < peak:
                return replace(self, plan=fastest_plan(workload, error.least, disk_budget=self._disk))
            if self.plan.layers and error.tier == "device" and error.least <= self.free(workload.device):
                alone = replace(workload, beside=())
                return replace(self, workload=alone, plan=fastest_plan(alone, free=self.free))
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
    workload: Workload, budget: int | None = None, host_budget: int | None = None, disk_budget: int | None = None,
    free: Callable[[torch.device], int] | None = None,
) -> MemoryPlan:
    """The fastest plan within a budget, and of equally fast ones the smallest; pictures are on disk if they must be.

    Args:
        workload: what is computed.
        budget: bytes on the device that the whole of `upscale()` may hold; None: what is free there, less a margin. Of
            several devices on each.
        host_budget: bytes on the host; None: what is free there, less a margin.
        disk_budget: bytes in the workload's folder; None: what is free there, less a margin.
        free: what is free on a device; where it is given, no more than that is taken, whatever the budget.

    Several devices share the layers where that is faster and all find room on them; else the first has them all.

    Raises:
        BudgetTooSmall: with the least number of bytes that works.
        ValueError: a budget under one byte.
    """
    if budget is not None and budget < 1:
        raise ValueError(f"budget {budget} must be at least one byte")

    def room(device: torch.device) -> int:
        asked = free or (free_bytes if budget is None else None)
        return max(1, min(sys.maxsize if budget is None else budget, asked(device) if asked else sys.maxsize))

    shared = shared_plan(workload, room, host_budget) if workload.beside else None
    if shared is not None:
        return shared
    budget = room(workload.device)
    try:
        return _fastest(workload, candidates(workload), budget, host_budget)
    except BudgetTooSmall:
        if workload.folder is None:
            raise
    plan = _fastest(workload, candidates(workload, on_disk=True), budget, host_budget)
    there = free_in(workload.folder) if disk_budget is None else disk_budget
    needed = plan.disk_bytes or 0
    if needed > there:
        raise BudgetTooSmall(
            f"{workload.width}×{workload.height} is more than memory holds, and takes {format_bytes(needed)} of the "
            f"disk of {workload.folder}, where {format_bytes(there)} are free: make room, or set TMPDIR to a folder on "
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


def thrifty_plan(workload: Workload, host_budget: int | None = None, in_place: bool = False) -> MemoryPlan:
    """The smallest plan that is at most SLOWER behind the fastest that there is at any budget.

    in_place: of those that keep weights and hidden states on the device, if the workload lets it.

    Raises:
        BudgetTooSmall: the host cannot hold what it would.
    """
    plans = candidates(workload)
    if in_place:
        plans = [c for c in plans if (c.plan.weights, c.plan.hidden) == ("resident", "device")] or plans
    affordable = _affordable(workload, plans, None, host_budget)
    limit = (1 + SLOWER) * min(affordable).seconds
    chosen = min((c for c in affordable if c.seconds <= limit), key=lambda candidate: candidate.peak)
    return chosen.explained(f"more memory would save less than {SLOWER:.0%} of the time")


class Offer(NamedTuple):
    """What a device, here or elsewhere, can do: seconds that a layer takes it, and so many layers at most."""

    seconds: float
    layers: int


def offers(workload: Workload, device: torch.device, room: int) -> list[Offer]:
    """What a device with so many bytes can do, for each number of blocks that a chunk may have."""
    config = workload.config
    found: list[Offer] = []
    for chunk in _chunks(config, workload.grid):
        plan = MemoryPlan(config.num_layers, chunk, images="host")
        seconds = seconds_per_evaluation(replace(workload, device=device, beside=()), plan) / config.num_layers
        held = (workload.share(plan, device, count).device for count in range(1, config.num_layers + 1))
        found.append(Offer(seconds, sum(1 for _ in takewhile(lambda size: size <= room, held))))
    return found


def shared_plan(
    workload: Workload, room: Callable[[torch.device], int], host_budget: int | None = None,
    elsewhere: Sequence[Sequence[Offer]] = (), link: float = 0.0,
) -> MemoryPlan | None:
    """The fastest plan in which several devices have some of the layers each; None where one is as fast, or must do.

    All weights, keys and values are on the devices and pictures on the host: no chunk waits for more than the one
    before it.

    Args:
        workload, host_budget: see `fastest_plan`; room: bytes that the run may hold on a device.
        elsewhere: what other processes offer, see `ranks`; then the first device has a layer in any case.
        link: seconds that a byte takes from one process to the next.
    """
    config, grid = workload.config, workload.grid
    host_budget = free_bytes(CPU) if host_budget is None else host_budget
    rooms = [room(device) for device in workload.devices]
    shares_memory = [one_memory(device) for device in workload.devices]
    pictures = workload.footprint(MemoryPlan(images="host")).host
    rooms = [(r - pictures) // sum(shares_memory) if one else r for r, one in zip(rooms, shares_memory, strict=True)]
    here = (offers(workload, device, room) for device, room in zip(workload.devices, rooms, strict=True))
    blocks, unit = sum(part.grid.blocks for part in workload.passes), config.block_tokens * config.hidden_size
    sent = blocks * unit * workload.dtype.itemsize  # over each link
    found: list[Candidate] = []
    for chunk, *offered in zip(_chunks(config, grid), *here, *elsewhere, strict=True):
        layers = _split(config.num_layers, offered, first=1 if elsewhere else 0)
        if layers is None or sum(count > 0 for count in layers) < 2:
            continue
        plan = MemoryPlan(config.num_layers, chunk, images="host", layers=layers)
        held = workload.share(plan, workload.device, layers[0]) if elsewhere else workload.footprint(plan)
        if held.host <= host_budget:
            work = [count * offer.seconds for count, offer in zip(layers, offered, strict=True) if count]
            found.append(Candidate(max(in_turn(work, workload, plan), link * sent), held.device, plan, held))
    alone = (plan.seconds for plan in candidates(workload) if plan.peak <= rooms[0])
    if not found or min(found).seconds >= min(alone, default=math.inf):
        return None
    best = min(found)
    return best.explained(f"{sum(count > 0 for count in best.plan.layers)} devices work at the same time")


def _split(depth: int, offered: Sequence[Offer], first: int) -> tuple[int, ...] | None:
    """How many layers each device takes so that the last is done soonest; None: there is no room.

    first: as many the first has at least.
    """
    counts = [0] * len(offered)
    for number in range(depth):
        able = [i for i, offer in enumerate(offered) if counts[i] < offer.layers and (number >= first or not i)]
        if not able:
            return None
        counts[min(able, key=lambda i: (counts[i] + 1) * offered[i].seconds)] += 1
    return tuple(counts)


def candidates(workload: Workload, on_disk: bool = False) -> list[Candidate]:
    """What `schedules` lists, with its cost; on_disk: with pictures there, wherever they were."""
    return _candidates(workload, on_disk, CostModel.of(workload.device, workload.dtype))


@lru_cache(2)  # many budgets are asked for one workload
def _candidates(workload: Workload, on_disk: bool, costs: CostModel) -> list[Candidate]:
    config, grid = workload.config, workload.grid
    found: list[Candidate] = []
    for plan in schedules(config, grid, workload.unified_memory, costs.longest_chunk(config)):
        if workload.weights in (None, plan.weights) and not (on_disk and plan.images == "host"):
            plan = replace(plan, images="disk") if on_disk else plan
            held = workload.footprint(plan)
            if workload.pinnable is not None and held.host_weights + held.host_hidden > workload.pinnable:
                plan = replace(plan, pinned=False)
                held = workload.footprint(plan)
            found.append(Candidate(seconds_per_evaluation(workload, plan, held), held.device, plan, held))
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
    chunks = [chunk for chunk in _chunks(config, grid) if chunk <= max(1, most)]
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


def _chunks(config: InfDiTConfig, grid: BlockGrid) -> list[int]:
    """Numbers of blocks worth a look: powers of two, up to all."""
    most = max(1, MOST_TOKENS // config.block_tokens)
    return [2**i for i in range(math.ceil(math.log2(grid.blocks)) + 1) if 2**i <= most]


def free_bytes(device: torch.device) -> int:
    """What a run may take of a device, or of the host for the CPU: what is free less a margin."""
    if device.type in ("cuda", "xpu"):
        card = torch.cuda if device.type == "cuda" else torch.xpu
        ours = card.memory_reserved(device)
        count = getattr(card, "mem_get_info", None)  # of xpu since 2.6
        # by number: some versions know no device without one
        free = count(device.index)[0] if count else card.get_device_properties(device).total_memory - ours
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
    if count < 2**10:
        return f"{count} B"
    if count < GIB / 10:
        return f"{count / 2**20:.3g} MiB"
    return f"{count / GIB:.3g} GiB" if count < 999.5 * GIB else f"{count / 2**40:.3g} TiB"


def format_seconds(seconds: float) -> str:
    """A time that is foretold, for people: no more digits than are known."""
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < (48 if unit == "h" else 120) * length:
            return f"{seconds / length:.1f} h" if unit == "h" else f"{max(1, seconds / length):.0f} {unit}"
    return f"{seconds / 86400:.0f} days"

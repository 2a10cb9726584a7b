"""How long an evaluation takes under a plan, by what a device does in a second.

That is measured where the device is at hand, see `measure`; all other figures are of a family of devices. They order
plans, and tell the time only roughly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import InfDiTConfig
from ..grid import BlockGrid
from ..samplers import evaluations
from . import measure
from .footprint import FLOAT32, Footprint, Weights, workspace

if TYPE_CHECKING:
    from .plan import MemoryPlan, Workload

MAX_LAYER_SECONDS = 0.25  # between two moves of the bar, at which a run can be stopped; a block may take longer
EFFICIENCY = 0.7  # of the speed of a bare product, what a whole evaluation reaches, about: the rest waits for memory
DISK = 5e8  # bytes a second to and from a disk
PLAIN_BUS = 6e9  # bytes a second to and from memory that is not pinned, and no arithmetic hides them


@dataclass(frozen=True)
class CostModel:
    """What a device does in a second, and how that depends on the schedule.

    Attributes:
        flops: of large matrix products in the network's dtype.
        rows: of a matrix product at which half of that is reached.
        cache: bytes of workspace up to which arithmetic runs at full speed; each doubling beyond costs `cache_penalty`.
        launch_overhead: seconds that a layer's kernels take to start, however small the chunk.
        bus: bytes between pinned memory of the host and the device.
        locking: bytes of the host that are pinned; once a run.
        overlap_loss: share of the shorter of arithmetic and copies that the longer does not hide; 1: nothing is hidden.
    """

    flops: float
    rows: int
    cache: float
    cache_penalty: float
    launch_overhead: float
    bus: float
    overlap_loss: float
    locking: float = math.inf

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> CostModel:
        """As measured where the device is here, and what was not measured of its family."""
        family, speed = cls.family(device, dtype), measure.measured(device, dtype)
        if speed is None:
            return family
        bus, locking = speed.bus or family.bus, speed.locking or family.locking
        return replace(family, flops=EFFICIENCY * speed.flops, bus=bus, locking=locking)

    @classmethod
    def family(cls, device: torch.device, dtype: torch.dtype) -> CostModel:
        """Round figures for a family: a card with 24 GB, an Intel card, an Apple chip, a CPU by its threads."""
        half = dtype.itemsize == 2
        if device.type == "cuda":
            return cls(150e12 if half else 40e12, 512, math.inf, 0, 4e-4, bus=20e9, overlap_loss=0.1, locking=4e9)
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


def seconds_per_evaluation(workload: Workload, plan: MemoryPlan, held: Footprint | None = None) -> float:
    """Predicted time of one evaluation of one picture, in all its passes, and its share of pinning memory for a run.

    held: the plan's footprint, if it is known.

    Several devices take as long as the slowest, and one after the other until a chunk has come to the last.
    """
    if plan.layers:
        stages = plan.stages(workload.devices, workload.config.num_layers)
        works = [
            replace(workload, config=replace(workload.config, num_layers=len(layers)), device=device, beside=())
            for device, layers in stages
        ]
        return in_turn([seconds_per_evaluation(work, replace(plan, layers=())) for work in works], workload, plan)
    costs = CostModel.of(workload.device, workload.dtype)
    seconds = sum(costs.evaluation(part.config, part.grid, plan, part.dtype) for part in workload.passes)
    if plan.pinned and (plan.weights, plan.hidden) != ("resident", "device"):
        held = held or workload.footprint(plan)
        seconds += (held.host_weights + held.host_hidden) / costs.locking / (workload.batch * workload.evaluations)
    return seconds


def seconds_of_run(workload: Workload, plan: MemoryPlan, levels: Sequence[Tensor]) -> float:
    """Predicted time of a run over these noise levels of each pass."""
    counts = [evaluations(workload.sampler, sigmas) for sigmas in levels]
    if len(set(counts)) == 1:
        return workload.batch * counts[0] * seconds_per_evaluation(workload, plan)
    each = zip(counts, workload.passes, strict=True)
    return workload.batch * sum(count * seconds_per_evaluation(part, plan) for count, part in each)


def in_turn(seconds: Sequence[float], workload: Workload, plan: MemoryPlan) -> float:
    """Seconds of an evaluation whose layers several devices share, from those that each works."""
    chunks = min(-(-part.grid.blocks // plan.chunk) for part in workload.passes)
    return max(seconds) * (1 + (len(seconds) - 1) / chunks)


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

"""What several devices gain: every chunk and every handover of an evaluation as an event, by the cost model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from infdit.config import InfDiTConfig
from infdit.memory.cost import CostModel, seconds_per_evaluation
from infdit.memory.plan import MemoryPlan, Workload
from infdit.memory.planner import GIB, fastest_plan, format_seconds

DEVICES, SIDES, EVALUATIONS = (1, 2, 4, 8), (4096, 8192, 16384, 32768), 39


def makespan(stages: Sequence[float], chunks: int, handover: float) -> float:
    """Seconds until the last of so many stages is done with the last chunk.

    Args:
        stages: seconds that each takes for a chunk; chunks: how many; handover: seconds of a chunk on its way.

    A stage hands a chunk on when the next one has taken the one before: one waits there at most (`stages.Handover`).
    """
    began = [[0.0] * chunks for _ in stages]
    free = [0.0] * len(stages)
    for chunk in range(chunks):
        there = 0.0  # when the chunk can be taken
        for number, seconds in enumerate(stages):
            began[number][chunk] = max(there, free[number])
            done = began[number][chunk] + seconds
            if number + 1 < len(stages) and chunk:
                done = max(done, began[number + 1][chunk - 1])  # there is room only then
            free[number], there = done, done + handover
    return max(free)


def simulated(workload: Workload, plan: MemoryPlan) -> tuple[float, float]:
    """Seconds of an evaluation, and the share of all devices' time in which they compute."""
    chunks = -(-workload.grid.blocks // plan.chunk)
    stages: list[float] = []
    for device, layers in plan.stages(workload.devices, workload.config.num_layers):
        config = replace(workload.config, num_layers=len(layers))
        alone = replace(workload, config=config, device=device, beside=())
        stages.append(seconds_per_evaluation(alone, replace(plan, layers=())) / chunks)
    config, costs = workload.config, CostModel.of(workload.device, workload.dtype)
    tokens = plan.chunk * config.block_tokens * config.hidden_size * workload.dtype.itemsize
    seconds = makespan(stages, chunks, tokens / costs.bus)
    return seconds, sum(stages) * chunks / (len(stages) * seconds)


def report() -> Iterator[str]:
    """A row for each size and number of cards of the published model."""
    yield "| | cards | layers of each | on each, GiB | on the host, GiB | 39 evaluations | at work |"
    yield "|---|---|---|---|---|---|---|"
    for side in SIDES:
        for count in DEVICES:
            first, *beside = (torch.device("cuda", number) for number in range(count))
            workload = Workload(InfDiTConfig(), side, side, device=first, beside=tuple(beside))
            plan = fastest_plan(workload, 24 * GIB, 2**50)
            seconds, share = seconds_per_evaluation(workload, plan), 1.0
            if plan.layers:
                seconds, share = simulated(workload, plan)
            elif count > 1:
                continue  # they find no room for all layers and their keys and values
            held = f"{(plan.peak_bytes or 0) / GIB:.3g} | {(plan.host_bytes or 0) / GIB:.3g}"
            layers = math.ceil(workload.config.num_layers / count)
            told = format_seconds(EVALUATIONS * seconds)
            yield f"| {side} × {side} | {count} | {layers} | {held} | {told} | {share:.0%} |"

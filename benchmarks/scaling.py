"""What several devices gain: every chunk and every handover of an evaluation as an event, by the cost model.

And two stages on two threads of a CPU against one, measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from infdit.config import InfDiTConfig
from infdit.grid import BlockGrid
from infdit.memory.cost import CostModel, seconds_per_evaluation
from infdit.memory.plan import MemoryPlan, Workload
from infdit.memory.planner import GIB, MOST_TOKENS, fastest_plan, format_seconds
from infdit.model import InfDiT

from .speed import time_plans

DEVICES, SIDES, EVALUATIONS, CARD = (1, 2, 4, 8), (4096, 8192, 16384, 32768), 39, 24 * GIB


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
    chunks, stages = -(-workload.grid.blocks // plan.chunk), alone(workload, plan)
    config, costs = workload.config, CostModel.of(workload.device, workload.dtype)
    tokens = plan.chunk * config.block_tokens * config.hidden_size * workload.dtype.itemsize
    seconds = makespan([stage / chunks for stage in stages], chunks, tokens / costs.bus)
    return seconds, sum(stages) / (len(stages) * seconds)


def alone(workload: Workload, plan: MemoryPlan) -> list[float]:
    """Seconds of an evaluation that each stage would take if it never waited."""
    config, shares = workload.config, plan.stages(workload.devices, workload.config.num_layers)
    return [
        seconds_per_evaluation(
            replace(workload, config=replace(config, num_layers=len(layers)), device=device, beside=()),
            replace(plan, layers=()),
        )
        for device, layers in shares
    ]


def without_pauses(workload: Workload, plan: MemoryPlan) -> float:
    """Seconds of an evaluation if the next began while it is finished: those of the slowest stage.

    In chunks as large as are best then: small ones only make the pauses short.
    """
    found: list[float] = []
    while plan.chunk * workload.config.block_tokens <= MOST_TOKENS and workload.footprint(plan).device <= CARD:
        found.append(max(alone(workload, plan)))
        plan = replace(plan, chunk=2 * plan.chunk)
    return min(found)


def report() -> Iterator[str]:
    """A row for each size and number of cards of the published model."""
    titles = "cards", "layers of each", "on each, GiB", "on the host, GiB", "39 evaluations", "at work"
    yield f"| | {' | '.join(titles)} | overlap would save |"
    yield "|---" * (len(titles) + 2) + "|"
    for side in SIDES:
        for count in DEVICES:
            first, *beside = (torch.device("cuda", number) for number in range(count))
            workload = Workload(InfDiTConfig(), side, side, device=first, beside=tuple(beside))
            plan = fastest_plan(workload, CARD, 2**50)
            seconds, share, saved = seconds_per_evaluation(workload, plan), 1.0, 0.0
            if plan.layers:
                seconds, share = simulated(workload, plan)
                saved = 1 - without_pauses(workload, plan) / seconds
            elif count > 1:
                continue  # they find no room for all layers and their keys and values
            held = f"{(plan.peak_bytes or 0) / GIB:.3g} | {(plan.host_bytes or 0) / GIB:.3g}"
            layers = math.ceil(workload.config.num_layers / count)
            told = format_seconds(EVALUATIONS * seconds)
            yield f"| {side} × {side} | {count} | {layers} | {held} | {told} | {share:.0%} | {saved:.0%} |"


def measured(model: InfDiT, size: tuple[int, int], rounds: int = 5) -> Iterator[str]:
    """A line: two stages of half the layers each on two threads of a CPU, and one that has all on one thread.

    model: on the CPU; size: (height, width) of the result.
    """
    depth, device, threads = model.config.num_layers, torch.device("cpu"), torch.get_num_threads()
    plan = MemoryPlan.default(model.config)
    plans = [plan, replace(plan, layers=(depth - depth // 2, depth // 2))]
    torch.set_num_threads(1)  # of each stage
    one, two = (timing.measured for timing in time_plans(model, plans, *size, device, rounds))
    torch.set_num_threads(threads)
    chunks = -(-BlockGrid.covering(*size, model.config.block_size).blocks // plan.chunk)
    yield (
        f"{size[1]}×{size[0]}, chunks: {chunks} of {plan.chunk} blocks: {one:.2f} s on one thread, {two:.2f} s as two "
        f"stages on two, {one / two:.2f} times as fast ({2 * chunks / (chunks + 1):.2f} by the formula)"
    )

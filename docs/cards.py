"""Prints the README's table of what cards hold and take, as `python -m infdit plan` would foretell it beside each.

Run from the project's root as `python -m docs.cards`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch

from infdit.checkpoint import read_checkpoint
from infdit.config import InfDiTConfig, SamplingDefaults
from infdit.memory import measure
from infdit.memory.cost import seconds_per_evaluation
from infdit.memory.plan import MemoryPlan, Workload
from infdit.memory.planner import GIB, MARGIN, BudgetTooSmall, fastest_plan, format_seconds
from infdit.samplers import evaluations
from infdit.upscale import schedule

SIDES = {"published": (2048, 4096, 8192, 16384), "bundled": (4096, 16384)}  # pixels of square results
OTHERS = 1.5  # GiB of a card that are not a run's: its CUDA context, a desktop, a browser
COPIED = 0.8  # of what a slot's standard says, what copies from pinned memory reach
SHORT = 5  # seconds: less is not foretold well enough to say


class Card(NamedTuple):
    """What a data sheet says.

    Attributes:
        memory: GiB.
        tflops: of products of half-precision matrices that are summed in float32, without sparsity, 1e12 a second:
            512 a clock for each multiprocessor of these cards.
        slot: GB a second of its PCI Express.
    """

    name: str
    memory: int
    tflops: float
    slot: float

    @property
    def budget(self) -> int:
        """Bytes that a run takes there of itself."""
        return int((1 - MARGIN) * (self.memory - OTHERS) * GIB)

    def speed(self) -> measure.Speed:
        """What the planner would measure, were the card here."""
        return measure.Speed(self.tflops * 1e12, COPIED * self.slot * 1e9)


CARDS = (
    Card("RTX 2060", 6, 25.8, 15.8),
    Card("RTX 4060", 8, 30.2, 15.8),
    Card("RTX 3060", 12, 25.5, 31.5),
    Card("RTX 4060 Ti", 16, 44.1, 15.8),
    Card("RTX 4090", 24, 165, 31.5),
)


def table() -> str:
    """A row for each card, a cell for each model and size: on the card + beside it, time; at last the least."""
    works = list(_works())
    heads = ("card", "TFLOP/s, GB/s", *(f"{name} {work.height}²" for name, work in works))
    rows = [heads, ("---",) * len(heads)]
    held = functools.cache(Workload.footprint)  # which is the same beside every card
    for card in CARDS:
        speed = mock.patch.object(measure, "measured", lambda device, dtype, card=card: card.speed())
        with speed, mock.patch.object(Workload, "footprint", held):
            cells = [_cell(work, card.budget) for _, work in works]
        rows.append((f"{card.memory} GB: {card.name}", f"{card.tflops:g}, {card.slot:g}", *cells))
    rows.append(("any, the least", "", *(_held(_least(work)) for _, work in works)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _works() -> Iterator[tuple[str, Workload]]:
    bundled = read_checkpoint("mini")
    models = (("published", InfDiTConfig(), SamplingDefaults()), ("bundled", bundled.config, bundled.defaults))
    for name, config, defaults in models:
        count = evaluations(defaults.sampler, schedule(defaults))
        for side in SIDES[name]:
            device = torch.device("cuda")
            yield name, Workload(config, side, side, device=device, sampler=defaults.sampler, evaluations=count)


def _least(workload: Workload) -> MemoryPlan:
    """The plan that holds the least."""
    try:
        return fastest_plan(workload, 1, sys.maxsize)
    except BudgetTooSmall as error:
        return fastest_plan(workload, error.least, sys.maxsize)


def _held(plan: MemoryPlan) -> str:
    return f"{(plan.peak_bytes or 0) / GIB:.2g} + {(plan.host_bytes or 0) / GIB:.2g} GiB"


def _cell(workload: Workload, budget: int) -> str:
    plan = fastest_plan(workload, budget, sys.maxsize)
    seconds = workload.evaluations * seconds_per_evaluation(workload, plan)
    return f"{_held(plan)}, {'seconds' if seconds < SHORT else format_seconds(seconds)}"


if __name__ == "__main__":
    print(table())

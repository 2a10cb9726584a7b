"""Prints the README's table of what a run holds and takes; the same as `python -m infdit plan` foretells, size by size.

Run from the project's root as `python -m docs.cards`.
"""

from __future__ import annotations

import sys

import torch

from infdit.checkpoint import read_checkpoint
from infdit.config import InfDiTConfig, SamplingDefaults
from infdit.memory.cost import seconds_per_evaluation
from infdit.memory.plan import Workload
from infdit.memory.planner import GIB, BudgetTooSmall, fastest_plan, format_bytes, format_seconds
from infdit.samplers import evaluations
from infdit.upscale import schedule

SIDES = {"published": (2048, 4096, 8192, 16384), "bundled": (4096, 16384)}  # pixels of square results
BUDGETS = (2, 8, 24)  # GiB
SHORT = 5  # seconds: less is not foretold well enough to say


def table() -> str:
    """A row for each model and size, a cell for each budget: on the card + beside it, time."""
    bundled = read_checkpoint("mini")
    heads = ("model", "result", "the least", *(f"{budget} GiB" for budget in BUDGETS))
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    models = (("published", InfDiTConfig(), SamplingDefaults()), ("bundled", bundled.config, bundled.defaults))
    for name, config, defaults in models:
        for side in SIDES[name]:
            workload = Workload(config, side, side, device=torch.device("cuda"), sampler=defaults.sampler)
            count = evaluations(defaults.sampler, schedule(defaults))
            cells = [_cell(workload, budget, count) for budget in (_least(workload), *(b * GIB for b in BUDGETS))]
            rows.append("| " + " | ".join((name, f"{side}²", *cells)) + " |")
    return "\n".join(rows)


def _least(workload: Workload) -> int:
    """The least number of bytes that works."""
    try:
        fastest_plan(workload, 1, sys.maxsize)
    except BudgetTooSmall as error:
        return error.least
    raise AssertionError("no picture fits in one byte")


def _cell(workload: Workload, budget: int, count: int) -> str:
    plan = fastest_plan(workload, budget, sys.maxsize)
    seconds = count * seconds_per_evaluation(workload, plan)
    time = "seconds" if seconds < SHORT else format_seconds(seconds)
    return f"{format_bytes(plan.peak_bytes or 0)} + {format_bytes(plan.host_bytes or 0)}, {time}"


if __name__ == "__main__":
    print(table())

"""plan: what a run would hold and how long it would take, before it is run."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import torch

from ..checkpoint import read_checkpoint
from ..config import InfDiTConfig, SamplingDefaults
from ..device import default_device, default_dtype
from ..memory import MemoryPlan, Weights
from ..planner import GIB, BudgetTooSmall, Request, amount, seconds_per_evaluation
from ..samplers import SAMPLERS, evaluations
from ..upscale import schedule
from ..verify import counted_peak
from .arguments import DTYPES, add_memory, duration, known_device, size_of

BUDGETS = (0.5, 1, 1.5, 2, 4, 8, 16, 24, 48, 80)  # GiB, of the table


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    p = commands.add_parser("plan", help="what a run would hold and how long it would take", description=run.__doc__)
    p.set_defaults(command=run)
    p.add_argument("size", type=size_of, metavar="WxH", help="size of the result in pixels")
    p.add_argument("--model", metavar="FILE", help="default: the published size")
    p.add_argument("--sampler", choices=list(SAMPLERS), help="default: the model's")
    p.add_argument("--steps", type=int, metavar="N", help="default: the model's")
    p.add_argument("--verify", action="store_true", help="count the peak on tensors that take no memory")
    add_memory(p)


def run(options: argparse.Namespace) -> int:
    """Print the schedule that a budget allows, its predicted memory and time, and what other budgets would give."""
    checkpoint = None if options.model is None else read_checkpoint(options.model)
    config = checkpoint.config if checkpoint else InfDiTConfig()
    defaults = checkpoint.defaults if checkpoint else SamplingDefaults()
    height, width = options.size
    device = known_device(options.device) if options.device else default_device()
    dtype = DTYPES[options.dtype] or (default_dtype(device) if options.device is None else torch.bfloat16)
    sampler = options.sampler or defaults.sampler
    request = Request(config, height, width, 1, dtype, device, sampler)
    count = evaluations(sampler, schedule(defaults, options.steps))
    elsewhere = options.budget is None and options.device is not None  # what is free on a device that need not be here?
    if options.verify and elsewhere:
        raise ValueError("--verify counts what one budget gives: name it with --budget, like 1GiB")
    for line in _table(request, count, defaults.start, options.budget, not elsewhere):
        print(line)
    if not elsewhere:
        plan = request.plan(options.budget, sys.maxsize)
        print(f"\n{plan.reason}")
        if options.verify:
            _verify(request, plan)
    return 0


def _table(request: Request, count: int, start: str, budget: int | None, own_row: bool) -> Iterator[str]:
    config, grid = request.config, request.grid
    weights = amount(Weights.of(config, request.dtype).total)
    yield f"{request.width}×{request.height}: {grid.blocks} blocks of {grid.block} px, {config.num_layers} layers"
    yield f"weights {weights} as {str(request.dtype).removeprefix('torch.')}; {count} evaluations ({request.sampler})"
    if start:
        yield start
    yield f"times are rough, of a {request.device.type} in general; memory is exact to a few percent"
    yield ""
    yield f"{'budget':>10}  {'device':>11} {'host':>11} {'time':>9}   schedule"
    if own_row:
        yield f"{'free' if budget is None else 'asked':>10}  {_outcome(request, budget, count)}"
    for gib in BUDGETS:
        yield f"{f'{gib} GiB':>10}  {_outcome(request, int(gib * GIB), count)}"


def _outcome(request: Request, budget: int | None, count: int) -> str:
    """A row of the table: what a budget gives, or the least that works."""
    try:
        plan = request.plan(budget, sys.maxsize)
    except BudgetTooSmall as error:
        return f"at least {error.least / GIB:.3g} GiB"
    seconds = count * seconds_per_evaluation(request.config, request.grid, plan, request.dtype, request.device)
    kept = f"weights {plan.weights}, hidden states on the {plan.hidden}, pictures on the {plan.images}"
    memory = f"{(plan.peak_bytes or 0) / GIB:7.3g} GiB {(plan.host_bytes or 0) / GIB:7.3g} GiB"
    return f"{memory} {duration(seconds):>9}   {plan.group} layers × {plan.chunk} blocks; {kept}"


def _verify(request: Request, plan: MemoryPlan) -> None:
    began = time.monotonic()
    counted = counted_peak(request, plan)
    print(f"device: {amount(counted['device'])} counted on fake tensors, {amount(plan.peak_bytes or 0)} foretold")
    print(f"host: {amount(counted['host'])} counted on fake tensors, {amount(plan.host_bytes or 0)} foretold")
    print(f"counted in {time.monotonic() - began:.0f} s")

"""plan: what a run would hold and how long it would take, before it is run."""

from __future__ import annotations

import argparse
import sys

import torch

from ..checkpoint import read_checkpoint
from ..config import InfDiTConfig, SamplingDefaults
from ..device import default_device, default_dtype
from ..grid import BlockGrid
from ..memory import Weights
from ..planner import GIB, BudgetTooSmall, plan_memory, seconds_per_evaluation
from ..samplers import SAMPLERS, evaluations
from ..upscale import schedule
from .arguments import DTYPES, add_memory, duration, known_device, size_of


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    p = commands.add_parser("plan", help="what a run would hold and how long it would take", description=run.__doc__)
    p.set_defaults(command=run)
    p.add_argument("size", type=size_of, metavar="WxH", help="size of the result in pixels")
    p.add_argument("--model", metavar="FILE", help="default: the published size")
    p.add_argument("--sampler", choices=list(SAMPLERS), help="default: the model's")
    p.add_argument("--steps", type=int, metavar="N", help="default: the model's")
    add_memory(p)


def run(options: argparse.Namespace) -> int:
    """Print the schedule that a budget allows, its predicted memory and time, and what other budgets would give."""
    checkpoint = None if options.model is None else read_checkpoint(options.model)
    config = checkpoint.config if checkpoint else InfDiTConfig()
    defaults = checkpoint.defaults if checkpoint else SamplingDefaults()
    height, width = options.size
    device = known_device(options.device) if options.device else default_device()
    dtype = DTYPES[options.dtype] or (default_dtype(device) if options.device is None else torch.bfloat16)
    sampler, sigmas = options.sampler or defaults.sampler, schedule(defaults, options.steps)
    count = evaluations(sampler, sigmas)
    grid = BlockGrid.covering(height, width, config.block_size)
    size = Weights.of(config, dtype).total

    def outcome(budget: int | None) -> str:
        """A row of the table: what a budget gives, or the least that works."""
        try:
            plan = plan_memory(config, height, width, 1, dtype, device, sampler, budget, host_budget=sys.maxsize)
        except BudgetTooSmall as error:
            return f"at least {error.least / GIB:.3g} GiB"
        seconds = count * seconds_per_evaluation(config, grid, plan, dtype, device)
        kept = f"weights {plan.weights}, hidden states on the {plan.hidden}, pictures on the {plan.images}"
        memory = f"{(plan.peak_bytes or 0) / GIB:7.3g} GiB {(plan.host_bytes or 0) / GIB:7.3g} GiB"
        return f"{memory} {duration(seconds):>9}   {plan.group} layers × {plan.chunk} blocks; {kept}"

    print(f"{width}×{height}: {grid.blocks} blocks of {config.block_size} px, {config.num_layers} layers")
    print(f"weights {size / GIB:.3g} GiB as {str(dtype).removeprefix('torch.')}; {count} evaluations ({sampler})")
    print(f"times are rough, of a {device.type} in general; memory is exact to a few percent\n")
    print(f"{'budget':>10}  {'device':>11} {'host':>11} {'time':>9}   schedule")
    if options.budget is not None or options.device is None:
        print(f"{'free' if options.budget is None else 'asked':>10}  {outcome(options.budget)}")
    for gib in (0.5, 1, 1.5, 2, 4, 8, 16, 24, 48, 80):
        print(f"{f'{gib} GiB':>10}  {outcome(int(gib * GIB))}")
    return 0

"""plan: what a run would hold and how long it would take, before it is run."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..checkpoint import read_checkpoint
from ..config import InfDiTConfig, SamplingDefaults
from ..device import default_device, default_dtype, device_of, known_device
from ..memory import measure
from ..memory.cost import seconds_of_run
from ..memory.footprint import Weights
from ..memory.plan import MemoryPlan, Workload
from ..memory.planner import GIB, BudgetTooSmall, fastest_plan, format_bytes, format_seconds
from ..presets import PRESETS, of_passes, samplings, strengths_told
from ..samplers import SAMPLERS, evaluations
from ..sizes import MOST_SCALE
from . import DTYPES, add_memory, size_of, strengths_of

BUDGETS = (0.5, 1, 1.5, 2, 4, 8, 16, 24, 48, 80)  # GiB, of the table


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    p = commands.add_parser("plan", help="what a run would hold and how long it would take", description=run.__doc__)
    p.set_defaults(command=run)
    p.add_argument("size", type=size_of, metavar="WxH", help="size of the result in pixels")
    smaller = "how many times smaller the input is (default 4)"
    p.add_argument("--scale", type=float, default=4.0, metavar="X", help=smaller)
    p.add_argument("--model", metavar="FILE", help="default: the published size")
    p.add_argument("--sampler", choices=list(SAMPLERS), help="default: the model's")
    p.add_argument("--preset", choices=list(PRESETS), help="default: the model's own")
    p.add_argument("--steps", type=int, metavar="N", help="default: the model's")
    p.add_argument("--denoise", type=strengths_of, default=[1.0], metavar="X", help="0 to 1 (default), or one a pass")
    add_memory(p)


def run(options: argparse.Namespace) -> int:
    """Print the schedule that a budget allows, its predicted memory and time, and what other budgets would give."""
    checkpoint = None if options.model is None else read_checkpoint(options.model)
    config = checkpoint.config if checkpoint else InfDiTConfig()
    defaults = checkpoint.defaults if checkpoint else SamplingDefaults()
    height, width = options.size
    if not 1 <= options.scale <= MOST_SCALE:
        raise ValueError(f"--scale {options.scale:g} must be from 1 to {MOST_SCALE}")
    source = *(math.ceil(side / options.scale) for side in (height, width)), 3
    device, *beside = map(known_device, options.device.split(",")) if options.device else [default_device()]
    dtype = DTYPES[options.dtype] or _dtype_of(device)
    chosen = samplings(defaults, options.preset, options.steps, options.sampler, denoise=options.denoise)
    sampler = chosen[0].sampler
    most = max(evaluations(sampler, one.sigmas) for one in chosen)
    workload = Workload(
        config, height, width, 1, dtype, device, sampler, source=source, evaluations=most,
        beside=tuple(beside), folder=".", scales=defaults.scales,
    )  # fmt: skip
    levels = of_passes([one.sigmas for one in chosen], len(workload.passes))
    elsewhere = options.budget is None and options.device is not None  # what is free on a device that need not be here?
    told = "; ".join(filter(None, (defaults.start, chosen[0].words, strengths_told(options.denoise))))
    for line in _table(workload, levels, told, options.budget, not elsewhere):
        print(line)
    if not elsewhere:
        print(f"\nthe first row: {_planned(workload, options.budget).reason}")
    return 0


def _dtype_of(device: torch.device) -> torch.dtype:
    """That of a run on a device that is here; of one that is not, what most of them compute in."""
    try:
        return default_dtype(device_of(str(device)))
    except ValueError:
        return torch.bfloat16


def _table(
    workload: Workload, levels: Sequence[Tensor], start: str, budget: int | None, own_row: bool
) -> Iterator[str]:
    config, grid = workload.config, workload.grid
    counts = [evaluations(workload.sampler, sigmas) for sigmas in levels]
    count = " + ".join(map(str, counts if len(set(counts)) > 1 else counts[:1])) + " evaluations"
    weights = format_bytes(Weights.of(config, workload.dtype).total)
    yield f"{workload.width}×{workload.height}: {grid.blocks} blocks of {grid.block} px, {config.num_layers} layers"
    if workload.way:
        yield workload.way
    yield f"weights {weights} as {str(workload.dtype).removeprefix('torch.')}; {count} ({workload.sampler})"
    if start:
        yield start
    here = measure.measured(workload.device, workload.dtype)
    known = f"of a {workload.device.type} in general" if here is None else f"of this {workload.device.type}"
    yield f"times are rough, {known}; memory is exact to a few percent"
    yield ""
    yield f"{'budget':>10}  {'device':>11} {'host':>11} {'disk':>11} {'time':>9}   schedule"
    if own_row:
        yield f"{'free' if budget is None else 'asked':>10}  {_outcome(workload, budget, levels)}"
    for gib in BUDGETS:
        yield f"{f'{gib} GiB':>10}  {_outcome(workload, int(gib * GIB), levels)}"


def _planned(workload: Workload, budget: int | None) -> MemoryPlan:
    """The plan within a budget, on a host and a disk of any size."""
    return fastest_plan(workload, budget, sys.maxsize, sys.maxsize)


def _outcome(workload: Workload, budget: int | None, levels: Sequence[Tensor]) -> str:
    """A row of the table: what a budget gives, or the least that works."""
    try:
        plan = _planned(workload, budget)
    except BudgetTooSmall as error:
        return f"at least {error.least / GIB:.3g} GiB"
    seconds = seconds_of_run(workload, plan, levels)
    kept = f"weights {plan.weights}, hidden states on the {plan.hidden}, pictures on the {plan.images}"
    memory = " ".join(f"{(held or 0) / GIB:7.3g} GiB" for held in (plan.peak_bytes, plan.host_bytes, plan.disk_bytes))
    shares = " + ".join(map(str, plan.layers)) or plan.group
    each = [f"{held.device / GIB:.3g}" for _, held in workload.footprints(plan)] if plan.layers else []
    kept += f"; {' + '.join(each)} GiB" if each else ""
    return f"{memory} {format_seconds(seconds):>9}   {shares} layers × {plan.chunk} blocks; {kept}"


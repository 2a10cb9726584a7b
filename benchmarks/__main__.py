"""python -m benchmarks: how good a model's pictures are, how fast plans are, what they hold."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from infdit.checkpoint import load_model, read_checkpoint
from infdit.cli import DTYPES, add_memory, size_of
from infdit.config import InfDiTConfig, SamplingDefaults
from infdit.device import default_device, default_dtype, device_of, known_device
from infdit.memory.plan import Workload
from infdit.memory.planner import fastest_plan, format_bytes
from infdit.picture import PictureError, find_pictures
from infdit.samplers import SAMPLERS

from . import kernels, lines, quality, scaling, solvers, speed
from .dry_run import counted_peak


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="benchmarks", description=run.__doc__)
    folder = {"nargs": "+", "type": Path, "default": [], "metavar": "FOLDER"}
    p.add_argument("--quality", **folder, help="pictures to be shrunk to a quarter, enlarged again and compared")
    p.add_argument("--without-original", **folder, help="pictures to be enlarged, with nothing to compare with")
    p.add_argument("--lines", action="store_true", help="how straight a model draws edges and lines of every angle")
    p.add_argument("--solvers", action="store_true", help="presets and samplers on posteriors that are known")
    p.add_argument("--fit", type=_steps, metavar="N,…", help="fit noise levels of N evaluations to such posteriors")
    p.add_argument("--misreadings", action="store_true", help="fidelity after sampling and within it, on these")
    p.add_argument("--scaling", action="store_true", help="what one to eight cards would take, by the cost model")
    p.add_argument("--stages", action="store_true", help="time two stages on two CPU threads against one, at --size")
    p.add_argument("--memory", type=size_of, metavar="WxH", help="count what a run holds, on tensors without memory")
    p.add_argument("--kernels", type=int, nargs="?", const=64, metavar="N", help="count the kernels of a layer; time "
                   "Python in an evaluation of --size, N blocks at a time (64)")
    p.add_argument("--model", metavar="FILE", help="published .pt, .safetensors, or mini (default for pictures)")
    p.add_argument("--size", type=size_of, default=(256, 256), metavar="WxH", help="of the timed result (256x256)")
    p.add_argument("--layers", type=int, default=2, metavar="N", help="of the timed model, of the published width (2)")
    p.add_argument("--steps", type=_steps, default=(1, 4, 8, 16), metavar="N,…", help="a row each (default 1,4,8,16, "
                   "or as many as the model gains from)")
    p.add_argument("--presets", action="store_true", help="rows of pictures: the presets in place of --steps")
    p.add_argument("--sampler", choices=list(SAMPLERS), help="default: the model's")
    p.add_argument("--sigma-max", type=float, metavar="X", help="default: the model's")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")
    p.add_argument("--scale", type=float, default=4.0, metavar="X", help="of pictures, 1 to 16 (default 4)")
    p.add_argument("--fidelity", type=float, default=0.0, metavar="X", help="of pictures, 0 (default) to 1")
    p.add_argument("--limit", type=int, metavar="N", help="pictures of a folder to take, the first by name")
    p.add_argument("--crop", type=int, metavar="N", help="take the centre of each picture, N pixels a side")
    p.add_argument("--halve", action="store_true", help="make each picture half as large first: clean from a JPEG")
    p.add_argument("--each", action="store_true", help="print the rows of each picture, not only the means")
    add_memory(p)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; returns the exit status."""
    try:
        return run(_parser().parse_args(arguments))
    except (PictureError, ValueError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _steps(text: str) -> tuple[int, ...]:
    """1,4,8 → (1, 4, 8)."""
    steps = text.split(",")
    if not all(step.isdecimal() and 0 < len(step) < 6 and int(step) for step in steps):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers of steps from 1 like 1,4,8")
    return tuple(map(int, steps))


def run(options: argparse.Namespace) -> int:
    """Time plans; or hold a model's pictures against limits, say how straight its lines are, count what a run holds."""
    if options.memory:
        return _memory(options)
    if (told := _without_pictures(options)) is not None:
        for text in told:
            print(text, flush=True)
        return 0
    if not options.quality and not options.without_original and not options.lines:
        return _speed(options)
    if folders := [*options.quality, *options.without_original]:
        find_pictures(folders)  # a missing folder is not found out after an hour
    device = device_of(options.device)
    model = load_model(options.model or "mini", DTYPES[options.dtype] or default_dtype(device), "cpu")
    most = model.defaults.most_steps
    settings = quality.Settings(
        tuple(sorted({min(steps, most or steps) for steps in options.steps})),
        options.sampler,
        options.sigma_max,
        options.seed,
        options.budget,
        device,
        options.limit,
        options.crop,
        options.halve,
        options.presets,
        options.scale,
        options.fidelity,
    )
    print(f"model {options.model or 'mini'}")
    if options.lines:
        for text in lines.report([(quality.BICUBIC, lines.bicubic), ("model", lines.by_model(model))]):
            print(text, flush=True)
        print()
    for folders, with_original in ((options.quality, True), (options.without_original, False)):
        for folder in folders:
            for text in quality.report(folder, model, settings, with_original, options.each):
                print(text, flush=True)
            print()
    return 0


def _without_pictures(options: argparse.Namespace) -> Iterator[str] | None:
    """What is told of what needs neither a picture nor a device, if that is asked for."""
    if options.kernels:
        return kernels.report(read_checkpoint(options.model or "mini").config, options.size, options.kernels)
    if options.scaling:
        return scaling.report()
    if options.stages:
        return scaling.measured(load_model(options.model or "mini", torch.float32, "cpu"), options.size)
    if options.fit:
        return solvers.fit(options.fit)
    if options.misreadings:
        return solvers.misreadings()
    return solvers.report() if options.solvers else None


def _speed(options: argparse.Namespace) -> int:
    device = device_of(options.device)
    config = read_checkpoint(options.model).config if options.model else InfDiTConfig(num_layers=options.layers)
    dtype = DTYPES[options.dtype] or default_dtype(device)
    for line in speed.report(config, options.size, dtype, device):
        print(line, flush=True)
    return 0


def _memory(options: argparse.Namespace) -> int:
    """What the published size, or a model, holds under the plan of a budget: counted and predicted."""
    checkpoint = read_checkpoint(options.model) if options.model else None
    config = checkpoint.config if checkpoint else InfDiTConfig()
    defaults = checkpoint.defaults if checkpoint else SamplingDefaults()
    device = known_device(options.device) if options.device else default_device()
    dtype, sampler = DTYPES[options.dtype] or torch.bfloat16, options.sampler or defaults.sampler
    workload = Workload(config, *options.memory, dtype=dtype, device=device, sampler=sampler)
    plan = fastest_plan(workload, options.budget, sys.maxsize)
    counted, predicted = counted_peak(workload, plan), workload.footprint(plan)
    print(f"{plan}")
    for tier, most in zip(counted, (predicted.device, predicted.host), strict=True):
        print(f"{tier}: {format_bytes(counted[tier])} counted on fake tensors, {format_bytes(most)} predicted")
    return 0


if __name__ == "__main__":
    sys.exit(main())

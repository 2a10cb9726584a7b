"""bench: how good a model's pictures are, and how far off the planner's idea of a device is."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..bench import lines, quality, speed
from ..checkpoint import load_model, read_checkpoint
from ..config import InfDiTConfig
from ..device import default_dtype
from ..picture import find_pictures
from ..samplers import SAMPLERS
from .arguments import DTYPES, add_memory, device_of, size_of, steps_of


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    p = commands.add_parser("bench", help="how fast plans are, how good a model's pictures", description=run.__doc__)
    p.set_defaults(command=run)
    folder = {"nargs": "+", "type": Path, "default": [], "metavar": "FOLDER"}
    p.add_argument("--quality", **folder, help="pictures to be shrunk to a quarter, enlarged again and compared")
    p.add_argument("--without-original", **folder, help="pictures to be enlarged, with nothing to compare with")
    p.add_argument("--lines", action="store_true", help="how straight a model draws edges and lines of every angle")
    p.add_argument("--model", metavar="FILE", help="published .pt, .safetensors, or mini (default for pictures)")
    p.add_argument("--size", type=size_of, default=(256, 256), metavar="WxH", help="of the timed result (256x256)")
    p.add_argument("--layers", type=int, default=2, metavar="N", help="of the timed model, of the published width (2)")
    p.add_argument("--steps", type=steps_of, default=(1, 4, 8, 16), metavar="N,…", help="a row each (default 1,4,8,16, "
                   "or as many as the model gains from)")
    p.add_argument("--sampler", choices=list(SAMPLERS), help="default: the model's")
    p.add_argument("--sigma-max", type=float, metavar="X", help="default: the model's")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")
    p.add_argument("--limit", type=int, metavar="N", help="pictures of a folder to take, the first by name")
    p.add_argument("--crop", type=int, metavar="N", help="take the centre of each picture, N pixels a side")
    p.add_argument("--each", action="store_true", help="print the rows of each picture, not only the means")
    add_memory(p)


def run(options: argparse.Namespace) -> int:
    """Time plans beside what the planner foretells. With folders: hold a model's pictures against limits instead."""
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


def _speed(options: argparse.Namespace) -> int:
    device = device_of(options.device)
    config = read_checkpoint(options.model).config if options.model else InfDiTConfig(num_layers=options.layers)
    dtype = DTYPES[options.dtype] or default_dtype(device)
    for line in speed.report(config, options.size, dtype, device):
        print(line, flush=True)
    return 0

"""tune: noise levels that are fitted to a model, on the user's own machine and pictures."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoint import load_model, read_checkpoint
from ..conditioning import conditioning_pictures, visible_colour
from ..config import LR_FACTOR
from ..denoiser import Conditioning
from ..device import default_dtype, device_of
from ..memory.planner import PlannedRun, fastest_plan, free_bytes
from ..model import InfDiT
from ..picture import PictureError, find_pictures, read_picture
from ..presets import PRESETS, SAMPLER
from ..run import Report, Run
from ..samplers import Denoise
from ..selfcheck import check_device
from ..sidecar import read_fits, schedules_path, write_fits
from ..tensorfile import tensor_digest
from ..tune import REFERENCE, ROUNDS, Fit, Fitting, fit_levels, most_evaluations, reference
from ..upscale import workload_of
from . import BAR, DTYPES, add_memory

PICTURES = 4  # that are taken: the numbers to be found are few, and pixels many


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    p = commands.add_parser("tune", help="fit noise levels to a model, for --preset", description=run.__doc__)
    p.set_defaults(command=run)
    p.add_argument("pictures", nargs="+", type=Path, metavar="IN", help="pictures like those to be enlarged, or folder")
    p.add_argument("--model", required=True, metavar="FILE", help="published .pt, or .safetensors")
    counts = sorted({PRESETS[name] for name in PRESETS if name != "paper"})
    p.add_argument("--evaluations", type=_counts, default=counts, metavar="N,…",
                   help=f"to fit levels for (default {','.join(map(str, counts))}, those of the presets)")
    p.add_argument("--crop", type=int, default=64, metavar="N", help="the centre of each picture, N px a side (64)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")
    add_memory(p)


def _counts(text: str) -> list[int]:
    """5,8,13 → [5, 8, 13]."""
    counts = text.split(",")
    if not all(count.isdecimal() and len(count) < 3 and int(count) > 1 for count in counts):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers of evaluations from 2 to 64 like 8,13")
    return sorted(set(map(int, counts)))


def run(options: argparse.Namespace) -> int:
    """Fit noise levels to a model, against Heun's method in 100 steps; they go beside it. Goes on where it stopped."""
    checkpoint = read_checkpoint(options.model)
    if checkpoint.defaults.few_steps:
        raise ValueError(f"there is nothing to tune, {checkpoint.defaults.few_steps}: give one that starts from noise")
    pixels = _crops(options.pictures, options.crop)
    device = device_of(options.device)
    dtype = DTYPES[options.dtype] or default_dtype(device)
    digest = checkpoint.metadata.get("sha256") or tensor_digest(checkpoint.tensors)
    settings = [digest, checkpoint.defaults.sigma_max, checkpoint.defaults.sigma_min, SAMPLER, ROUNDS, options.seed]
    words = json.dumps([*settings, str(dtype), device.type]).encode()
    made = hashlib.sha256(words + pixels.numpy().tobytes()).hexdigest()[:16]
    path = schedules_path(checkpoint.path)
    kept = read_fits(path)
    mine = kept.pop(made, {})
    kept[made] = mine  # the last: what `upscale` takes
    wanted = [count for count in options.evaluations if count not in mine or mine[count].rounds < ROUNDS]
    if wanted:
        model = load_model(options.model, dtype, "cpu")
        _fit_all(model, pixels, wanted, mine, device, options, partial(write_fits, path, digest, kept))
    for count in options.evaluations:
        fit = mine[count]
        print(f"{count} evaluations: {fit.distance:.2e} from {REFERENCE} steps of Heun's, Karras's {fit.karras:.2e}")
    print(f"{path}: taken up by --preset balanced and draft")
    return 0


def _fit_all(
    model: InfDiT, pixels: Tensor, counts: Sequence[int], fits: dict[int, Fit], device: torch.device,
    options: argparse.Namespace, save: partial[None],
) -> None:
    """Fit each number of evaluations in turn, into `fits`; `save` writes them after each round."""
    planned = _planned(model, pixels, device, options.budget)
    check_device(planned.workload)
    each = len(pixels) * model.config.num_layers * planned.workload.grid.blocks  # of an evaluation

    def left(now: int) -> int:
        """Of the fits from that one on."""
        rounds = {count: ROUNDS - (fits[count].rounds if count in fits else 0) for count in counts if count >= now}
        return each * sum(most_evaluations(count, most) for count, most in rounds.items())

    with tqdm(desc="reference", total=each * (2 * REFERENCE - 1) + left(0), bar_format=BAR) as bar, torch.no_grad():

        def progress(done: int) -> None:
            bar.update(done - bar.n)

        run = Run(model, planned, progress, Report())
        denoise, start = _beginning(run, model, pixels, options.seed)
        goal = reference(denoise, start, model.defaults)
        fitting = Fitting(denoise, start, goal, model.defaults)
        for count in counts:

            def told(fit: Fit, count: int = count) -> None:
                fits[count] = fit
                bar.total = bar.n + left(count)
                save()

            bar.set_description(f"{count} evaluations")
            # what was found for fewer only: going on after a stop must not change what is found
            others = [fit.levels for n, fit in fits.items() if n < count and fit.rounds == ROUNDS]
            fit = fits.get(count) or fitting.begin(count, sorted(others, key=len)[-1:])
            told(fit)
            fit_levels(fitting, count, fit=fit, told=told)


def _planned(model: InfDiT, pixels: Tensor, device: torch.device, budget: int | None) -> PlannedRun:
    """One picture after another; the sampler's own pictures are small."""
    side = LR_FACTOR * pixels.shape[-1]
    workload = workload_of(model, (len(pixels), *pixels.shape[-2:], 3), (side, side), SAMPLER, device)
    return PlannedRun(workload, fastest_plan(workload, budget), free_bytes)


def _beginning(run: Run, model: InfDiT, pixels: Tensor, seed: int) -> tuple[Denoise, Tensor]:
    """D(x, σ) of all pictures at once, and x to start from."""
    grid, defaults = run.workload.grid, model.defaults
    padded, size = (grid.height, grid.width), (run.workload.height, run.workload.width)
    pictures = [conditioning_pictures(one, size, padded) for one in pixels.split(1)]
    parts = [run.denoiser(Conditioning(lr.to(run.images), up.to(run.images))) for lr, up in pictures]
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn((len(parts), 3, *padded), generator=generator, dtype=torch.float32, device="cpu")
    start = torch.cat([up for _, up in pictures]) + defaults.sigma_max * defaults.start_noise * noise

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.cat([part(one, sigma) for part, one in zip(parts, x.split(1), strict=True)])

    return denoise, start.to(run.images)


def _crops(sources: Sequence[Path], side: int) -> Tensor:
    """(B, 3, side, side) in [-1, 1]: the centres of the first pictures that are large enough."""
    if side < 8:
        raise ValueError(f"--crop {side} must be at least 8 pixels")
    found: list[Tensor] = []
    for path in find_pictures(sources):
        pixels = visible_colour(read_picture(path).pixels[None].float())
        top, left = ((whole - side) // 2 for whole in pixels.shape[-2:])
        if min(top, left) >= 0:
            found.append(pixels[..., top : top + side, left : left + side] * 2 - 1)
        if len(found) == PICTURES:
            break
    if not found:
        raise PictureError(f"no picture is {side} pixels wide and high: give others, or a smaller --crop")
    return torch.cat(found)

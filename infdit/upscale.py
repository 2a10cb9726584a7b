"""Image in, image out: sizes, conditioning, noise, sampling, cropping."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor

from .conditioning import conditioning_pictures, resample, take_colour, upscale_alpha, visible_colour, without_colour
from .denoiser import Conditioning
from .device import same_device
from .disk import like
from .fidelity import make_faithful, strips
from .memory.footprint import Weights
from .memory.plan import MemoryPlan, WeightsKept, Workload
from .memory.planner import PlannedRun, fastest_plan, free_bytes
from .model import InfDiT
from .presets import Levels, Strength, of_passes, samplings
from .presets import schedule as schedule  # where it was
from .progress import PictureState, Progress, Watcher
from .resume import SavedRun, model_digest, settings_of
from .run import Report, Run
from .samplers import Callback, Denoise, SamplerInfo, evaluations, get_sampler
from .seams import seams
from .selfcheck import check_device
from .sizes import target_size

log = logging.getLogger(__name__)

OVERSHOOT = 0.5  # beyond 0..1: what resampling and sharpening may leave there, and is clipped
DRAW = 2**22  # numbers drawn at a time, a multiple of 16: PyTorch draws so many together, and all are as in one draw
STRIP = 256  # rows of a result that are finished at a time

Folder = str | Path | None
Devices = torch.device | str | Sequence[torch.device | str] | None
MakeNoise = Callable[[tuple[int, int, int, int]], Tensor]
Finish = Callable[[Run, Tensor, Tensor, Tensor], None]


_warned: WeakSet[InfDiT] = WeakSet()  # models of which we said that they run without their CLIP input


@torch.no_grad()
def upscale(
    model: InfDiT, image: Tensor, scale: float = 4.0, steps: int | None = None,
    sampler: str | SamplerInfo | None = None, sigma_max: float | None = None, seed: int = 0, budget: int | None = None,
    plan: MemoryPlan | PlannedRun | None = None, *, size: tuple[int, int] | None = None, denoise: Strength = 1.0,
    sigmas: Levels = None, noise: MakeNoise | None = None, clip_embedding: Tensor | None = None,
    fidelity: float = 0.0, colour_match: bool = False, progress: Progress | None = None,
    callback: Callable[[PictureState], None] | None = None, device: Devices = None,
    report: Report | None = None, preset: str | None = None, resume: SavedRun | None = None, folder: Folder = None,
) -> Tensor:
    """Upscale pictures with Inf-DiT.

    Args:
        model: see `load_model`.
        image: (B, h, w, 3 or 4) floats in 0..1, from 1×1; slight overshoot is clipped. A fourth is straight alpha.
        scale: from 1, which redraws detail, to 16; above 4 in passes. The sides of the result are rounded half up.
        steps, sampler, sigma_max, preset: None takes the model's own; sampler is of `SAMPLERS`, or a `SamplerInfo`;
            preset is of `PRESETS`, and what else is given goes before what it says.
        seed: 0..2^64 − 1, of one float32 draw of `torch.randn` on the CPU for all pictures at the size of whole blocks,
            as ComfyUI's RandomNoise. The start carries the model's `start_noise` of it, maybe none.
        budget: bytes on the device that the run may hold; None: what is free there, less a margin.
        plan: how evaluations are cut, in place of a budget, or a `PlannedRun`, which also says on which device.
        size: (height, width) of the result in place of `scale`; from once to 16 times each side.
        denoise: 0..1, an artist's strength, see `schedule`, of all passes or of each. 0 is bicubic.
        sigmas: (n + 1,) falling noise levels in place of steps, sigma_max and denoise; of all passes or of each.
        noise: makes the noise of all pictures, (B, 3, H, W) of whole blocks, in place of seed; used as it is.
        clip_embedding: (B or 1, vector_dim), see `clip`; None: zeros. report: is filled in with what was done.
        fidelity: 0..1, how far the result is made to say what the picture given says once it is made small again.
        colour_match: whether its colours get the mean and covariance of those given; before fidelity.
        progress: called as progress(done, total, preview) often, see `Watcher`; an exception out of it ends the run.
        callback: called after the first evaluation of each step, see `samplers`, with the picture's index as "picture".
        device: what computes; None: where the model is, which stays there. Several: each has some layers, see `stages`.
        resume: keeps the state after each step on disk, and goes on from what it finds there of the same run.
        folder: where pictures may lie that memory does not hold, the result too, in files that nobody sees.

    Returns:
        (B, height, width, 3 or 4) float32 in 0..1 on the CPU.

    Raises:
        ValueError, TypeError: input that cannot be upscaled, in one sentence; BudgetTooSmall is a ValueError.
        OutOfMemory: memory ran out in spite of the plan, and no smaller plan fits.
        WrongNumbers: NaN or inf in place of a picture, told at once; or what `selfcheck` finds, told before.
    """
    check_image(image)
    target = target_size(image.shape[1], image.shape[2], scale, size)
    chosen = samplings(model.defaults, preset, steps, sampler, sigma_max, denoise=denoise, sigmas=sigmas)
    sampler = get_sampler(chosen[0].sampler if chosen else model.defaults.sampler)
    vectors = _clip_vectors(model, clip_embedding, len(image))
    seed, fitted = _check_seed(seed), _check_fidelity(fidelity) > 0
    if not isinstance(plan, PlannedRun):
        plan = _planned(model, image, target, sampler, device, budget, plan, bool(noise), fitted, folder)
    check_device(plan.workload)
    levels = of_passes([_check_sigmas(one.sigmas) for one in chosen], len(plan.workload.passes))
    finish = partial(finish_result, fidelity, colour_match) if fitted or colour_match or report is not None else None
    work, report, drawn = _work(plan.workload, fitted, levels), report or Report(), None if noise else seed
    report.settings = settings_of(work, model.defaults, sampler, levels, drawn, vectors, fidelity, colour_match)
    run, shown = begin_run(model, replace(plan, workload=work), sampler, levels, progress, callback, report, resume)
    draw = partial(_noise_per_image, seed, noise, model.defaults.start_noise, told=partial(run.advance, 0))
    noises = [draw(run.empty, (len(image), 3, part.grid.height, part.grid.width)) for part in work.passes]
    with run.at_work():
        return upscale_batch(run, image, vectors, sampler, _weakened(levels, work), noises, shown.step, finish, resume)


def _work(planned: Workload, fitted: bool, levels: Sequence[Tensor]) -> Workload:
    """What is computed, as the settings say; without a step nothing can be too sharp, see `sizes`."""
    stepping = any(len(one) > 1 for one in levels)
    return replace(planned, fitted=fitted, scales=planned.scales if stepping else ())


def _weakened(levels: Sequence[Tensor], work: Workload) -> list[Tensor]:
    """Noise levels as each pass takes them: where less grows, less is missing."""
    return [sigmas * part.strength for sigmas, part in zip(levels, work.passes, strict=True)]


def begin_run(
    model: InfDiT, plan: PlannedRun, sampler: SamplerInfo, levels: Sequence[Tensor], progress: Progress | None,
    callback: Callable[[PictureState], None] | None, report: Report, resume: SavedRun | None,
) -> tuple[Run, Watcher]:
    """A run and who watches it; arguments as those of `upscale`, levels: of each pass."""
    work, counts = plan.workload, [evaluations(sampler, sigmas) for sigmas in levels]
    depth, parts = work.config.num_layers, zip(counts, work.passes, strict=True)
    moves = sum(part.grid.height + count * depth * part.grid.blocks for count, part in parts)
    total = work.batch * (moves + (strips(work.height) if work.fitted else 0))
    report.evaluations = work.batch * sum(counts)
    shown = Watcher(progress, total, max(map(len, levels)) - 1, callback, report)
    if resume is not None:
        resume.begin(report.settings | {"model": model_digest(model), "device": work.device_kinds}, report.resumed)
    return Run(model, plan, shown.advance, report, shown.painted), shown


def _planned(
    model: InfDiT, image: Tensor, target: tuple[int, int], sampler: SamplerInfo,
    device: Devices, budget: int | None = None, plan: MemoryPlan | None = None, noise_given: bool = False,
    fitted: bool = False, folder: Folder = None,
) -> PlannedRun:
    """A run within a budget, or under a plan made by hand; arguments as those of `upscale`."""
    if plan is not None and budget is not None:
        raise ValueError("give a plan or a budget, not both: a plan made by hand keeps to no budget")
    given = [device or model.device] if device is None or isinstance(device, torch.device | str) else device
    device, *beside = map(torch.device, given)
    there = device.type != "cpu" and same_device(model.device, device)
    weights: WeightsKept | None = "resident" if there else None
    workload = workload_of(model, image.shape, target, sampler, device, noise_given, weights, fitted, folder)
    workload = replace(workload, beside=tuple(beside))
    held = Weights.of(model.config, model.dtype).total if there else 0

    def free(which: torch.device) -> int:
        """Weights that are on the device already are not free, but part of this run."""
        return free_bytes(which) + (held if which == device else 0)

    checked = free if budget is None or beside else None  # of one device as much as is asked for
    return PlannedRun(workload, plan or fastest_plan(workload, budget, free=checked), free)


def workload_of(
    model: InfDiT, shape: Sequence[int], target: tuple[int, int], sampler: str | SamplerInfo, device: torch.device,
    noise_given: bool = False, weights: WeightsKept | None = None, fitted: bool = False,
    folder: Folder = None,
) -> Workload:
    """What it takes to upscale pictures of a shape (B, h, w, c) to (height, width); see `Workload`."""
    batch, height, width, channels = shape
    return Workload(
        model.config,
        *target,
        batch=batch,
        dtype=model.dtype,
        device=device,
        sampler=sampler,
        weights=weights,
        source=(height, width, channels),
        noise_given=noise_given,
        fitted=fitted,
        evaluations=model.defaults.steps * get_sampler(sampler).evaluations,
        folder=None if folder is None else str(folder),
        scales=model.defaults.scales,
    )


def _check_seed(seed: int) -> int:
    seed = operator.index(seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} must be between 0 and 2^64 − 1")
    return seed


def _check_fidelity(fidelity: float) -> float:
    if not 0 <= fidelity <= 1:
        raise ValueError(f"fidelity {fidelity} must be between 0 (as the model makes it) and 1 (as the input says)")
    return fidelity


def _check_sigmas(sigmas: Tensor) -> Tensor:
    levels = sigmas.tolist() if sigmas.dim() == 1 else []
    if not levels or not all(a > b for a, b in pairwise(levels)) or levels[-1] < 0 or not math.isfinite(levels[0]):
        raise ValueError(f"sigmas {levels or tuple(sigmas.shape)} must be a list of falling noise levels, not below 0")
    return sigmas


def _noise_per_image(
    seed: int, noise: MakeNoise | None, share: float, empty: Callable[[tuple[int, ...]], Tensor],
    shape: tuple[int, int, int, int], told: Callable[[], None],
) -> Iterator[Tensor | None]:
    """The noise of one picture after the other, (1, 3, H, W) each; None where the start has none.

    share: of the noise from the seed that the start carries; what is given is used as it is.
    """
    if noise is None:
        generator = torch.Generator("cpu").manual_seed(seed)
        for _ in range(shape[0]):  # no variable here may keep what becomes the start
            yield _draw(empty((1, *shape[1:])), generator, told).mul_(share) if share else None
        return
    given = noise(shape)
    if given.shape != shape:
        raise ValueError(f"noise of shape {tuple(given.shape)} must be {shape}: whole blocks of the result")
    for one in given.split(1):
        yield one.float().cpu().clone()  # it becomes the start, in place


def _draw(noise: Tensor, generator: torch.Generator, told: Callable[[], None]) -> Tensor:
    """Filled as by one draw of `torch.randn`; told: is called every few milliseconds."""
    for piece in noise.view(-1).split(DRAW):
        piece.normal_(generator=generator)
        told()
    return noise


def upscale_batch(
    run: Run, image: Tensor, vectors: Sequence[Tensor] | None, sampler: SamplerInfo, levels: Sequence[Tensor],
    noises: Sequence[Iterator[Tensor | None]], callback: Callable[[PictureState], None], finish: Finish | None = None,
    resume: SavedRun | None = None,
) -> Tensor:
    """`upscale` after all is checked and decided: pass after pass over one picture at a time.

    Args:
        levels, noises: of each pass: noise levels; noise of one picture after the other.
        finish: is called with the run, the picture given, the result, and what that was made of if it was made smaller.
    """
    size, channels = (run.workload.height, run.workload.width), image.shape[-1]
    results = run.empty((len(image), *size, channels))
    passes = run.workload.passes
    for i, given in enumerate(image.split(1)):
        picture = computed = given
        for left, part, sigmas, noise in zip(range(len(passes))[::-1], passes, levels, noises, strict=True):
            step: Callback = lambda state, i=i, left=left: callback({**state, "picture": i, "left": left})  # noqa: E731
            vector, last = None if vectors is None else vectors[i], results[i : i + 1]
            whole = not left and part.shrunk is None
            computed = last if whole else run.empty((1, part.height, part.width, channels))
            sample = partial(_sample, sampler)
            if resume is not None:
                skip = partial(_skip, run, part, sampler, sigmas)
                sample = partial(resume.sample, i, len(passes) - left if passes[1:] else None, picture, skip, sampler)
            _upscale_one(run, part, picture, vector, sample, sigmas, noise, step, computed)
            made = computed
            if part.shrunk is not None:
                made = run.empty((1, *part.shrunk, channels)) if left else last
                shrink(computed, picture, made, partial(run.advance, 0))
            picture, computed = made, made if left else computed
        if finish is not None:
            finish(run, given, picture, computed)
        del computed  # it is not held beside the next picture
    return results


def _skip(run: Run, part: Workload, sampler: SamplerInfo, sigmas: Tensor, steps: int) -> None:
    """Move the bar over steps that are done already: at no pace from which the time left could be told."""
    done = evaluations(sampler, sigmas) - evaluations(sampler, sigmas[steps:])
    run.report.doing = "preparing"
    run.advance(done * part.config.num_layers * part.grid.blocks)
    run.report.doing = "sampling"


def _sample(sampler: SamplerInfo, denoise: Denoise, start: list[Tensor], sigmas: Tensor, callback: Callback) -> Tensor:
    return sampler.sample(denoise, start.pop(), sigmas, callback)


def _upscale_one(
    run: Run, part: Workload, picture: Tensor, vector: Tensor | None, sample: Callable[..., Tensor], sigmas: Tensor,
    noises: Iterator[Tensor | None], callback: Callback, result: Tensor,
) -> None:
    """(1, h, w, c) → (1, height, width, c), into `result`: one pass."""
    height, width = result.shape[1:3]
    run.begin("preparing", (height, width))
    denoise, start, grey = _prepare(run, part, picture, vector, sigmas, noises)
    run.begin("sampling")
    y = sample(denoise, start, sigmas, callback)
    run.begin("finishing")
    finish_pixels(y, picture, grey, result, partial(run.advance, 0))


def finish_pixels(
    y: Tensor, picture: Tensor, grey: Tensor | None, result: Tensor, told: Callable[[], None]
) -> None:
    """What was sampled, (1, 3, ≥ height, ≥ width) in [-1, 1], → `result`, (1, height, width, c) in 0..1.

    Args:
        picture: that was enlarged, (1, h, w, c), for its transparency.
        grey: where it has no colour, see `without_colour`.
        told: is called every few milliseconds.
    """
    height, width = result.shape[1:3]
    for top in range(0, height, STRIP):
        rows = slice(top, top + STRIP)
        pixels = result[:, rows, :, :3].movedim(-1, 1)
        pixels.copy_(y[..., rows, :width][..., : height - top, :])
        if grey is not None:
            take_colour(pixels, grey, top, height)
        pixels.div_(2).add_(0.5).clamp_(0, 1)
        told()
    _finish_alpha(picture, result.movedim(-1, 1), told)


def shrink(large: Tensor, picture: Tensor, result: Tensor, told: Callable[[], None]) -> None:
    """Make a picture smaller, (1, H, W, c) → `result`, (1, height, width, c), both in 0..1, by antialiased bicubic.

    picture: that `large` was made of, for its transparency; told: see `finish_pixels`.
    """
    (height, width), pixels = result.shape[1:3], result.movedim(-1, 1)
    ratios = large.shape[1] / height, large.shape[2] / width
    colour = large[..., :3].movedim(-1, 1)
    resample(colour, ratios, range(height), range(width), (0, 1), told=lambda rows: told(), into=pixels[:, :3])
    _finish_alpha(picture, pixels, told)


def _finish_alpha(picture: Tensor, pixels: Tensor, told: Callable[[], None]) -> None:
    if picture.shape[-1] == 4:
        alpha = picture[..., 3:].detach().float().cpu().clamp(0, 1).movedim(-1, 1)
        upscale_alpha(alpha, (pixels.shape[2], pixels.shape[3]), lambda rows: told(), pixels[:, 3:])


def _prepare(
    run: Run, part: Workload, picture: Tensor, vector: Tensor | None, sigmas: Tensor, noises: Iterator[Tensor | None]
) -> tuple[Denoise, list[Tensor], Tensor | None]:
    """denoise(x, σ), x to start from, in a list so that nobody else has it, and where there is no colour."""
    colour = _colour(picture) * 2 - 1
    run.advance(0)
    grey = without_colour(colour) if run.keeps_grey else None
    padded = part.grid.height, part.grid.width
    pictures = conditioning_pictures(colour, (part.height, part.width), padded, run.advance, run.empty)
    lr, up = (x.to(run.images) for x in pictures)
    del colour, pictures
    start = [_noisy_start(up, sigmas[0], next(noises))]
    return run.denoiser(Conditioning(lr, up, vector), [level for level in sigmas.tolist() if level > 0]), start, grey


def finish_result(
    fidelity: float, colour_match: bool, run: Run, given: Tensor, result: Tensor, computed: Tensor
) -> None:
    """Make a result (1, H, W, c) as faithful to a picture (1, h, w, c) as is asked for, and note how much it is.

    computed: the result, or what it was made of by shrinking: where the lines between patches and blocks are.
    """
    colour = _colour(given)
    grey = without_colour(colour) if run.keeps_grey else None
    pixels = result[0, ..., :3].movedim(-1, 0)
    run.report.faithful.append(make_faithful(pixels, colour[0], fidelity, colour_match, grey, run.advance))
    config, pixels = run.workload.config, computed[0, ..., :3].movedim(-1, 0)
    run.report.seams.append(seams(pixels, (config.patch_size, config.block_size), run.advance))


def _colour(picture: Tensor) -> Tensor:
    """(1, h, w, 3 or 4) → (1, 3, h, w) in 0..1 on the CPU: what is seen of it."""
    return visible_colour(picture.detach().float().cpu().clamp(0, 1))


def _noisy_start(up: Tensor, sigma: Tensor, noise: Tensor | None) -> Tensor:
    """x = up + σ·ε, not σ·ε alone: that keeps the colours, as the authors do. x = up for a bridge."""
    return like(up).copy_(up) if noise is None else noise.mul_(sigma.cpu()).to(up.device).add_(up)


def check_image(image: Tensor) -> None:
    """Whether `upscale` can take these pictures.

    Raises:
        ValueError: shape, dtype or values that cannot be.
    """
    if not image.is_floating_point():
        raise ValueError(f"image of {image.dtype} must be of floating point in 0..1: divide values of 0..255 by 255")
    if image.dim() != 4 or image.shape[-1] not in (3, 4):
        raise ValueError(
            f"image of shape {tuple(image.shape)} must be (batch, height, width, 3 or 4): make it RGB or RGBA, and of "
            "one picture a batch of one"
        )
    if 0 in image.shape:
        raise ValueError(f"image of shape {tuple(image.shape)} is empty: give at least one picture of one pixel")
    check_values(image, "image")


def check_values(values: Tensor, name: str) -> None:
    """Whether values are of 0..1, but for a slight overshoot, see OVERSHOOT.

    Raises:
        ValueError: values that are not finite, or of another range, as of 0..255.
    """
    low, high = (bound.item() for bound in values.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"{name} holds values that are not finite, NaN or inf: look at the step before, often a VAE in fp16 (start "
            "ComfyUI with --fp32-vae)"
        )
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise ValueError(
            f"{name} holds values from {low:.3g} to {high:.3g} and must be of 0..1: divide values of 0..255 by 255, "
            "or clamp them"
        )


def _clip_vectors(model: InfDiT, embedding: Tensor | None, batch: int) -> tuple[Tensor, ...] | None:
    width = model.config.vector_dim
    if not width:
        if embedding is not None:
            log.warning("this model has no CLIP input: clip_embedding is ignored")
        return None
    if embedding is None:
        if model not in _warned:
            _warned.add(model)
            log.warning("no CLIP embedding for a model that was trained with one: it runs with zeros in its place")
        return None
    if embedding.dim() != 2 or embedding.shape[0] not in (1, batch) or embedding.shape[1] != width:
        raise ValueError(f"clip_embedding of shape {tuple(embedding.shape)} must be ({batch} or 1, {width})")
    return embedding.expand(batch, -1).split(1)

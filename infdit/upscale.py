"""Image in, image out: sizes, conditioning, noise, sampling, cropping."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor

from .conditioning import conditioning_pictures, upscale_alpha, visible_colour
from .config import SamplingDefaults
from .denoiser import Conditioning
from .device import same_device
from .memory.plan import LEVELS, MemoryPlan, Weights, WeightsKept, Workload
from .memory.planner import PlannedRun, fastest_plan, free_bytes
from .model import InfDiT
from .progress import PictureState, Progress, Watcher
from .run import Report, Run
from .samplers import Callback, Denoise, SamplerInfo, evaluations, get_sampler, karras_sigmas
from .selfcheck import check_device

log = logging.getLogger(__name__)

MAX_SCALE = 4  # what Inf-DiT was trained for
OVERSHOOT = 0.5  # beyond 0..1: what resampling and sharpening may leave there, and is clipped
DRAW = 2**22  # numbers drawn at a time, a multiple of 16: PyTorch draws so many together, and all are as in one draw
STRIP = 256  # rows of a result that are finished at a time
GREY_REACH = 4  # pixels of the picture given, within which any colour lets a bridge have some
RHO = 7.0  # of the Karras schedule, also the space in which `denoise` shortens it

MakeNoise = Callable[[tuple[int, int, int, int]], Tensor]


_warned: WeakSet[InfDiT] = WeakSet()  # models of which we said that they run without their CLIP input


@torch.no_grad()
def upscale(
    model: InfDiT, image: Tensor, scale: float = 4.0, steps: int | None = None,
    sampler: str | SamplerInfo | None = None, sigma_max: float | None = None, seed: int = 0, budget: int | None = None,
    plan: MemoryPlan | PlannedRun | None = None, *, size: tuple[int, int] | None = None, denoise: float = 1.0,
    sigmas: Tensor | None = None, noise: MakeNoise | None = None, clip_embedding: Tensor | None = None,
    progress: Progress | None = None, callback: Callable[[PictureState], None] | None = None,
    device: torch.device | str | None = None, report: Report | None = None,
) -> Tensor:
    """Upscale pictures with Inf-DiT.

    Args:
        model: see `load_model`.
        image: (B, h, w, 3 or 4) in 0..1, floating point, from 1×1; slight overshoot is clipped. A fourth channel is
            straight alpha.
        scale: above 1, at most 4. The sides of the result are rounded half up.
        steps, sampler, sigma_max: None takes the model's defaults; sampler is a name of `SAMPLERS` or a `SamplerInfo`.
        seed: 0..2^64 − 1, of one float32 draw of `torch.randn` on the CPU for all pictures at the size of whole blocks,
            as ComfyUI's RandomNoise. The start carries the model's `start_noise` of it, maybe none.
        budget: bytes on the device that the run may hold; None: what is free there, less a margin.
        plan: how evaluations are cut, in place of a budget; the picture does not depend on it beyond rounding. A
            `PlannedRun` also says on which device.
        size: (height, width) of the result in place of `scale`; from once to 4 times each side.
        denoise: 0..1, an artist's strength, see `schedule`. 0 is bicubic.
        sigmas: (n + 1,) falling noise levels in place of steps, sigma_max and denoise.
        noise: makes the noise of all pictures, (B, 3, H, W) of whole blocks, in place of seed; used as it is.
        clip_embedding: (B or 1, vector_dim), see `clip`; None stands for zeros.
        progress: called as progress(done, total, preview) at least a few times a second, see `Watcher`; while a
            picture is prepared, between the layers of a chunk, while it is finished. An exception that it raises ends
            the run at once.
        callback: called after the first evaluation of each step, see `samplers`, with the picture's index as "picture".
        device: what computes; None: where the model is. A model that is on the device stays there.
        report: is filled in with what was done.

    Returns:
        (B, height, width, 3 or 4) float32 in 0..1 on the CPU.

    Raises:
        ValueError, TypeError: input that cannot be upscaled, in one sentence; BudgetTooSmall is a ValueError.
        OutOfMemory: memory ran out in spite of the plan, and no smaller plan fits.
        WrongNumbers: NaN or inf in place of a picture, told at the first evaluation that makes them; or a device that
            computes something else than the CPU, told before, see `selfcheck`.
    """
    check_image(image)
    target = target_size(image.shape[1], image.shape[2], scale, size)
    sampler = get_sampler(sampler or model.defaults.sampler)
    vectors = _clip_vectors(model, clip_embedding, len(image))
    sigmas = schedule(model.defaults, steps, sigma_max, denoise) if sigmas is None else _check_sigmas(sigmas)
    seed = _check_seed(seed)
    if not isinstance(plan, PlannedRun):
        where = torch.device(device or model.device)
        plan = _planned(model, image, target, sampler, where, budget, plan, bool(noise), len(sigmas))
    check_device(plan.workload)
    report = report or Report()
    grid = plan.workload.grid
    each = grid.height + evaluations(sampler, sigmas) * model.config.num_layers * grid.blocks
    shown = Watcher(progress, each * len(image), target, len(sigmas) - 1, callback, report.seconds)
    run, shape = Run(model, plan, shown.advance, report, shown.painted), (len(image), 3, grid.height, grid.width)
    noises = _noise_per_image(seed, noise, model.defaults.start_noise, shape, partial(run.advance, 0))
    with run.at_work():
        return upscale_batch(run, image, vectors, sampler, sigmas, noises, shown.step)


def _planned(
    model: InfDiT, image: Tensor, target: tuple[int, int], sampler: SamplerInfo, device: torch.device,
    budget: int | None = None, plan: MemoryPlan | None = None, noise_given: bool = False, levels: int = LEVELS,
) -> PlannedRun:
    """A run within a budget, or under a plan made by hand; arguments as those of `upscale`."""
    if plan is not None and budget is not None:
        raise ValueError("give a plan or a budget, not both: a plan made by hand keeps to no budget")
    there = device.type != "cpu" and same_device(model.device, device)
    weights: WeightsKept | None = "resident" if there else None
    workload = workload_of(model, image.shape, target, sampler, device, noise_given, weights, levels)
    held = Weights.of(model.config, model.dtype).total if there else 0

    def free() -> int:
        """Weights that are on the device already are not free, but part of this run."""
        return free_bytes(device) + held

    return PlannedRun(workload, plan or fastest_plan(workload, free() if budget is None else budget), free)


def workload_of(
    model: InfDiT, shape: Sequence[int], target: tuple[int, int], sampler: str | SamplerInfo, device: torch.device,
    noise_given: bool = False, weights: WeightsKept | None = None, levels: int = LEVELS,
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
        levels=levels,
    )


def _check_seed(seed: int) -> int:
    seed = operator.index(seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} must be between 0 and 2^64 − 1")
    return seed


def _check_sigmas(sigmas: Tensor) -> Tensor:
    levels = sigmas.tolist() if sigmas.dim() == 1 else []
    if not levels or not all(a > b for a, b in pairwise(levels)) or levels[-1] < 0 or not math.isfinite(levels[0]):
        raise ValueError(f"sigmas {levels or tuple(sigmas.shape)} must be a list of falling noise levels, not below 0")
    return sigmas


def _noise_per_image(
    seed: int, noise: MakeNoise | None, share: float, shape: tuple[int, int, int, int], told: Callable[[], None]
) -> Iterator[Tensor | None]:
    """The noise of one picture after the other, (1, 3, H, W) each; None where the start has none.

    share: of the noise from the seed that the start carries; what is given is used as it is.
    """
    if noise is None:
        generator = torch.Generator("cpu").manual_seed(seed)
        for _ in range(shape[0]):  # no variable here may keep what becomes the start
            yield _draw((1, *shape[1:]), generator, told).mul_(share) if share else None
        return
    given = noise(shape)
    if given.shape != shape:
        raise ValueError(f"noise of shape {tuple(given.shape)} must be {shape}: whole blocks of the result")
    for one in given.split(1):
        yield one.float().cpu().clone()  # it becomes the start, in place


def _draw(shape: tuple[int, ...], generator: torch.Generator, told: Callable[[], None]) -> Tensor:
    """As one draw of `torch.randn`; told: is called every few milliseconds."""
    noise = torch.empty(shape, dtype=torch.float32, device="cpu")
    for piece in noise.view(-1).split(DRAW):
        piece.normal_(generator=generator)
        told()
    return noise


def upscale_batch(
    run: Run, image: Tensor, vectors: Sequence[Tensor] | None, sampler: SamplerInfo, sigmas: Tensor,
    noises: Iterator[Tensor | None], callback: Callable[[PictureState], None],
) -> Tensor:
    """`upscale` after all is checked and decided: conditioning, start, sampling, cropping, one picture at a time."""
    size = run.workload.height, run.workload.width
    results = torch.empty((len(image), *size, image.shape[-1]), dtype=torch.float32, device="cpu")
    for i, picture in enumerate(image.split(1)):
        step: Callback = lambda state, i=i: callback({**state, "picture": i})  # noqa: E731 - as short as it is
        vector = None if vectors is None else vectors[i]
        _upscale_one(run, picture, vector, sampler, sigmas, noises, step, results[i : i + 1])
    return results


def _upscale_one(
    run: Run, picture: Tensor, vector: Tensor | None, sampler: SamplerInfo, sigmas: Tensor,
    noises: Iterator[Tensor | None], callback: Callback, result: Tensor,
) -> None:
    """(1, h, w, c) → (1, height, width, c), into `result`."""
    run.begin("preparing")
    denoise, start, grey = _prepare(run, picture, vector, sigmas, noises)
    run.begin("sampling")
    y = sampler.sample(denoise, start.pop(), sigmas, callback)
    run.begin("finishing")
    height, width = result.shape[1:3]
    for top in range(0, height, STRIP):
        rows = slice(top, top + STRIP)
        pixels = result[:, rows, :, :3].movedim(-1, 1)
        pixels.copy_(y[..., rows, :width][..., : height - top, :])
        if grey is not None:
            take_colour(pixels, grey, top, height)
        pixels.div_(2).add_(0.5).clamp_(0, 1)
        run.advance(0)
    if picture.shape[-1] == 4:
        alpha = picture[..., 3:].detach().float().cpu().clamp(0, 1).movedim(-1, 1)
        result[..., 3:] = upscale_alpha(alpha, (height, width), lambda rows: run.advance(0)).movedim(1, -1)


def _prepare(
    run: Run, picture: Tensor, vector: Tensor | None, sigmas: Tensor, noises: Iterator[Tensor | None]
) -> tuple[Denoise, list[Tensor], Tensor | None]:
    """denoise(x, σ), x to start from, in a list so that nobody else has it, and where there is no colour."""
    grid, target = run.workload.grid, (run.workload.height, run.workload.width)
    colour = visible_colour(picture.detach().float().cpu().clamp(0, 1)) * 2 - 1
    run.advance(0)
    grey = without_colour(colour) if run.keeps_grey else None
    pictures = conditioning_pictures(colour, target, (grid.height, grid.width), run.advance)
    lr, up = (x.to(run.images) for x in pictures)
    del colour, pictures
    start = [_noisy_start(up, sigmas[0], next(noises))]
    return run.denoiser(Conditioning(lr, up, vector), [level for level in sigmas.tolist() if level > 0]), start, grey


def without_colour(colour: Tensor) -> Tensor | None:
    """(1, 3, h, w) → (1, 1, h, w), true where R = G = B as far as GREY_REACH pixels around; None if that is nowhere."""
    coloured = (colour.amax(1, keepdim=True) != colour.amin(1, keepdim=True)).float()
    grey = F.max_pool2d(coloured, 2 * GREY_REACH + 1, 1, GREY_REACH) == 0
    return grey if grey.any() else None


def take_colour(strip: Tensor, grey: Tensor, top: int, height: int) -> None:
    """Make what should be grey exactly so, in place, which a network is only nearly.

    Args:
        strip: (1, 3, n, W), rows of a result of this height from `top` on.
        grey: (1, 1, h, w), see `without_colour`.
    """
    rows = torch.arange(top, top + strip.shape[-2], device="cpu") * grey.shape[-2] // height
    columns = torch.arange(strip.shape[-1], device="cpu") * grey.shape[-1] // strip.shape[-1]
    where = grey[:, 0, rows][..., columns]
    mean = strip.mean(1)
    for channel in strip.unbind(1):
        channel.copy_(torch.where(where, mean, channel))


def _noisy_start(up: Tensor, sigma: Tensor, noise: Tensor | None) -> Tensor:
    """x = up + σ·ε, not σ·ε alone: that keeps the colours, as the authors do. x = up for a bridge."""
    return up.clone() if noise is None else noise.mul_(sigma.cpu()).to(up.device).add_(up)


def schedule(
    defaults: SamplingDefaults, steps: int | None = None, sigma_max: float | None = None, denoise: float = 1.0,
    rho: float = RHO,
) -> Tensor:
    """Noise levels of a run: a Karras schedule that begins a fraction `denoise` of the way from sigma_min to sigma_max.

    The way is measured as the schedule itself is spaced, in σ^(1/ρ). denoise = 0 has no step at all. A bridge always
    begins at sigma_max, where the enlarged picture is: it goes a fraction `denoise` of the way down to 0, and the
    result of one step is that fraction of the way from the enlarged picture to the model's.

    Returns:
        (steps + 1,) float32, the last 0, or (1 − denoise)·sigma_max for a bridge. At most `defaults.most_steps` steps.
    """
    if not 0 <= denoise <= 1:
        raise ValueError(f"denoise {denoise} must be between 0 (bicubic) and 1 (full strength)")
    sigma_max = defaults.sigma_max if sigma_max is None else sigma_max
    steps = defaults.steps if steps is None else operator.index(steps)
    steps = min(steps, defaults.most_steps or steps)
    low, high = defaults.sigma_min ** (1 / rho), max(sigma_max, 0) ** (1 / rho)
    if denoise not in (0, 1) and defaults.start_noise == 0:
        end = (1 - denoise) * sigma_max
        return karras_sigmas(steps, defaults.sigma_min, sigma_max, rho) * (1 - end / sigma_max) + end
    if denoise in (0, 1):
        return karras_sigmas(steps, defaults.sigma_min, sigma_max, rho)[0 if denoise else -1 :]
    return karras_sigmas(steps, defaults.sigma_min, (low + denoise * (high - low)) ** rho, rho)


def check_image(image: Tensor) -> None:
    """Whether `upscale` can take these pictures.

    Raises:
        ValueError: shape, dtype or values that cannot be.
    """
    if image.dim() != 4 or image.shape[-1] not in (3, 4) or not image.is_floating_point():
        raise ValueError(
            f"image of shape {tuple(image.shape)} and {image.dtype} must be (batch, height, width, 3 or 4) "
            "of floating point in 0..1"
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
        raise ValueError(f"{name} holds values that are not finite: an earlier step of the workflow made NaN or inf")
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise ValueError(
            f"{name} holds values from {low:.3g} to {high:.3g} and must be of 0..1: divide values of 0..255 by 255, "
            "or clamp them"
        )


def target_size(height: int, width: int, scale: float, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) that a picture of height × width becomes; sides are rounded half up.

    Raises:
        ValueError: a scale or size outside what the model can do.
    """
    if size is None:
        if not 1 < scale <= MAX_SCALE:
            raise ValueError(f"scale {scale} must be above 1 and at most {MAX_SCALE}: for more, upscale twice")
        return math.floor(height * scale + 0.5), math.floor(width * scale + 0.5)
    size = operator.index(size[0]), operator.index(size[1])
    for name, side, target in (("height", height, size[0]), ("width", width, size[1])):
        if not side <= target <= MAX_SCALE * side:
            raise ValueError(
                f"{name} {target} must be between the picture's {side} and {MAX_SCALE} times it, {MAX_SCALE * side}: "
                "for more, upscale twice"
            )
    if size == (height, width):
        raise ValueError(f"size {width}×{height} is what the picture already has: at least one side must grow")
    return size


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

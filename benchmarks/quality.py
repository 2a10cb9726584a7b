"""What a model adds to interpolation, in figures, and whether that is detail or just something.

Pictures are cut to multiples of 32 pixels, shrunk by Pillow's bicubic in 8 bits, to a quarter unless another scale is
asked for, and enlarged again by each contender; all are compared in 8 bits. PSNR or sharpness alone can be had cheaply:
blurring raises one, noise the other. So the table has controls, the original among them and bicubic with blue noise of
the model's energy, which no set of limits that means anything may let pass. Pictures without an original are themselves
the input.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from infdit.config import InfDiTConfig
from infdit.model import InfDiT
from infdit.picture import PictureError, find_pictures, read_picture
from infdit.presets import PRESETS, sampling
from infdit.samplers import evaluations
from infdit.sizes import target_size
from infdit.tune import REFERENCE
from infdit.upscale import schedule, upscale

from . import scores
from .perceptual import st_lpips
from .scores import Bytes, over

MULTIPLE = 32  # that pictures with an original are cut to, in pixels: a whole number of LR tokens and of most blocks
ORIGINAL, BICUBIC, LANCZOS, NOISE = "original", "bicubic", "Lanczos", "bicubic + noise"
EXACT = f"heun, {REFERENCE} steps"  # beside presets: where the ODE leads
_BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"
_LR = "LR: bicubic downscale of the output against the input, dB over R, G and B."
_SEAM = "patch and block: step across the lines of the patch and the block grid over the step elsewhere"
LEGEND = (
    "PSNR, SSIM: of luma, 4-pixel border. energy: above half Nyquist, over the original's; flat: the same in its\n"
    "flattest fifth of 16×16 tiles; corr: correlation of what lies there with the original's; corr ¼: above a quarter\n"
    "of Nyquist, where the input ends (not judged). LPIPS: ST-LPIPS, how different it looks, if stlpips-pytorch is\n"
    "there (not judged). ODE: RMS distance from Heun's 100 steps, in units of [-1, 1], of presets. s: seconds.\n"
    f"{_LR}\n{_SEAM}, over the original's."
)
LEGEND_ALONE = (
    "Without originals. energy: above half Nyquist, over bicubic's (not judged). s: seconds.\n"
    f"{_LR}\n{_SEAM}, which is 1 without\n"
    "seams; block divided by bicubic's block over its patch, for an input that was a JPEG has a grid of its own, 32\n"
    "pixels wide after ×4. Noise is no control here: it hardly touches what is judged, LR and the two grids."
)


@dataclass(frozen=True)
class Thresholds:
    """What the means over a set of pictures must keep to pass; ratios are over the original, the rest over bicubic.

    The defaults are for a model that invents detail: it may lose decibels, and what it adds must be there.
    """

    least_energy: float = 0.6
    most_energy: float = 1.2
    most_flat_energy: float = 2.0
    correlation_lost: float = 0.0  # below bicubic's
    psnr_lost: float = 1.5  # dB below bicubic's
    consistency_lost: float = 2.0  # dB below bicubic's
    most_patch_seam: float = 1.03
    most_block_seam: float = 1.03


# of a model that draws only what is certain, as a bridge in one step does: it must win decibels, and may stay soft
CERTAIN = Thresholds(
    least_energy=0, most_flat_energy=1.2, psnr_lost=-0.5, consistency_lost=0, most_patch_seam=1.12, most_block_seam=1.08
)


@dataclass(frozen=True)
class Scores:
    """A row of the table; nan is what cannot be said."""

    psnr: float = math.nan
    ssim: float = math.nan
    energy: float = math.nan
    flat_energy: float = math.nan
    correlation: float = math.nan
    wide_correlation: float = math.nan
    consistency: float = math.nan
    patch_seam: float = math.nan
    block_seam: float = math.nan
    perceptual: float = math.nan
    distance: float = math.nan
    seconds: float = math.nan


_HEADS = ("PSNR", "SSIM", "energy", "flat", "corr", "corr ¼", "LR", "patch", "block", "LPIPS", "ODE", "s")
_DIGITS = (2, 4, 3, 3, 3, 3, 2, 3, 3, 3, 5, 2)
_NAME, _WIDTH = 22, 8  # characters


@dataclass(frozen=True)
class Settings:
    """How the contenders run. None: the model's default, or what `upscale` does on its own.

    steps: one row each; limit: pictures of a folder; crop: pixels of the side of a centre crop; halve: pictures are
    made half as large first, which takes the grid and the noise of a JPEG away; presets: they in place of steps; scale,
    fidelity: see `upscale`.
    """

    steps: tuple[int, ...] = (1, 4, 8, 16)
    sampler: str | None = None
    sigma_max: float | None = None
    seed: int = 0
    budget: int | None = None
    device: torch.device | None = None
    limit: int | None = None
    crop: int | None = None
    halve: bool = False
    presets: bool = False
    scale: float = 4.0
    fidelity: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("limit", self.limit), ("crop", self.crop)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1, or left out")


@dataclass(frozen=True)
class _Way:
    """How the picture of a row is sampled: its name, how many evaluations that takes, and what `upscale` is told."""

    name: str
    evaluations: int
    told: Mapping[str, Any]


@dataclass(frozen=True)
class _Case:
    """One input, (h, w, 3) uint8, and its original, four times as large, if there is one."""

    name: str
    low: Bytes
    original: Bytes | None


def report(
    given: Path, model: InfDiT, settings: Settings, with_original: bool = True, each: bool = False
) -> Iterator[str]:
    """The table of a folder (or file) of pictures as text: rows of each picture if asked, the means, the verdicts.

    Raises:
        PictureError: pictures that are missing or too small.
        ValueError: settings that the model does not have.
    """
    paths = find_pictures([given])[: settings.limit]
    ways, sampler = _ways(model, settings), settings.sampler or model.defaults.sampler
    sigma = model.defaults.sigma_max if settings.sigma_max is None else settings.sigma_max
    how = "presets" if settings.presets else sampler
    yield f"{given}: {len(paths)} pictures; {how}, sigma_max {sigma:g}, {str(model.dtype).removeprefix('torch.')}"
    yield LEGEND if with_original else LEGEND_ALONE
    table: dict[str, list[Scores]] = {}
    with tqdm(total=len(paths) * sum(way.evaluations for way in ways), bar_format=_BAR, mininterval=0.5) as bar:
        for path in paths:
            bar.set_description_str(path.name)
            case = _case(path, settings, with_original)
            if not table:  # what the first run of all pays for must not be in the seconds
                _run(_Case("", case.low[:8, :8], None), model, settings, _Way("", 0, {"steps": 1}), bar)
            pictures, apart = _contenders(case, model, settings, ways, bar)
            bicubic = pictures[BICUBIC][0]
            rows = {name: _score(case, one, bicubic, model.config) for name, one in pictures.items()}
            rows |= {name: replace(rows[name], distance=distance) for name, distance in apart.items()}
            for name, row in rows.items():
                table.setdefault(name, []).append(row)
            if each:
                bar.clear()
                yield "\n".join(["", *_rows(case.name, rows)])
    means = {name: mean(rows) for name, rows in table.items()}
    limits = Thresholds() if model.defaults.start_noise else CERTAIN
    yield "\n".join(["", *_rows(f"mean of {len(paths)}", means), "", *_verdicts(means, limits)])


def mean(rows: Sequence[Scores]) -> Scores:
    """Of each column over the pictures where it could be told."""
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(Scores)}
    told = {name: [value for value in values if not math.isnan(value)] for name, values in columns.items()}
    return Scores(**{name: math.fsum(values) / len(values) for name, values in told.items() if values})


def failures(row: Scores, bicubic: Scores, limits: Thresholds) -> list[str]:
    """What a row exceeds, in words, beside bicubic on the same pictures; what is nan is not judged."""
    ranges: dict[str, tuple[float, float, float]] = {  # value, least, most
        "PSNR": (row.psnr, bicubic.psnr - limits.psnr_lost, math.inf),
        "flat": (row.flat_energy, 0, limits.most_flat_energy),
        "corr": (row.correlation, bicubic.correlation - limits.correlation_lost, math.inf),
        "LR": (row.consistency, bicubic.consistency - limits.consistency_lost, math.inf),
        "patch": (row.patch_seam, 0, limits.most_patch_seam),
        "block": (row.block_seam, 0, limits.most_block_seam),
    }
    if not math.isnan(row.psnr):  # else energy is over bicubic's
        ranges["energy"] = (row.energy, limits.least_energy, limits.most_energy)
    digits: dict[str, int] = dict(zip(_HEADS, _DIGITS, strict=True))
    found = []
    for name in (head for head in _HEADS if head in ranges):
        value, least, most = ranges[name]
        if value < least:
            found.append(f"{name} {value:.{digits[name]}f} is under {least:.{digits[name]}f}")
        elif value > most:
            found.append(f"{name} {value:.{digits[name]}f} is over {most:.{digits[name]}f}")
    return found


# ---- pictures


def _case(path: Path, settings: Settings, with_original: bool) -> _Case:
    """Colours as the file has them; transparency is left out."""
    picture = _to_bytes(read_picture(path).pixels[..., :3])
    if settings.halve:
        picture = _resized(picture, *(max(1, side // 2) for side in picture.shape[:2]), Image.Resampling.BOX)
    if settings.crop is not None:
        sides = [min(side, settings.crop) for side in picture.shape[:2]]
        top, left = ((whole - side) // 2 for whole, side in zip(picture.shape[:2], sides, strict=True))
        picture = picture[top : top + sides[0], left : left + sides[1]]
    if not with_original:
        return _Case(path.name, picture, None)
    height, width = (side // MULTIPLE * MULTIPLE for side in picture.shape[:2])
    if not height or not width:
        raise PictureError(
            f"{path}: {picture.shape[1]}×{picture.shape[0]} is too small to be compared, which takes "
            f"{MULTIPLE}×{MULTIPLE}: leave it out, or choose a larger --crop"
        )
    original = picture[:height, :width]
    small = [max(1, round(side / settings.scale)) for side in (height, width)]
    return _Case(path.name, _resized(original, small[0], small[1]), original)


def _ways(model: InfDiT, settings: Settings) -> list[_Way]:
    given: dict[str, Any] = {"sigma_max": settings.sigma_max}
    own = settings.sampler or model.defaults.sampler
    if settings.presets:
        chosen = {name: sampling(model.defaults, name, **given) for name in PRESETS}
        counts = {name: evaluations(str(how.sampler), how.sigmas) for name, how in chosen.items()}
        exact = _Way(EXACT, 2 * REFERENCE - 1, {"steps": REFERENCE, "sampler": "heun"} | given)
        return [exact, *(_Way(f"{name} ({count})", count, {"preset": name} | given) for name, count in counts.items())]
    default, ways = _default_steps(model, settings), list[_Way]()
    for steps in settings.steps:
        name = f"{steps} step{'s' * (steps > 1)}" + " (default)" * (steps == default)
        count = evaluations(own, schedule(model.defaults, steps, settings.sigma_max))
        ways.append(_Way(name, count, {"steps": steps, "sampler": settings.sampler} | given))
    return ways


def _contenders(
    case: _Case, model: InfDiT, settings: Settings, ways: Sequence[_Way], bar: tqdm
) -> tuple[dict[str, tuple[Bytes, float]], dict[str, float]]:
    """By name (h, w, 3) uint8 and seconds; and of presets how far they are from where the ODE leads."""
    height, width = _enlarged(case, settings)
    found = {} if case.original is None else {ORIGINAL: (case.original, math.nan)}
    for name, kernel in ((BICUBIC, Image.Resampling.BICUBIC), (LANCZOS, Image.Resampling.LANCZOS)):
        start = time.perf_counter()
        found[name] = _resized(case.low, height, width, kernel), time.perf_counter() - start
    results = {way.name: _run(case, model, settings, way, bar) for way in ways}
    pictures = {name: (_to_bytes(result), seconds) for name, (result, seconds) in results.items()}
    model_own = next((way.name for way in ways if way.name.endswith("(default)")), ways[-1].name)
    found[NOISE] = _with_noise(found[BICUBIC][0], pictures[model_own][0], settings.seed), math.nan
    ends = {name: result for name, (result, _) in results.items() if EXACT in results}
    return found | pictures, {
        name: 2 * (end - ends[EXACT]).double().square().mean().sqrt().item() for name, end in ends.items()
    }


def _default_steps(model: InfDiT, settings: Settings) -> int | None:
    """The row that is the model's own default, if there is one."""
    given = (settings.sampler or model.defaults.sampler, settings.sigma_max or model.defaults.sigma_max)
    own = given == (model.defaults.sampler, model.defaults.sigma_max) and model.defaults.steps in settings.steps
    return model.defaults.steps if own else None


def _run(case: _Case, model: InfDiT, settings: Settings, way: _Way, bar: tqdm) -> tuple[torch.Tensor, float]:
    """The model's picture, (h, w, 3), and seconds; the bar moves by the evaluations in all."""
    begun = bar.n

    def progress(done: int, total: int, _: object) -> None:
        bar.update(begun + way.evaluations * done / total - bar.n)

    image = torch.from_numpy(case.low.astype(np.float32) / 255)[None]
    start = time.perf_counter()
    more: dict[str, Any] = {"progress": progress, "device": settings.device} | dict(way.told)
    more |= {"seed": settings.seed, "budget": settings.budget, "fidelity": settings.fidelity}
    result = upscale(model, image, size=_enlarged(case, settings), **more)
    return result[0], time.perf_counter() - start


def _enlarged(case: _Case, settings: Settings) -> tuple[int, int]:
    """(height, width) of the original, or what the scale makes of a picture without one."""
    if case.original is not None:
        return case.original.shape[0], case.original.shape[1]
    return target_size(case.low.shape[0], case.low.shape[1], settings.scale)


def _with_noise(bicubic: Bytes, result: Bytes, seed: int) -> Bytes:
    """Bicubic and as much grey noise as brings it to the energy of a result: sharp by the figure, and no better."""
    missing = scores.energy(scores.luma(result)) - scores.energy(scores.luma(bicubic))
    noise = scores.blue_noise(bicubic.shape[:2], max(float(missing), 0), np.random.default_rng(seed))
    return np.clip(np.rint(bicubic + noise[..., None] / scores.LUMA_OF_GREY), 0, 255).astype(np.uint8)


def _resized(
    picture: Bytes, height: int, width: int, kernel: Image.Resampling = Image.Resampling.BICUBIC
) -> Bytes:
    return np.asarray(Image.fromarray(picture).resize((width, height), kernel))


def _to_bytes(pixels: torch.Tensor) -> Bytes:
    return (pixels * 255 + 0.5).to(torch.uint8).numpy()


def _score(case: _Case, contender: tuple[Bytes, float], bicubic: Bytes, config: InfDiTConfig) -> Scores:
    picture, seconds = contender
    y = scores.luma(picture)
    patches, blocks = scores.seam(y, config.patch_size), scores.seam(y, config.block_size)
    consistency = scores.psnr(_resized(picture, *case.low.shape[:2]), case.low)
    if case.original is None:
        plain = scores.luma(bicubic)
        inherited = over(scores.seam(plain, config.block_size), scores.seam(plain, config.patch_size))
        return Scores(
            energy=scores.energy_ratio(y, plain),
            consistency=consistency,
            patch_seam=patches,
            block_seam=over(blocks, inherited),
            seconds=seconds,
        )
    truth = scores.luma(case.original)
    flat = scores.flattest(truth)
    return Scores(
        psnr=scores.psnr(y, truth, scores.BORDER),
        ssim=scores.ssim(y, truth, scores.BORDER),
        energy=scores.energy_ratio(y, truth),
        flat_energy=scores.energy_ratio(scores.tiles(y)[flat], scores.tiles(truth)[flat]),
        correlation=scores.correlation(y, truth),
        wide_correlation=scores.correlation(y, truth, scores.INPUT_NYQUIST),
        consistency=consistency,
        patch_seam=over(patches, scores.seam(truth, config.patch_size)),
        block_seam=over(blocks, scores.seam(truth, config.block_size)),
        perceptual=_perceptual(picture, case.original),
        seconds=seconds,
    )


def _perceptual(picture: Bytes, original: Bytes) -> float:
    score = st_lpips()
    if score is None:
        return math.nan
    pair = (torch.from_numpy(x.astype(np.float32)).movedim(-1, 0)[None] / 127.5 - 1 for x in (picture, original))
    with torch.inference_mode():
        return float(score(*pair))


# ---- text


def _rows(title: str, rows: dict[str, Scores]) -> Iterator[str]:
    """Head and rows; columns that no row has are left out."""
    columns = zip(_HEADS, _DIGITS, *(asdict(row).values() for row in rows.values()), strict=True)
    used = [column for column in columns if not all(map(math.isnan, column[2:]))]
    yield f"{title[: _NAME - 1]:{_NAME}}" + "".join(f"{column[0]:>{_WIDTH}}" for column in used)
    for i, name in enumerate(rows, start=2):
        yield f"{name:{_NAME}}" + "".join(f"{_number(column[i], column[1]):>{_WIDTH}}" for column in used)


def _number(value: float, digits: int) -> str:
    """Fewer decimals from 100 up, so that columns do not run into each other."""
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if value < 100 else f"{value:.1f}" if value < 1e5 else f"{value:.1e}"


def _verdicts(means: dict[str, Scores], limits: Thresholds) -> Iterator[str]:
    for name, row in means.items():
        failed = failures(row, means[BICUBIC], limits)
        judged = "passes" if not math.isnan(row.psnr) else "passes LR and seams"
        yield f"{name:{_NAME}}{'fails: ' + '; '.join(failed) if failed else judged}"
    if NOISE in means and ORIGINAL in means and not failures(means[NOISE], means[BICUBIC], limits):
        yield f"{NOISE} must not pass: on these pictures the figures cannot tell detail from noise."

"""upscale: pictures in, pictures out; nothing is overwritten that was not meant to be."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..checkpoint import clip_path, load_model, read_checkpoint
from ..clip import NEGATIVE, POSITIVE, STRENGTH, WEIGHTS, CLIPEncoder, guide, load_clip, text_direction
from ..conditioning import visible_colour
from ..device import WrongNumbers, default_dtype, one_memory, out_of_memory
from ..memory.planner import OutOfMemory
from ..model import InfDiT
from ..picture import (
    Picture,
    PictureError,
    TargetError,
    check_target,
    find_pictures,
    place_for,
    read_picture,
    sweep,
    write_picture,
)
from ..presets import PRESETS, sampling
from ..progress import Preview
from ..run import Report
from ..samplers import SAMPLERS
from ..sizes import MAX_SCALE, MOST_SCALE, target_size
from ..upscale import upscale
from . import BAD_INPUT, BAR, DTYPES, add_memory, device_of, size_of

OUT_OF_MEMORY = "out of memory; choose a smaller result, close other programs, or try --device cpu"
log = logging.getLogger(__name__)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    p = commands.add_parser("upscale", help="upscale pictures", description=f"Upscale pictures by up to {MOST_SCALE}.")
    p.set_defaults(command=run)
    p.add_argument("inputs", nargs="+", type=Path, metavar="IN", help="picture, or folder of pictures")
    p.add_argument("-o", "--output", required=True, metavar="OUT", help="picture, or folder; FOLDER/ makes one")
    p.add_argument("--model", default="mini", metavar="FILE", help="published .pt, .safetensors, or mini (default)")
    size = p.add_mutually_exclusive_group()
    scales = f"1 to {MOST_SCALE}, in passes above {MAX_SCALE} (default 4)"
    size.add_argument("--scale", type=float, default=4.0, metavar="X", help=scales)
    size.add_argument("--size", type=size_of, metavar="WxH", help="size of the result in pixels")
    p.add_argument("--steps", type=int, metavar="N", help="default: the model's")
    p.add_argument("--sampler", choices=list(SAMPLERS), help="default: the model's")
    p.add_argument("--preset", choices=list(PRESETS), help="39, 13 or 8 evaluations; default: the model's own")
    p.add_argument("--denoise", type=float, default=1.0, metavar="X", help="0 (bicubic) to 1 (default)")
    faithful = "0 (default) to 1: how far the result, made small again, is what the input is"
    p.add_argument("--fidelity", type=float, default=0.0, metavar="X", help=faithful)
    p.add_argument("--colour-match", action="store_true", help="give the result the input's mean and spread of colours")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")
    p.add_argument("--clip", type=Path, metavar="FILE", help="CLIP ViT-L-14 weights; default: those beside the model")
    p.add_argument("--positive", default="", metavar="TEXT", help=f'what to lead the picture to, like "{POSITIVE}"')
    p.add_argument("--negative", default="", metavar="TEXT", help=f'what to lead it away from, like "{NEGATIVE}"')
    p.add_argument("--strength", type=float, default=STRENGTH, metavar="X", help=f"of the texts (default {STRENGTH:g})")
    add_memory(p)
    p.add_argument("--force", action="store_true", help="replace existing results")


def run(options: argparse.Namespace) -> int:
    """Upscale all inputs, each to its own file; one that fails among several does not lose the others."""
    jobs = _jobs(find_pictures(options.inputs), options)
    device = device_of(options.device)
    # on the CPU, mapped from the file: the plan says what goes to the device; but not twice into one memory
    place = device if one_memory(device) else "cpu"
    model = load_model(options.model, DTYPES[options.dtype] or default_dtype(device), place)
    encoder = _clip(options, model)
    folder = jobs[0][1].parent
    if jobs[0][1] != Path(options.output):  # made only now that nothing else can be refused
        _make_folder(folder)
    sweep(folder)
    with place_for(jobs[0][1]):
        pass  # that nothing can be written is told before the work
    vectors = _vectors(encoder, options, [source for source, _ in jobs])
    del encoder  # its memory is free while pictures are enlarged
    failed = 0
    with logging_redirect_tqdm():
        for source, target in jobs:
            try:
                _upscale_one(source, target, model, vectors.get(source), device, options)
            except TargetError:  # no other picture could be written either
                raise
            except (ValueError, MemoryError, RuntimeError, WrongNumbers) as error:
                memory = out_of_memory(error)
                if len(jobs) == 1 or not (memory or isinstance(error, ValueError | WrongNumbers)):
                    raise
                failed += 1  # the others are not lost
                text = str(error) if isinstance(error, OutOfMemory) or not memory else OUT_OF_MEMORY
                print(f"infdit: {source}: {text.removeprefix(f'{source}: ')}", file=sys.stderr)
    return BAD_INPUT if failed else 0


def _upscale_one(
    source: Path, target: Path, model: InfDiT, vector: torch.Tensor | None, device: torch.device,
    options: argparse.Namespace,
) -> None:
    picture = read_picture(source)
    height, width = picture.pixels.shape[:2]
    size = target_size(height, width, options.scale, options.size)
    image = picture.pixels[None]
    check_target(target, replace(picture, pixels=torch.zeros(()).expand(*size, image.shape[-1])))
    with place_for(target) as write, ExitStack() as shown:

        @cache
        def bar(total: int) -> tqdm:  # made when it first moves: nothing is shown of what is refused at once
            return shown.enter_context(tqdm(desc=source.name, total=total, bar_format=BAR))

        def progress(done: int, total: int, preview: Preview | None) -> None:
            bar(total).update(done - bar(total).n)

        names = ("steps", "sampler", "seed", "budget", "denoise", "preset", "fidelity", "colour_match")
        report = Report() if options.fidelity or options.colour_match else None
        given = {name: getattr(options, name) for name in names} | {"device": device, "report": report}
        result = upscale(model, image, size=size, clip_embedding=vector, progress=progress, **given)
        shown.close()
        _write(write, target, replace(picture, pixels=result[0]))
    alike = f"LR consistency {report.faithful[0]}" if report else ""
    asked = options.preset, options.steps, options.sampler
    words = sampling(model.defaults, *asked, denoise=options.denoise).words
    print("; ".join(filter(None, (f"{target}: {size[1]}×{size[0]}", alike, words))))


def _write(write: Callable[[Picture], None], target: Path, picture: Picture) -> None:
    """Write a result; where that fails after all the work, into the folder for temporary files."""
    try:
        write(picture)
    except TargetError as error:
        kept = Path(tempfile.mkdtemp(prefix="infdit-")) / target.name
        try:
            write_picture(kept, picture)
        except PictureError:
            kept.parent.rmdir()
            raise error from None
        raise TargetError(target, error.reason, f"the result is kept as {kept}") from error


def _jobs(sources: list[Path], options: argparse.Namespace) -> list[tuple[Path, Path]]:
    """(source, target) pairs, refused as a whole before anything is done if one of them would destroy a file."""
    output = Path(options.output)
    folder = output.is_dir() or options.output.endswith(("/", os.sep))
    several = len(sources) > 1 or options.inputs[0].is_dir() or folder
    if several:
        if output.exists() and not output.is_dir():
            raise PictureError(f"{output} is a file: for several pictures give a folder")
        jobs = [(source, output / f"{source.stem}.png") for source in sources]
    else:
        jobs = [(sources[0], output)]
    taken: dict[str, Path] = {}
    for source, target in jobs:
        # no two names that some disks take for one
        other = taken.setdefault(str(target.resolve()).casefold(), source)
        if other is not source:
            raise PictureError(f"{other} and {source} would both become {target}: rename one or run them apart")
        if target.exists() and any(target.samefile(original) for original in sources):
            raise PictureError(f"{target} is an input and is never overwritten: choose another OUT")
        if target.exists() and not options.force:
            raise PictureError(f"{target} exists: choose another OUT, or replace it with --force")
    return jobs


def _vectors(encoder: CLIPEncoder | None, options: argparse.Namespace, sources: list[Path]) -> dict[Path, torch.Tensor]:
    """CLIP's vector of each picture, made before the first upscale, for CLIP's memory is free then."""
    if encoder is None:
        return {}
    direction = text_direction(encoder, options.positive, options.negative) if options.strength else None
    vectors: dict[Path, torch.Tensor] = {}
    for source in tqdm(sources, desc="CLIP", leave=False, disable=len(sources) == 1):
        try:
            image = read_picture(source).pixels[None]
        except PictureError:
            continue  # told when its turn comes
        vectors[source] = guide(encoder(visible_colour(image) * 2 - 1), direction, options.strength)
    return vectors


def _clip(options: argparse.Namespace, model: InfDiT) -> CLIPEncoder | None:
    """The encoder named, or the one that `convert` put beside the model, if the model listens to it."""
    text = bool(options.positive.strip() or options.negative.strip())
    if not model.config.vector_dim:
        if options.clip is not None or text:
            log.warning("this model has no CLIP input: --clip, --positive and --negative are ignored")
        return None
    beside = clip_path(options.model)
    path = options.clip or (beside if beside.exists() else None)
    if path is None and read_checkpoint(options.model).clip:
        path = options.model
    if path is None and text:
        raise ValueError(f"--positive and --negative need CLIP: give --clip FILE, {WEIGHTS}")
    return None if path is None else load_clip(path, device="cpu")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PictureError(f"{path}: cannot be made ({error.strerror}): choose another OUT") from error

"""upscale: pictures in, pictures out; nothing is overwritten that was not meant to be."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..checkpoint import load_model
from ..clip import NEGATIVE, POSITIVE, STRENGTH
from ..device import WrongNumbers, default_dtype, devices_of, one_memory, out_of_memory
from ..draft import sweep
from ..memory.cost import seconds_of_run
from ..memory.plan import Workload
from ..memory.planner import OutOfMemory, format_bytes, format_seconds
from ..model import InfDiT
from ..picture import (
    DEPTHS,
    Picture,
    PictureError,
    TargetError,
    check_target,
    depth_of,
    find_pictures,
    place_for,
    read_picture,
    write_picture,
)
from ..presets import PRESETS, of_passes
from ..progress import Preview
from ..receipt import receipt_of
from ..resume import SavedRun, settings_of
from ..run import Report
from ..samplers import SAMPLERS, get_sampler
from ..sizes import MAX_SCALE, MOST_SCALE, bounds, growth, target_size
from ..upscale import upscale, workload_of
from . import BAR, DTYPES, FAILED, add_memory, size_of, strengths_of
from .jobs import LeftOut, WriteReceipts, check_existing, digest_of, jobs_of, receipts_at
from .recipe import (
    IN_RECEIPT,
    OTHER_PLAN,
    Recipe,
    clip_of_call,
    clip_vectors,
    plan_of_receipt,
    receipt_of_call,
    recipe_of,
)

if TYPE_CHECKING:
    from ..ranks import Peers

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
    size.add_argument("--size", type=size_of, metavar="WxH", help="of the result; another shape is stretched to it")
    for name in ("longest", "shortest"):
        size.add_argument(f"--{name}", type=int, metavar="N", help=f"the result's {name} side; keeps the shape")
    size.add_argument("--megapixels", type=float, metavar="X", help="of 1024×1024 pixels; keeps the shape")
    p.add_argument("--steps", type=int, metavar="N", help="default: the model's")
    p.add_argument("--sampler", choices=list(SAMPLERS), help="default: the model's")
    p.add_argument("--preset", choices=list(PRESETS), help="39, 13 or 8 evaluations, at most "
                   "0.8, 0.1 or 0.2 of a grey level off on known pictures; default: the model's own")
    strength = "0 (bicubic) to 1 (default); above ×4 also one of each pass like 1,0.5"
    p.add_argument("--denoise", type=strengths_of, default=[1.0], metavar="X", help=strength)
    faithful = "0 (default) to 1: how far the result, made small again, is what the input is"
    p.add_argument("--fidelity", type=float, default=0.0, metavar="X", help=faithful)
    p.add_argument("--colour-match", action="store_true", help="give the result the input's mean and spread of colours")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")
    bits = "a channel of the results: 8, 16 (PNG, TIFF) or 32 (TIFF of floats); default: the input's, if OUT can"
    p.add_argument("--bits", type=int, choices=DEPTHS, help=bits)
    p.add_argument("--clip", type=Path, metavar="FILE", help="CLIP ViT-L-14 weights; default: those beside the model")
    p.add_argument("--positive", default="", metavar="TEXT", help=f'what to lead the picture to, like "{POSITIVE}"')
    p.add_argument("--negative", default="", metavar="TEXT", help=f'what to lead it away from, like "{NEGATIVE}"')
    p.add_argument("--strength", type=float, default=STRENGTH, metavar="X", help=f"of the texts (default {STRENGTH:g})")
    add_memory(p)
    p.add_argument("--force", action="store_true", help="replace existing results")
    p.add_argument("--recursive", action="store_true", help="folders in folders too, into folders of the same names")
    p.add_argument("--resume", type=Path, metavar="DIR", help="keep the state of each step there, and go on from it")
    p.add_argument("--receipt", type=Path, metavar="JSON", help="write what was done; every PNG made holds it too")
    p.add_argument("--from-receipt", type=Path, metavar="FILE", help="JSON or PNG: with its settings, the same pixels")
    p.set_defaults(own={name: p.get_default(name) for name in IN_RECEIPT})


def run(options: argparse.Namespace) -> int:
    """Upscale all inputs, each to its own file; one that fails among several does not lose the others.

    Of several processes that torchrun started the first does so, and the others help it.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return _run(options, devices_of(options.device), None)
    from ..ranks import Peers  # which not every PyTorch has

    device, *others = devices_of(options.device)
    if others:
        raise ValueError("--device names several, and torchrun starts a process for each: give one, or none")
    if device.type in ("cuda", "xpu") and device.index is None:
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))
    with Peers() as peers:
        if not peers.rank:
            return _run(options, [device], peers)
        peers.serve(lambda dtype: load_model(options.model, dtype, _place(device)), device, options.budget)
    return 0


def _place(device: torch.device) -> torch.device | str:
    """Where a model is loaded to: mapped from the file, for the plan says what goes to the device; or at once."""
    return device if one_memory(device) else "cpu"


def _run(options: argparse.Namespace, devices: list[torch.device], peers: Peers | None) -> int:
    output = Path(options.output)
    jobs = jobs_of(find_pictures(options.inputs, options.recursive, output), options)
    sources = [source for source, _ in jobs]
    receipt = receipt_of_call(options)
    device = devices[0]
    place = "cpu" if devices[1:] else _place(device)
    model = load_model(options.model, DTYPES[options.dtype] or default_dtype(device), place)
    recipe = recipe_of(options, model, devices, receipt, peers)
    encoder = None if receipt and receipt.settings["clip"] is None else clip_of_call(options, model)
    with receipts_at(options.receipt, sources, options.force) as write_receipts:
        for folder in dict.fromkeys(target.parent for _, target in jobs):
            if jobs[0][1] != output:  # made only now that nothing else can be refused
                _make_folder(folder, "another OUT")
            sweep(folder)
        if options.resume is not None:
            _make_folder(options.resume, "a folder for --resume")
        for target in {target.parent: target for _, target in reversed(jobs)}.values():
            with place_for(target):
                pass  # that nothing can be written in a folder is told before the work
        vectors = clip_vectors(encoder, options, sources)
        del encoder  # its memory is free while pictures are enlarged
        return _upscale_all(jobs, recipe, vectors, options, write_receipts)


def _upscale_all(
    jobs: list[tuple[Path, Path]], recipe: Recipe, vectors: dict[Path, torch.Tensor], options: argparse.Namespace,
    write_receipts: WriteReceipts,
) -> int:
    receipts, done, left, failed = [], 0, 0, 0
    with logging_redirect_tqdm():
        for source, target in jobs:
            try:
                receipt = _upscale_one(source, target, recipe, vectors.get(source), options)
            except TargetError:  # no other picture could be written either
                raise
            except (ValueError, MemoryError, RuntimeError, WrongNumbers) as error:
                memory = out_of_memory(error)
                lost = memory and recipe.peers is not None  # the others are in the middle of it
                if len(jobs) == 1 or lost or not (memory or isinstance(error, ValueError | WrongNumbers)):
                    raise
                left += isinstance(error, LeftOut)
                failed += not isinstance(error, LeftOut)  # the others are not lost
                text = str(error) if isinstance(error, OutOfMemory) or not memory else OUT_OF_MEMORY
                print(f"infdit: {source}: {text.removeprefix(f'{source}: ')}", file=sys.stderr)
                continue
            if receipt is None:
                done += 1
                continue
            receipts.append(receipt)
            write_receipts(receipts)  # each time: a run of hours may end by force
    if len(jobs) > 1 or done:
        print(f"{len(receipts)} made, {done} there already, {left} left out, {failed} failed")
    return FAILED if failed or left else 0


def _upscale_one(
    source: Path, target: Path, recipe: Recipe, vector: torch.Tensor | None, options: argparse.Namespace
) -> dict[str, Any] | None:
    """The receipt of what was made; None if it was there already."""
    picture = read_picture(source)
    model, devices, taken, image = recipe.model, recipe.devices, recipe.receipt, picture.pixels[None]
    height, width = image.shape[1:3]
    size = target_size(height, width, 1, taken.size) if taken else _result_size(options, height, width)
    folder = os.environ.get("TMPDIR") or target.parent  # where pictures lie that memory does not hold
    fitted = recipe.fidelity > 0
    workload = workload_of(model, image.shape, size, recipe.sampler, devices[0], fitted=fitted, folder=folder)
    vectors, finish = None if vector is None else [vector], (recipe.fidelity, recipe.colour_match)
    sampler, digest = get_sampler(recipe.sampler), digest_of(source)
    levels = of_passes(recipe.sigmas, len(workload.passes))
    settings = settings_of(workload, model.defaults, sampler, levels, recipe.seed, vectors, *finish)
    picture = replace(picture, bits=options.bits or (taken.bits if taken else None) or picture.bits)
    check_target(target, replace(picture, pixels=picture.pixels[:1, :1].expand(*size, -1)))
    bits = depth_of(target, picture.bits)
    if options.bits not in (None, bits):
        raise PictureError(f"{target}: {target.suffix} holds {bits} bits a channel, not {options.bits}: save as .tif")
    made_from = {"model": model.digest, "picture": digest, "bits": bits, **settings}
    if not options.force and check_existing(target, made_from):
        return None
    plan = plan_of_receipt(taken, workload, digest, settings, options) if taken else None
    if recipe.peers is not None:
        if taken:
            log.warning(OTHER_PLAN, "for the processes there are")
        plan = recipe.peers.plan(workload, model.digest, options.budget)
    resume = options.resume and SavedRun(options.resume / _state_name(source, target))
    report, began = Report(), time.monotonic()
    with place_for(target) as write, ExitStack() as shown:

        @cache
        def bar(total: int) -> tqdm:  # made when it first moves: nothing is shown of what is refused at once
            return shown.enter_context(tqdm(desc=source.name, total=total, bar_format=BAR))

        def progress(done: int, total: int, preview: Preview | None) -> None:
            bar(total).update(done - bar(total).n)

        result = upscale(
            model, image, size=size, sampler=recipe.sampler, sigmas=levels, seed=recipe.seed,
            fidelity=recipe.fidelity, colour_match=recipe.colour_match, clip_embedding=vector,
            budget=None if plan else options.budget, plan=plan, progress=progress, device=devices, report=report,
            resume=resume, folder=folder,
        )  # fmt: skip
        shown.close()
        about = _about(model, picture, digest, recipe, options)
        receipt = receipt_of(report, time.monotonic() - began, bits=bits, **about)
        _write(write, target, replace(picture, pixels=result[0], note=json.dumps(receipt)))
    if resume is not None:
        resume.remove()
    told = f"{target}: {size[1]}×{size[0]}", f"LR consistency {report.faithful[0]}"
    print("; ".join(filter(None, (*told, *_words(recipe, workload, levels, report)))))
    return receipt


def _words(recipe: Recipe, workload: Workload, levels: Sequence[torch.Tensor], report: Report) -> tuple[str, str]:
    """How it was sampled, where that was asked for, and the most that was held, where that is known."""
    peak = f"peak {format_bytes(report.peak_bytes)}" if report.peak_bytes is not None else ""
    if not recipe.words or report.plan is None or recipe.peers is not None:  # how fast others are is not known here
        return recipe.words, peak
    workload = replace(workload, beside=tuple(recipe.devices[1:]))
    return f"{recipe.words}, about {format_seconds(seconds_of_run(workload, report.plan, levels))} foretold", peak


def _about(
    model: InfDiT, picture: Picture, digest: str, recipe: Recipe, options: argparse.Namespace
) -> dict[str, object]:
    return {
        "model": {"name": Path(options.model).name, "sha256": model.digest},
        "picture": {"sha256": digest, "size": [*picture.pixels.shape[:2]]},
        "device": recipe.devices[0].type,
        "text": {name: getattr(options, name) for name in ("positive", "negative", "strength")},
    }


def _result_size(options: argparse.Namespace, height: int, width: int) -> tuple[int, int]:
    """(height, width) that a picture becomes, with a warning where that is another shape.

    Raises:
        ValueError: what no picture of this size can become.
    """
    if options.size is not None:
        size = target_size(height, width, 1, options.size)
        if abs(size[0] * width - size[1] * height) > max(height, width):  # more than a pixel
            log.warning(
                "%d×%d is stretched to %d×%d: --longest, --shortest, --megapixels and --scale keep the shape",
                width, height, size[1], size[0],
            )  # fmt: skip
        return size
    for name, value in ((name, getattr(options, name)) for name in ("longest", "shortest", "megapixels")):
        if value is None:
            continue
        scale = growth(name, value, height, width)
        if not 1 <= scale <= MOST_SCALE:
            least, most = bounds(name, height, width, 6)
            raise ValueError(
                f"--{name} {value:g} must be from {least:.10g} to {most:.10g}: a picture of {width}×{height} grows by "
                f"1 to {MOST_SCALE}"
            )
        return target_size(height, width, 1, (math.floor(height * scale + 0.5), math.floor(width * scale + 0.5)))
    return target_size(height, width, options.scale)


def _state_name(source: Path, target: Path) -> str:
    """Another for each target, whatever it is called."""
    return f"{source.stem[:60]}-{hashlib.sha256(os.fsencode(target.absolute())).hexdigest()[:16]}"


def _write(write: Callable[[Picture], None], target: Path, picture: Picture) -> None:
    """Write a result; where that fails after all the work, into the folder for temporary files."""
    try:
        write(picture)
    except PictureError as error:
        if not isinstance(error, TargetError):  # what is said beside the pixels is worth less than they
            return write(replace(picture, exif=b"", xmp=b"", dpi=None))
        try:
            kept = Path(tempfile.mkdtemp(prefix="infdit-")) / target.name
        except OSError:  # that disk is full too
            raise error from None
        try:
            write_picture(kept, picture)
        except PictureError:
            kept.parent.rmdir()
            raise error from None
        raise TargetError(target, error.reason, f"the result is kept as {kept}") from error


def _make_folder(path: Path, instead: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PictureError(f"{path}: cannot be made ({error.strerror}): choose {instead}") from error

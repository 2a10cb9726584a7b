"""The shell: `python -m infdit upscale | plan | convert | info | bench`."""

from __future__ import annotations

import argparse
import io
import logging
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .alpha import visible_colour
from .bench import quality
from .checkpoint import clip_path, convert, load_model, read_checkpoint
from .clip import (
    NEGATIVE,
    POSITIVE,
    STRENGTH,
    WEIGHTS,
    CLIPEncoder,
    OpenCLIPMissingError,
    guide,
    load_clip,
    text_direction,
)
from .config import InfDiTConfig, SamplingDefaults
from .device import default_device, default_dtype, out_of_memory
from .grid import BlockGrid
from .memory import Weights
from .model import InfDiT
from .picture import PictureError, check_target, find_pictures, read_picture, write_picture
from .planner import GIB, BudgetTooSmall, plan_memory, seconds_per_evaluation
from .samplers import SAMPLERS, evaluations
from .tensorfile import CheckpointError
from .upscale import MAX_SCALE, Preview, schedule, target_size, upscale

BAD_INPUT = 2  # exit status
INTERRUPTED = 130
_OUT_OF_MEMORY = "out of memory; choose a smaller result, close other programs, or try --device cpu"
_BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"
DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line in place of argparse's usage and message."""
        self.exit(BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that has no × must not turn success into failure
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (CheckpointError, OpenCLIPMissingError, ValueError) as error:
        print(f"infdit: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"infdit: {error.filename}: {error.strerror}; check the path", file=sys.stderr)
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"infdit: {_OUT_OF_MEMORY}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("infdit: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="infdit", description="Upscale pictures to any resolution with Inf-DiT.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    p = commands.add_parser("upscale", help="upscale pictures", description="Upscale pictures by up to 4.")
    p.set_defaults(command=_upscale)
    p.add_argument("inputs", nargs="+", type=Path, metavar="IN", help="picture, or folder of pictures")
    p.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="picture; for several, a folder")
    p.add_argument("--model", default="mini", metavar="FILE", help="published .pt, .safetensors, or mini (default)")
    size = p.add_mutually_exclusive_group()
    size.add_argument("--scale", type=float, default=4.0, metavar="X", help=f"above 1, at most {MAX_SCALE} (default 4)")
    size.add_argument("--size", type=_size, metavar="WxH", help="size of the result in pixels")
    p.add_argument("--steps", type=int, metavar="N", help="default: the model's")
    p.add_argument("--sampler", choices=list(SAMPLERS), help="default: the model's")
    p.add_argument("--denoise", type=float, default=1.0, metavar="X", help="0 (bicubic) to 1 (default)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")
    p.add_argument("--clip", type=Path, metavar="FILE", help="CLIP ViT-L-14 weights; default: those beside the model")
    p.add_argument("--positive", default="", metavar="TEXT", help=f'what to lead the picture to, like "{POSITIVE}"')
    p.add_argument("--negative", default="", metavar="TEXT", help=f'what to lead it away from, like "{NEGATIVE}"')
    p.add_argument("--strength", type=float, default=STRENGTH, metavar="X", help=f"of the texts (default {STRENGTH:g})")
    _add_memory(p)
    p.add_argument("--force", action="store_true", help="replace existing results")

    p = commands.add_parser("plan", help="what a run would hold and how long it would take", description=_plan.__doc__)
    p.set_defaults(command=_plan)
    p.add_argument("size", type=_size, metavar="WxH", help="size of the result in pixels")
    p.add_argument("--model", metavar="FILE", help="default: the published size")
    p.add_argument("--sampler", choices=list(SAMPLERS), help="default: the model's")
    p.add_argument("--steps", type=int, metavar="N", help="default: the model's")
    _add_memory(p)

    p = commands.add_parser("convert", help="published .pt → .safetensors", description=convert.__doc__)
    p.set_defaults(command=_convert)
    p.add_argument("source", type=Path, metavar="SRC")
    p.add_argument("target", type=Path, metavar="DST")
    p.add_argument("--force", action="store_true", help="replace an existing file")

    p = commands.add_parser("info", help="what a checkpoint is")
    p.set_defaults(command=_info)
    p.add_argument("model", metavar="FILE", help="published .pt, .safetensors, or mini")
    p.add_argument("--verify", action="store_true", help="check the SHA-256 of the tensors")

    _add_bench(commands.add_parser("bench", help="how good a model's pictures are", description=_bench.__doc__))
    return parser


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=_bytes, metavar="X", help="memory to use, like 4GiB; default: what is free")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; default: the best there is")
    parser.add_argument("--dtype", choices=list(DTYPES), default="auto", help="of the network (default auto)")


def _add_bench(p: argparse.ArgumentParser) -> None:
    p.set_defaults(command=_bench)
    folder = {"nargs": "+", "type": Path, "default": [], "metavar": "FOLDER"}
    p.add_argument("--quality", **folder, help="pictures to be shrunk to a quarter, enlarged again and compared")
    p.add_argument("--without-original", **folder, help="pictures to be enlarged, with nothing to compare with")
    p.add_argument("--model", default="mini", metavar="FILE", help="published .pt, .safetensors, or mini (default)")
    p.add_argument("--steps", type=_steps, default=(1, 4, 8, 16), metavar="N,…", help="a row each (default 1,4,8,16)")
    p.add_argument("--sampler", choices=list(SAMPLERS), help="default: the model's")
    p.add_argument("--sigma-max", type=float, metavar="X", help="default: the model's")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")
    p.add_argument("--limit", type=int, metavar="N", help="pictures of a folder to take, the first by name")
    p.add_argument("--crop", type=int, metavar="N", help="take the centre of each picture, N pixels a side")
    p.add_argument("--each", action="store_true", help="print the rows of each picture, not only the means")
    _add_memory(p)


# ---- upscale


def _upscale(options: argparse.Namespace) -> int:
    jobs = _jobs(find_pictures(options.inputs), options.inputs, options.output, options.force)
    device = _device(options.device)
    # on the CPU, mapped from the file: the plan says what goes to the device
    model = load_model(options.model, DTYPES[options.dtype] or default_dtype(device), "cpu")
    vectors = _vectors(options, model, [source for source, _ in jobs])
    if jobs[0][1] != options.output:  # a folder; made only now that nothing else can be refused
        _make_folder(options.output)
    failed = 0
    with logging_redirect_tqdm():
        for source, target in jobs:
            try:
                _upscale_one(source, target, model, vectors.get(source), device, options)
            except (ValueError, MemoryError, RuntimeError) as error:
                memory = out_of_memory(error)
                if len(jobs) == 1 or not (memory or isinstance(error, ValueError)):
                    raise
                failed += 1  # the others are not lost
                print(f"infdit: {source}: {_OUT_OF_MEMORY if memory else error}", file=sys.stderr)
    return BAD_INPUT if failed else 0


def _upscale_one(
    source: Path,
    target: Path,
    model: InfDiT,
    vector: torch.Tensor | None,
    device: torch.device,
    options: argparse.Namespace,
) -> None:
    picture = read_picture(source)
    height, width = picture.pixels.shape[:2]
    size = target_size(height, width, options.scale, options.size)
    image = picture.pixels[None]
    check_target(target, replace(picture, pixels=torch.zeros(()).expand(*size, image.shape[-1])))
    with closing(_Bar(source.name)) as bar:
        result = upscale(
            model,
            image,
            steps=options.steps,
            sampler=options.sampler,
            seed=options.seed,
            budget=options.budget,
            size=size,
            denoise=options.denoise,
            clip_embedding=vector,
            progress=bar,
            device=device,
        )
    write_picture(target, replace(picture, pixels=result[0]))
    print(f"{target}: {size[1]}×{size[0]}")


class _Bar:
    """The progress of one picture, with time left; nothing is shown of a picture that is refused at once."""

    def __init__(self, name: str) -> None:
        self._name, self._bar = name, None

    def __call__(self, done: int, total: int, preview: Preview | None) -> None:
        if self._bar is None:
            self._bar = tqdm(desc=self._name, total=total, bar_format=_BAR)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _jobs(sources: list[Path], inputs: list[Path], output: Path, force: bool) -> list[tuple[Path, Path]]:
    """(source, target) pairs, refused as a whole before anything is done if one of them would destroy a file."""
    several = len(sources) > 1 or inputs[0].is_dir() or output.is_dir()
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
        if target.exists() and not force:
            raise PictureError(f"{target} exists: choose another OUT, or replace it with --force")
    return jobs


def _vectors(options: argparse.Namespace, model: InfDiT, sources: list[Path]) -> dict[Path, torch.Tensor]:
    """CLIP's vector of each picture, made before the first upscale, for CLIP's memory is free then."""
    encoder = _clip(options, model)
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
            logging.getLogger(__name__).warning(
                "this model has no CLIP input: --clip, --positive and --negative are ignored"
            )
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


def _device(name: str | None) -> torch.device:
    if name is None:
        return default_device()
    device = _known_device(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not here ({str(error).splitlines()[0]}): try cpu") from error
    return device


def _known_device(name: str) -> torch.device:
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or not (number == "" or (number.isdecimal() and len(number) < 3)):
        raise ValueError(f"device {name!r} must be cpu, cuda, cuda:1 or mps")
    return torch.device(name)


def _size(text: str) -> tuple[int, int]:
    """WxH → (height, width)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and len(width) < 8 and len(height) < 8):
        raise argparse.ArgumentTypeError(f"{text!r} must be WIDTHxHEIGHT in pixels, like 4096x2304")
    return int(height), int(width)


def _bytes(text: str) -> int:
    """4GiB, 512MiB, 1.5g → bytes."""
    match = re.fullmatch(r"([0-9.]+) *([kmgt]?)i?b?", text.strip().lower())
    if match is None or match[1].count(".") > 1 or match[1] == "." or len(match[1]) > 20:
        raise argparse.ArgumentTypeError(f"{text!r} must be an amount of memory like 4GiB or 512MiB")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


# ---- plan


def _plan(options: argparse.Namespace) -> int:
    """Print the schedule that a budget allows, its predicted memory and time, and what other budgets would give."""
    checkpoint = None if options.model is None else read_checkpoint(options.model)
    config = checkpoint.config if checkpoint else InfDiTConfig()
    defaults = checkpoint.defaults if checkpoint else SamplingDefaults()
    height, width = options.size
    device = _known_device(options.device) if options.device else default_device()
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
        return f"{memory} {_duration(seconds):>9}   {plan.group} layers × {plan.chunk} blocks; {kept}"

    print(f"{width}×{height}: {grid.blocks} blocks of {config.block_size} px, {config.num_layers} layers")
    print(f"weights {size / GIB:.3g} GiB as {str(dtype).removeprefix('torch.')}; {count} evaluations ({sampler})")
    print(f"times are rough, of a {device.type} in general; memory is exact to a few percent\n")
    print(f"{'budget':>10}  {'device':>11} {'host':>11} {'time':>9}   schedule")
    if options.budget is not None or options.device is None:
        print(f"{'free' if options.budget is None else 'asked':>10}  {outcome(options.budget)}")
    for gib in (0.5, 1, 1.5, 2, 4, 8, 16, 24, 48, 80):
        print(f"{f'{gib} GiB':>10}  {outcome(int(gib * GIB))}")
    return 0


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"


# ---- convert, info


def _convert(options: argparse.Namespace) -> int:
    existing = [path for path in (options.target, clip_path(options.target)) if path.exists()]
    if existing and not options.force:
        raise CheckpointError(existing[0], "exists already", "choose another name, or replace it with --force")
    for path in convert(options.source, options.target):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return 0


def _info(options: argparse.Namespace) -> int:
    checkpoint = read_checkpoint(options.model)
    config: InfDiTConfig = checkpoint.config
    parameters = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.tensors.values()})
    lines = {
        "file": checkpoint.path,
        "parameters": f"{parameters:,} ({', '.join(dtypes)})",
        "layers": f"{config.num_layers} of width {config.hidden_size}, {config.num_heads} heads of {config.head_dim}",
        "block": f"{config.block_size} px, patches of {config.patch_size} px, positions repeat after "
        f"{config.position_period} patches",
        "CLIP input": f"{config.vector_dim} values" if config.vector_dim else "none",
        "CLIP model": f"{len(checkpoint.clip)} tensors in the same file" if checkpoint.clip else "not in this file",
        "defaults": checkpoint.defaults,
        "provenance": checkpoint.metadata.get("provenance", "not stated"),
        "not used": "; ".join(sorted(set(checkpoint.dropped.values()))) or "nothing",
    }
    for name, text in lines.items():
        print(f"{name:12}{text}")
    if options.verify:
        print(f"{'SHA-256':12}{'matches' if checkpoint.verify() else 'none in this file: ' + _CANNOT_VERIFY}")
    return 0


_CANNOT_VERIFY = "a .pt was checked by the checksums of its zip, which say nothing of where it comes from"


# ---- bench


def _bench(options: argparse.Namespace) -> int:
    """Measure a model's pictures beside bicubic, Lanczos and noise, and hold them against limits."""
    if not options.quality and not options.without_original:
        raise ValueError("bench has nothing to measure: give --quality FOLDER or --without-original FOLDER")
    find_pictures([*options.quality, *options.without_original])  # a missing folder is not found out after an hour
    device = _device(options.device)
    model = load_model(options.model, DTYPES[options.dtype] or default_dtype(device), "cpu")
    settings = quality.Settings(
        options.steps,
        options.sampler,
        options.sigma_max,
        options.seed,
        options.budget,
        device,
        options.limit,
        options.crop,
    )
    print(f"model {options.model}")
    for folders, with_original in ((options.quality, True), (options.without_original, False)):
        for folder in folders:
            for text in quality.report(folder, model, settings, with_original, options.each):
                print(text, flush=True)
            print()
    return 0


def _steps(text: str) -> tuple[int, ...]:
    """1,4,8 → (1, 4, 8)."""
    steps = text.split(",")
    if not all(step.isdecimal() and 0 < len(step) < 6 and int(step) for step in steps):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers of steps from 1 like 1,4,8")
    return tuple(map(int, steps))


if __name__ == "__main__":
    sys.exit(main())

"""Train a small Inf-DiT on a folder of pictures: `python -m training PICTURES -o FOLDER`.

FOLDER gets state.pt (to resume), log.jsonl, best.safetensors (the averaged weights that did best on photographs held
out) and last.safetensors. With a teacher it also gets answers/, so that none is asked for twice.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import infdit
from infdit.config import InfDiTConfig
from infdit.draft import draft, sweep
from infdit.model import InfDiT
from infdit.tensorfile import CheckpointError

from . import data, tiles
from .degrade import MARGIN
from .export import DEFAULTS, bridge_defaults, export
from .gradients import Recipe
from .grow import widen
from .loop import Decay, Trainer
from .start import from_nothing
from .validate import validate

VALIDATION_CROPS = 16


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training", description="Train a small Inf-DiT on pictures.")
    parser.add_argument("pictures", type=Path, help="folder of pictures; NAME_00, NAME_v1 are crops of one photograph")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for state, log and models")
    parser.add_argument("--resume", action="store_true", help="go on from FOLDER's state; options change its recipe")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="length of the run; the learning rate reaches 0 at its end")
    length.add_argument("--minutes", type=float, help="length of the run in minutes of training, all sessions together")
    parser.add_argument("--stop-after", type=float, metavar="MINUTES", help="write the state and stop this session")
    parser.add_argument("--decay-from-now", action="store_true", help="with --resume: begin to decay at once")
    parser.add_argument("--teacher", type=Path, help="learn this network's answers (a file, see `teachers`)")
    parser.add_argument("--answers", type=Path, help="where they are kept (default: FOLDER/answers)")
    parser.add_argument("--init", help="start from this model (a file or 'mini') instead of from nothing")
    parser.add_argument("--width", type=int, help="of a model from nothing (default 128); with --init: make it so wide")
    for size, default in (("layers", 6), ("heads", 4), ("block", 32)):
        parser.add_argument(f"--{size}", type=int, default=default, help=f"of a model from nothing (default {default})")
    for name, default in asdict(Recipe()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), help=f"default {default}")
    parser.add_argument("--hold-out", type=int, default=8, help="photographs kept for validation (default 8)")
    parser.add_argument("--validate-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--save-every", type=float, default=3, metavar="MINUTES")
    parser.add_argument("--device", default=None, help="cpu or cuda; the default is what there is")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: one a core)")
    parser.add_argument("--compile", action="store_true", help="compile the layers; 12 %% less work on a CPU")
    parser.add_argument("--provenance", default="", help="a sentence for the metadata of the models")
    args = parser.parse_args(argv)
    if not args.resume and args.steps is None and args.minutes is None:
        parser.error("say how long to train: --steps N or --minutes M")
    return args


class Session:
    """One call of the command: a trainer with its files, its clock and its validation."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.output
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state_file = self.folder / "state.pt"
        if self.state_file.exists() != args.resume:
            problem = "holds no state to resume" if args.resume else "holds a run: give --resume or another folder"
            raise ValueError(f"{self.folder} {problem}")
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        saved = torch.load(self.state_file, map_location=device, weights_only=True) if args.resume else None
        given = {name: getattr(args, name) for name in asdict(Recipe()) if getattr(args, name) is not None}
        recipe = Recipe(**(saved["recipe"] if saved else {}) | given)
        model = InfDiT(InfDiTConfig(**saved["config"])) if saved else first_model(args, recipe.seed)
        if recipe.crop % model.config.block_size:
            raise ValueError(f"crop {recipe.crop} must be a multiple of the block of {model.config.block_size} pixels")
        train, held = data.split(data.find(args.pictures), args.hold_out)
        least = max(recipe.crop + 2 * MARGIN, tiles.SCALE * tiles.SIDE if args.teacher else 0)
        source = self.source(data.read(train, least), recipe)
        self.trainer = Trainer(model.to(device), recipe, source, args.workers, args.compile)
        held_out = data.read(spread(held), least)
        self.validation = {scale: data.centres(held_out, recipe.crop, scale) for scale in recipe.scales}
        self.elapsed, self.pace, self.best = 0.0, 0.0, -1e9  # seconds, seconds a step lately, dB
        self.length = (args.steps, args.minutes)
        if saved:
            self.trainer.load_state_dict(saved["trainer"])
            self.elapsed, self.best = saved["elapsed"], saved["best"]
            if not any(self.length):
                self.length = tuple(saved["length"])
            elif self.trainer.rate() == 0:  # a run that had come to its end is made longer
                self.trainer.decay = None
        self.provenance = args.provenance or (saved["provenance"] if saved else "")
        self.stop = False

    def source(self, pictures: Sequence[np.ndarray], recipe: Recipe) -> data.Source:
        """Crops of the pictures themselves, or of tiles that a teacher answers."""
        if not self.args.teacher:
            return data.Photographs(pictures)
        answers = tiles.Answers(self.args.teacher, self.args.answers or self.folder / "answers")
        return tiles.Tiles(
            pictures, answers, recipe.tiles, recipe.original, recipe.damaged, recipe.perceptual > 0, recipe.doubled
        )

    def run(self) -> None:
        """Train to the end of the run or of the session."""
        trainer, limit, before = self.trainer, self.args.stop_after, self.elapsed
        began = saved = time.monotonic()
        losses: list[float] = []
        bar = tqdm(initial=trainer.step, total=self.length[0], unit="step", smoothing=0.02)
        if trainer.step == 0:
            self.report(losses, bar)
        if self.args.decay_from_now:
            self.plan_decay(now=True)
        while not self.stop and not self.finished():
            self.plan_decay()
            mark = time.monotonic()
            losses.append(trainer.advance())
            now = time.monotonic()
            self.elapsed = before + now - began
            self.pace += (now - mark - self.pace) * (0.03 if self.pace else 1)
            bar.update()
            bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}", refresh=False)
            if trainer.step % self.args.validate_every == 0 or self.finished():
                self.report(losses, bar)
                losses = []
            elif trainer.step % 10 == 0:
                self.log(step=trainer.step, minutes=self.elapsed / 60, loss=sum(losses[-10:]) / len(losses[-10:]))
            if now - saved > 60 * self.args.save_every:
                self.save()
                saved = now
            self.stop |= limit is not None and now - began > 60 * limit
        bar.close()
        self.save()
        self.export("last")

    def finished(self) -> bool:
        """Whether the run has come to its end."""
        steps, _ = self.length
        decay, step = self.trainer.decay, self.trainer.step
        return step >= steps if steps else decay is not None and step >= decay.start + decay.length

    def plan_decay(self, now: bool = False) -> None:
        """Begin the decay in time; in a run of so many minutes, also fit its length to the speed, every 50 steps."""
        trainer, (steps, minutes) = self.trainer, self.length
        step, decay, share = trainer.step, trainer.decay, trainer.recipe.decay
        if steps:
            start = step if now else steps - int(share * steps)
            if now or (decay is None and step >= start):
                trainer.decay = Decay(start, 1.0, steps - start)
            return
        left = 60 * minutes - self.elapsed
        begin = decay is None and (now or left <= 60 * minutes * share)
        if begin or (decay is not None and step - decay.start >= 50):
            pace = self.pace or self.elapsed / max(1, step) or 1.0
            trainer.decay = Decay(step, decay.at(step) if decay else 1.0, max(1, round(left / pace)))

    def report(self, losses: list[float], bar: tqdm) -> None:
        """Validate the averaged weights, keep them if they are the best, say so."""
        began, loss = time.monotonic(), sum(losses) / max(1, len(losses))
        scores = validate(self.trainer.averaged(), self.validation, self.trainer.recipe.bridge)
        if scores["gain"] > self.best:
            self.best = scores["gain"]
            self.export("best", f" Best by validation, {self.best:+.3f} dB over bicubic.")
        self.log(
            step=self.trainer.step,
            minutes=self.elapsed / 60,
            loss=loss,
            rate=self.trainer.rate(),
            seconds_a_step=self.pace,
            validation_seconds=time.monotonic() - began,
            **scores,
        )
        told = ", ".join(f"{name} {score:.3f}" for name, score in {"loss": loss, **scores}.items())
        bar.write(f"step {self.trainer.step}, {self.elapsed / 60:.1f} min: {told}")

    def log(self, **values: float) -> None:
        """A line of the log."""
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: v if isinstance(v, int) else round(v, 6) for k, v in values.items()}) + "\n")

    def save(self) -> None:
        """Write the state beside the old one, then put it in its place."""
        trainer = self.trainer
        state = {
            "recipe": asdict(trainer.recipe),
            "config": asdict(trainer.config),
            "trainer": trainer.state_dict(),
            "elapsed": self.elapsed,
            "best": self.best,
            "length": list(self.length),
            "provenance": self.provenance,
        }
        sweep(self.folder)
        with draft(self.state_file) as part:
            torch.save(state, part)
            part.replace(self.state_file)

    def export(self, name: str, remark: str = "") -> None:
        """Write the averaged weights as NAME.safetensors."""
        trainer = self.trainer
        state = dict(zip(trainer.names, trainer.ema, strict=True))
        facts = f"{trainer.step} steps, {self.elapsed / 60:.0f} minutes, {json.dumps(asdict(trainer.recipe))}."
        told = f"{self.provenance} {facts}{remark}".strip()
        defaults = bridge_defaults(trainer.recipe.bridge, trainer.recipe.scales) if trainer.recipe.bridge else DEFAULTS
        export(self.folder / f"{name}.safetensors", state, trainer.config, told, defaults)


def first_model(args: argparse.Namespace, seed: int) -> InfDiT:
    """The model that a new run starts with, in float32."""
    if args.init:
        model = infdit.load_model(args.init, dtype=torch.float32, device="cpu")
        return widen(model, args.width, seed) if args.width else model
    config = InfDiTConfig(args.layers, args.width or 128, args.heads, 4, args.block, vector_dim=0)
    return from_nothing(config, seed)


def spread(held: list[Path]) -> list[Path]:
    """At most VALIDATION_CROPS of the pictures held out, from every photograph as evenly as may be."""
    by_photograph: dict[str, list[Path]] = {}
    for path in held:
        by_photograph.setdefault(data.photograph(path), []).append(path)
    ranked = sorted((rank, path) for paths in by_photograph.values() for rank, path in enumerate(paths))
    return sorted(path for _, path in ranked[:VALIDATION_CROPS])


def main(argv: list[str] | None = None) -> int:
    """Entry point; 2 for input that cannot be used."""
    args = arguments(argv)
    if (args.device or "cpu") == "cpu":
        torch.set_num_threads(1)  # the workers are the parallelism
    try:
        session = Session(args)

        def stop(*_: object) -> None:
            session.stop = True

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        session.run()
    except (ValueError, OSError, CheckpointError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

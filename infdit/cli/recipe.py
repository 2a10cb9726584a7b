"""What all pictures of a call have in common: model, settings, or a receipt in their place, and what CLIP says."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..checkpoint import clip_path, read_checkpoint
from ..clip import WEIGHTS, CLIPEncoder, guide, load_clip, text_direction
from ..conditioning import visible_colour
from ..memory.plan import CPU, MemoryPlan, Workload
from ..memory.planner import free_bytes
from ..model import InfDiT
from ..picture import PictureError, read_picture
from ..presets import samplings, strengths_told
from ..receipt import Receipt, ReceiptError
from ..resume import difference, model_digest
from . import DTYPES
from .jobs import read_receipt

if TYPE_CHECKING:
    from ..ranks import Peers

log = logging.getLogger(__name__)
OTHER_PLAN = "another plan than the receipt's is made, %s: pixels may differ in rounding"
# options that a receipt says itself
IN_RECEIPT = ("scale", "size", "longest", "shortest", "megapixels", "steps", "sampler", "denoise", "seed", "dtype")
IN_RECEIPT += ("positive", "negative", "strength", "preset", "fidelity", "colour_match")


@dataclass(frozen=True)
class Recipe:
    """What all pictures of a call have in common; `receipt`, where it was taken from one; `peers` share it."""

    model: InfDiT
    devices: list[torch.device]
    sampler: str
    sigmas: list[torch.Tensor]
    seed: int
    fidelity: float
    colour_match: bool
    words: str
    receipt: Receipt | None
    peers: Peers | None


def receipt_of_call(options: argparse.Namespace) -> Receipt | None:
    """The receipt to go by, whose dtype and texts become the options'.

    Raises:
        ReceiptError: one that cannot be used; options that it says itself.
    """
    if options.from_receipt is None:
        return None
    receipt = read_receipt(options.from_receipt)
    given = [name for name, value in options.own.items() if getattr(options, name) != value]
    if given:
        raise ReceiptError(f"--from-receipt says itself what --{given[0]} would: leave one of them out")
    options.dtype = next(name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{receipt.settings['dtype']}")
    options.positive, options.negative, options.strength = receipt.text
    return receipt


def recipe_of(
    options: argparse.Namespace, model: InfDiT, devices: list[torch.device], receipt: Receipt | None,
    peers: Peers | None,
) -> Recipe:
    """How the pictures of a call are made, by its options or by the receipt.

    Raises:
        ReceiptError: it is of another model.
    """
    model.digest = model_digest(model)
    if receipt is None:
        asked = options.preset, options.steps, options.sampler
        chosen = samplings(model.defaults, *asked, denoise=options.denoise)
        finish = options.fidelity, options.colour_match
        how = str(chosen[0].sampler), [one.sigmas for one in chosen], options.seed
        words = ", ".join(filter(None, (chosen[0].words, strengths_told(options.denoise))))
        return Recipe(model, devices, *how, *finish, words, None, peers)
    settings = receipt.settings
    if receipt.sha256 != model.digest:
        raise ReceiptError(
            f"{options.from_receipt}: it is of the model {receipt.model} ({receipt.sha256[:12]}…), not of "
            f"{options.model} ({model.digest[:12]}…): give that --model"
        )
    if receipt.device != devices[0].type:
        here = devices[0].type
        log.warning("the receipt is of a run on %s, not on %s: pixels may differ in rounding", receipt.device, here)
    if receipt.batch > 1 and settings["noise"]:
        log.warning("the receipt is of %d pictures made in one run: the noise is that of the first", receipt.batch)
    sigmas = [torch.tensor(levels, dtype=torch.float32, device="cpu") for levels in receipt.levels]
    finish = settings["fidelity"], settings["colour_match"]
    return Recipe(model, devices, settings["sampler"], sigmas, settings["seed"] or 0, *finish, "", receipt, peers)


def plan_of_receipt(
    receipt: Receipt, workload: Workload, digest: str, settings: dict[str, Any], options: argparse.Namespace
) -> MemoryPlan | None:
    """The plan of a receipt, if there is memory for it; says why other pixels than its come out, where they do."""
    if receipt.picture and digest != receipt.picture:
        log.warning("another picture than the receipt's is upscaled with its settings")
    elif difference(receipt.settings, settings):
        raise ReceiptError(f"{options.from_receipt}: {difference(receipt.settings, settings)} than can be had now")
    held = workload.footprint(receipt.plan)
    if options.budget is not None or held.device > free_bytes(workload.device) or held.host > free_bytes(CPU):
        log.warning(OTHER_PLAN, "for the memory there is")
        return None
    return replace(receipt.plan, peak_bytes=held.device, host_bytes=held.host, reason="the receipt's plan")


def clip_vectors(
    encoder: CLIPEncoder | None, options: argparse.Namespace, sources: list[Path]
) -> dict[Path, torch.Tensor]:
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


def clip_of_call(options: argparse.Namespace, model: InfDiT) -> CLIPEncoder | None:
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

"""One run of `infdit.upscale`: placed, watched and reported. What both Upscale nodes have in common."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..infdit import Report, upscale
from ..infdit.memory.planner import PlannedRun, format_seconds
from ..infdit.picture.notes import KEYWORD
from ..infdit.receipt import receipt_of
from ..infdit.resume import model_digest
from .clip import GuidedVector
from .comfy_memory import ManagedModel, with_weights
from .comfy_page import Bar, duration, page_language
from .report import overshoot_note, run_report, seconds_foretold
from .unfinished import kept_states
from .words import RECEIPT, in_language

MOST_TEXT = 2**14  # characters of receipts in a picture


def run_upscale(
    model: ManagedModel,
    planned: PlannedRun,
    image: Tensor,
    sigmas: Tensor,
    conditioning: GuidedVector | None,
    hidden: io.HiddenHolder,
    told: Callable[[], tuple[str, Sequence[str]]],
    resume: bool = False,
    **given: Any,  # noqa: ANN401 - seed, noise, callback: as `upscale` has them
) -> tuple[Tensor, str]:
    """The enlarged pictures, float32 on the CPU, and the report.

    Args:
        model: what upscales.
        planned: the run.
        image: (B, h, w, 3 or 4) float32 on the CPU.
        sigmas: noise levels.
        conditioning: what CLIP says, if it was asked.
        hidden: what ComfyUI says beside the inputs of the node that runs: its id, and what pictures are saved with.
        told: what is known after the run of how it was sampled, for the report: a line, and notes.
        resume: whether the states of its steps are kept, to go on from; seed, fidelity and colour_match are given then.
        given: passed on to `upscale`.
    """
    workload, network, done = planned.workload, model.network, Report()
    bar = Bar(hidden.unique_id, workload.batch)
    network.digest = model_digest(network)  # once for all runs: it may take seconds
    vectors = conditioning.vectors if conditioning is not None and model.listens else None
    work = partial(
        upscale,
        image=image,
        size=(workload.height, workload.width),
        sampler=workload.sampler,
        sigmas=sigmas,
        plan=planned,
        clip_embedding=vectors,
        progress=partial(bar.show, done),
        report=done,
        **given,
    )
    kept = kept_states(network, workload, image, sigmas, vectors, done.resumed, **given) if resume else nullcontext()
    began = time.monotonic()
    bar.tell(f"about {format_seconds(seconds_foretold(workload, planned.plan, sigmas))}")
    with kept as saved:
        result = with_weights(model, planned.plan, partial(work, resume=saved))
    seconds = time.monotonic() - began
    bar.fill()
    bar.tell(f"{workload.width}×{workload.height} in {duration(seconds)}")
    sampling, notes = told()
    lines = [*overshoot_note(image), *notes, *conditioning_lines(model, conditioning)]
    about = {"model": {"name": model.name, "sha256": network.digest}, "device": workload.device.type}
    said = {} if vectors is None or conditioning is None else conditioning.text
    receipt = receipt_of(done, seconds, **about, batch=workload.batch, text=said)
    save_with_pictures(receipt, hidden.extra_pnginfo)
    report = run_report(model.name, sampling, planned, done, seconds, lines)
    return result, f"{in_language(report, page_language())}\n{RECEIPT}{json.dumps(receipt)}"


def save_with_pictures(receipt: dict[str, Any], texts: object) -> None:
    """Have ComfyUI write a receipt into all pictures that a prompt saves from now on; of several runs a list of them.

    texts: keyword → value that becomes JSON, if the prompt has any. Every picture is saved with all of them, so what is
        long (a run of hundreds of pictures, hundreds of runs) is left out: the reports have it.
    """
    if not isinstance(texts, dict):  # from the page always; without it, as the prompt's sender likes
        return
    before = texts.get(KEYWORD)
    receipts = [*before, receipt] if isinstance(before, list) else receipt if before is None else [before, receipt]
    if len(json.dumps(receipts)) <= MOST_TEXT:
        texts[KEYWORD] = receipts


def conditioning_lines(model: ManagedModel, conditioning: GuidedVector | None) -> list[str]:
    """What CLIP told the model, or why it told it nothing."""
    if conditioning is None:
        return ["conditioning: none, zeros stand for what CLIP would tell this model"] if model.listens else []
    if not model.listens:
        return ["conditioning: ignored, this model has no CLIP input"]
    return [f"conditioning: {conditioning.description}", *(f"note: {text}" for text in conditioning.warnings)]

"""Runs with `resume` that are stopped or fail, and the same prompt once more. See drive.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
from harness import BASE, BUNDLED, PICTURES, TAKEN, case, nodes, pack, patched, prompt, run

FOLDER = BASE / "output" / "inf-dit-unfinished"


def states() -> list[str]:
    return sorted(path.name for path in FOLDER.rglob("*.state"))


@contextmanager
def disturbed(place: Any, name: str, state: str, action: Callable[[], None]) -> Iterator[None]:
    """Have an action done in the next call of a function after a state of this name was written; once."""
    function, done = getattr(place, name), []

    def spy(*args: Any, **kwargs: Any) -> Any:
        if not done and any(FOLDER.rglob(state)):
            done.append(action())
        return function(*args, **kwargs)

    with patched(place, **{name: spy}):
        yield


def bundled(picture: str, **asked: object) -> dict:
    return prompt(picture, {"model_name": BUNDLED}, steps=1, **asked)


def press() -> None:
    nodes.interrupt_processing(True)


def fail() -> None:
    raise RuntimeError("the card has fallen off the bus")


def outcome(asked: dict) -> dict:
    ended = run(asked)
    notes = [line for line in TAKEN.get("report", "").splitlines() if line.startswith("note: ")]
    return {"end": ended["end"], "notes": notes, "left": states(), "there": FOLDER.exists()}


def stopped_and_queued_again(asked: dict, state: str, action: Callable[[], None] = press) -> dict:
    """A whole run without resume, one that is stopped, and one that goes on; what differs in the pictures."""
    off = outcome(asked)
    whole = TAKEN["value"]
    asked["upscale"]["inputs"]["resume"] = True
    button, denoiser = (mm, "throw_exception_if_processing_interrupted"), (pack("infdit.denoiser"), "sweep")
    with disturbed(*(button if action is press else denoiser), state, action):
        stopped = outcome(asked)
    again = outcome(asked)
    difference = (TAKEN["value"] - whole).abs().max().item() if "value" in TAKEN else None
    return {"off": off, "stopped": stopped, "again": again, "difference": difference}


@case
def unfinished() -> dict:
    """In the middle of steps, of a batch, of passes; by the button and by an error."""
    PICTURES["six"] = PICTURES["batch"].repeat(3, 1, 1, 1)
    steps = {"steps": 6, "sampler_name": "dpmpp_2m", "seed": 80}
    return {
        "steps": stopped_and_queued_again(prompt("wide", **steps), "picture.0.state"),
        "error": stopped_and_queued_again(prompt("wide", **steps | {"seed": 81}), "picture.0.state", fail),
        "batch": stopped_and_queued_again(prompt("batch", steps=4, sampler_name="heun", seed=82), "picture.1.state"),
        "passes": stopped_and_queued_again(bundled("wide", scale=8.0), "picture.0.1.state"),
        "many": stopped_and_queued_again(bundled("six"), "picture.4.state"),
    }


@case
def unfinished_beside_another() -> dict:
    """Another seed while a run is unfinished; then its state is damaged."""
    asked = [prompt("wide", steps=5, sampler_name="euler", seed=seed, resume=True) for seed in (83, 84)]
    with disturbed(mm, "throw_exception_if_processing_interrupted", "picture.0.state", press):
        outcome(asked[0])
    other = outcome(asked[1])
    (file,) = FOLDER.rglob("*.state")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    damaged = outcome(asked[0])
    picture = TAKEN["value"]
    asked[0]["upscale"]["inputs"]["resume"] = False
    outcome(asked[0])
    return {"other": other, "damaged": damaged, "difference": (picture - TAKEN["value"]).abs().max().item()}


@case
def unfinished_without_states() -> dict:
    """A run of one step; a folder that cannot be made; one that is deleted meanwhile."""
    found = {"one step": outcome(bundled("wide", seed=85, resume=True))}
    FOLDER.write_text("in the way")
    found["in the way"] = outcome(prompt("wide", seed=86, resume=True))
    FOLDER.unlink()

    def delete() -> None:
        for path in sorted(FOLDER.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        FOLDER.rmdir()

    with disturbed(mm, "throw_exception_if_processing_interrupted", "picture.0.state", delete):
        found["deleted"] = outcome(prompt("wide", steps=5, sampler_name="euler", seed=87, resume=True))
    return found

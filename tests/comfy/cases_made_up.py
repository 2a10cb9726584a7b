"""Prompts that nobody would write, by the thousand. See drive.py."""

from __future__ import annotations

import math
import random
import time
import traceback
from typing import Any

import torch
from harness import ODD, PACK, case, prompt, run

CASES = 1000
WORDED = ("ValueError", "FileNotFoundError")  # and ComfyUI's own of a prompt's graph
LINKS = [["nobody", 0], ["give", 0], ["give", 9], ["give", -1], ["loader", 0], ["upscale", 0], [None, None]]
NUMBERS = [0, 1, 3, -1, 2**63, 2**64, 1e308, -0.5, 0.3, 2.5, math.nan, math.inf, True]
TENSORS = [torch.ones(2), torch.ones(1, 4, 4, 3), [torch.ones(1, 4, 4, 3)]]
TEXTS = ["", "0", "-1", "nan", "1e999", "x" * 4000, "scale by", "megapixels", "../../x", "a\nb", "\0", "½"]
OTHERS = [None, [], [1], [[]], {}, {"a": 1}]
INPUTS = {
    "loader": ("model_name", "dtype", "device", "devices"),
    "upscale": (
        "model", "image", "size", "size.scale", "size.width", "size.longest_side", "steps", "sampler_name", "denoise",
        "seed", "memory_budget", "mask", "fidelity", "colour_match", "preset", "transparency", "resume",
    ),
}  # fmt: skip


def changed(rng: random.Random) -> dict:
    """A prompt in which a widget or two say, or links give, what nobody would."""
    asked = prompt("pixel", scale=2)
    node = "upscale" if rng.random() < 0.9 else "loader"
    for name in rng.sample(INPUTS[node], rng.choice([1, 1, 2])):
        said: Any = rng.choice([*NUMBERS, *TEXTS, *OTHERS, *LINKS])
        if rng.random() < 0.5:
            said = [f"odd {name}", 0]
            asked[f"odd {name}"] = {"class_type": "GiveAny", "inputs": {"name": rng.choice([*ODD])}}
        asked[node]["inputs"][name] = said
        if rng.random() < 0.05:
            del asked[node]["inputs"][name]
    return asked


def ended(asked: dict) -> dict:
    """How a prompt ended; ComfyUI's validation may stumble, nothing that it reaches of ours may."""
    try:
        return run(asked)
    except Exception as error:  # noqa: BLE001
        names = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
        return {"end": "raised here" if any(PACK in name for name in names) else "stumbled", "message": repr(error)}


@case
def made_up() -> dict:
    """All that end in neither a picture nor words, or not soon; and how often which end came."""
    rng, found, ends = random.Random(0), [], dict[str, int]()
    ODD.update({f"made up {i}": value for i, value in enumerate([*NUMBERS, *TEXTS, *OTHERS, *TENSORS, b"", object()])})
    for number in range(CASES):
        asked, began = changed(rng), time.monotonic()
        end = ended(asked)
        ends[end["end"]] = ends.get(end["end"], 0) + 1
        said, kind = end.get("message", "").strip(), end.get("type", "")
        words = "\n" not in said and (kind in WORDED or "infdit" in kind or kind.startswith("graph."))
        if not (words if end["end"] == "error" else end["end"] != "raised here") or time.monotonic() - began > 10:
            found.append([number, {name: asked[name]["inputs"] for name in asked if "take" not in name}, end])
    return {"found": found, "ends": ends, "after": run(prompt("pixel"))["end"]}

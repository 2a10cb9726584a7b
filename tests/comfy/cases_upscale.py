"""What Inf-DiT Upscale does: pictures, sizes, masks, refusals, the bar and the stop button. See drive.py."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import comfy.model_management as mm
import folder_paths
import numpy as np
import torch
from harness import (
    BASE,
    BUNDLED,
    NETWORK,
    NOISY,
    PACK,
    PACK_DIR,
    PICTURES,
    TAKEN,
    case,
    facts,
    library,
    load_pack,
    load_prompt,
    nodes,
    pack,
    patched,
    prompt,
    run,
    valid,
)
from PIL import Image


@case
def importing() -> dict:
    """What importing the pack drags in, and what it does to a model folder that the user has set up already."""
    elsewhere = BASE / "elsewhere"
    elsewhere.mkdir()
    mini = PACK_DIR / "infdit" / "weights" / "mini.safetensors"
    shutil.copy(mini, elsewhere / "mine.safetensors")
    (elsewhere / "note.txt").write_text("not a model")
    folder_paths.add_model_folder_path("infdit", str(elsewhere))
    folder_paths.folder_names_and_paths["infdit"][1].add(".odd")
    before, reached = set(sys.modules), len(NETWORK)
    began = time.perf_counter()
    loaded = load_pack()
    seconds = time.perf_counter() - began
    paths, extensions = folder_paths.folder_names_and_paths["infdit"]
    tops = {name.split(".")[0] for name in set(sys.modules) - before if not name.startswith(PACK)}
    return {
        "loaded": loaded,
        "seconds": seconds,
        "network": NETWORK[reached:],
        "modules": sorted(tops),
        "open_clip": "open_clip" in sys.modules,
        "folders": [os.path.relpath(p, BASE) for p in paths],
        "extensions": sorted(extensions),
        "listed": folder_paths.get_filename_list("infdit"),
    }


@case
def equal() -> dict:
    """The node's picture beside the library's."""
    infdit = library()
    found = {}
    cases: dict[str, tuple[dict, tuple[int, int] | None]] = {
        "bundled": ({"steps": 0, "sampler_name": "auto", "seed": 3}, None),
        "small": ({"steps": 2, "sampler_name": "heun", "seed": 7}, None),
        "batch": ({"steps": 1, "sampler_name": "euler", "seed": 2**64 - 1}, None),
        "alpha": ({"steps": 3, "sampler_name": "dpmpp_2m", "denoise": 0.6}, None),
        "pixel": ({"steps": 0, "sampler_name": "auto"}, None),
        "wide": ({"size": "width and height", "size.width": 0, "size.height": 61, "steps": 1}, (61, 153)),
    }
    for name, (asked, target) in cases.items():
        picture, file = ("small", BUNDLED) if name == "bundled" else (name, NOISY)
        path = "mini" if file == BUNDLED else BASE / "models" / "infdit" / NOISY
        model = infdit.load_model(path, dtype=torch.float32, device="cpu")
        kept = PICTURES[picture].clone()
        ended = run(prompt(picture, {"model_name": file}, **asked))
        settings = prompt(picture, **asked)["upscale"]["inputs"]
        automatic = settings["sampler_name"] == "auto"
        expected = infdit.upscale(
            model,
            kept,
            size=target,
            steps=settings["steps"] or None,
            sampler=None if automatic else settings["sampler_name"],
            denoise=settings["denoise"],
            seed=settings["seed"],
        )
        image = TAKEN.get("value")
        if image is None:
            found[name] = ended
            continue
        same = image.shape == expected.shape
        found[name] = facts(image) | {
            "end": ended["end"],
            "expected_shape": list(expected.shape),
            "difference": (image - expected).abs().max().item() if same else None,
            "untouched": torch.equal(kept, PICTURES[picture]),
            "contrast": expected.std().item(),
        }
    return found


@case
def half_picture() -> dict:
    """A picture of half precision, which ComfyUI may hand out, and may want to have (since 0.18)."""
    found = run(prompt("half")) | facts(TAKEN["value"])
    if hasattr(mm, "intermediate_dtype"):
        with patched(mm, intermediate_dtype=lambda: torch.float16):
            run(prompt("half", steps=1, sampler_name="euler"))
        found["wanted"] = [str(TAKEN[name].dtype) for name in ("value", "mask")]
    return found


@case
def seeds() -> dict:
    """The largest seed, the one before it, and the largest once more."""
    pictures = []
    for seed in (2**64 - 1, 2**64 - 2, 2**64 - 1):
        run(prompt("pixel", seed=seed))
        pictures.append(TAKEN["value"])
    first, other, again = pictures
    return {"other": (first - other).abs().max().item(), "again": (first - again).abs().max().item()}


@case
def sizes() -> dict:
    """What each way to say a size makes of pictures, (height, width) in and out; the sentence where it cannot be."""
    result_size = pack("nodes.size").result_size
    asked = [
        ("scale by", {"scale": 4.0}, (9, 12)),
        ("scale by", {"scale": 1.5}, (3, 5)),  # 4.5 and 7.5 are rounded up
        ("width and height", {"width": 100, "height": 0}, (30, 40)),
        ("width and height", {"width": 0, "height": 100}, (30, 40)),
        ("width and height", {"width": 41, "height": 120}, (30, 40)),
        ("longest side", {"longest_side": 100}, (40, 30)),
        ("longest side", {"longest_side": 160}, (40, 1)),
        ("megapixels", {"megapixels": 1.0}, (512, 512)),
        ("megapixels", {"megapixels": 0.25}, (200, 300)),
        ("scale by", {"scale": 1.01}, (10, 10)),
        ("width and height", {"width": 0, "height": 0}, (30, 40)),
        ("width and height", {"width": 161, "height": 0}, (30, 40)),
        ("width and height", {"width": 80, "height": 29}, (30, 40)),
        ("longest side", {"longest_side": 40}, (30, 40)),
        ("megapixels", {"megapixels": 16.0}, (1000, 1000)),
        ("twice", {}, (30, 40)),
    ]
    found: dict[str, Any] = {}
    for way, inputs, (height, width) in asked:
        try:
            outcome: object = result_size({"size": way, **inputs}, height, width)
        except ValueError as error:
            outcome = str(error)
        found[f"{way} {inputs} of {height}x{width}"] = outcome
    shapes = []
    for said in ({"size": "longest side", "size.longest_side": 100}, {"size": "megapixels", "size.megapixels": 0.01}):
        ended = run(prompt("wide", steps=1, **said))
        shapes.append(list(TAKEN["value"].shape) if "value" in TAKEN else ended)
    return {"asked": found, "through the node": shapes}


@case
def masks() -> dict:
    """The mask that comes out, for what goes in; differences from what Pillow makes of it."""
    PICTURES["mask"] = PICTURES["wide"][..., 0].clone()  # (1, 24, 60): of another size than the picture
    PICTURES["masks"] = PICTURES["batch"][..., 0].clone()
    PICTURES["flat mask"] = PICTURES["masks"][0].clone()
    PICTURES["half mask"] = PICTURES["mask"].half()
    PICTURES["no mask"] = torch.zeros(1, 0, 0)
    found: dict[str, Any] = {}
    for name, picture, mask in (
        ("given", "small", "mask"),
        ("several", "batch", "masks"),
        ("flat", "small", "flat mask"),
        ("half", "small", "half mask"),
        ("beside alpha", "alpha", "mask"),
        ("alpha", "alpha", None),
        ("none", "batch", None),
        ("empty", "small", "no mask"),
    ):
        asked = prompt(picture, steps=1, sampler_name="euler")
        if mask is not None:
            asked["mask"] = {"class_type": "Give", "inputs": {"name": mask}}
            asked["upscale"]["inputs"]["mask"] = ["mask", 1]
        ended = run(asked)
        found[name] = {key: ended[key] for key in ("end", "message", "type")}
        if ended["end"] != "success":
            continue
        image, result = TAKEN["value"], TAKEN["mask"]
        expected = torch.zeros(image.shape[:3])
        if mask is not None:
            planes = PICTURES[mask].float().reshape(-1, *PICTURES[mask].shape[-2:])
            side = image.shape[2], image.shape[1]
            lanczos = [Image.fromarray(plane.numpy()).resize(side, Image.Resampling.LANCZOS) for plane in planes]
            expected = torch.from_numpy(np.stack([np.array(plane) for plane in lanczos])).clamp(0, 1)
        elif picture == "alpha":
            expected = 1 - image[..., 3]
        same = result.shape == expected.shape
        found[name] |= facts(result) | {
            "image": list(image.shape),
            "difference": (result - expected).abs().max().item() if same else None,
        }
    return found


@case
def reports() -> dict:
    """What a run says of itself: alone, and of several pictures with a budget."""
    found = {}
    for name, picture, asked in (
        ("plain", "small", {"steps": 3, "sampler_name": "euler", "seed": 5}),
        ("budget", "batch", {"memory_budget": 0.02, "denoise": 0.5}),
        ("none", "small", {"denoise": 0.0}),
        ("bundled", "small", {"steps": 4, "sampler_name": "euler", "seed": 5}),
    ):
        file = BUNDLED if name == "bundled" else NOISY
        ended = run(prompt(picture, {"model_name": file}, **asked))
        found[name] = {"end": ended["end"], "report": TAKEN.get("report", ended["message"])}
    return found


@case
def bar() -> dict:
    """The bar and its pictures over four steps, and what is written on the node."""
    with told_on_nodes() as told:
        ended = run(prompt("wide", steps=4, sampler_name="euler", seed=21))
    return ended | {"told": told}


@contextmanager
def told_on_nodes() -> Iterator[list[tuple]]:
    """(text, node) of all that a server would have been given to write on nodes."""
    told: list[tuple] = []
    instance = SimpleNamespace(send_progress_text=lambda text, node: told.append((text, node)))
    server = sys.modules.get("server")
    sys.modules["server"] = SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))  # pyright: ignore
    try:
        yield told
    finally:
        if server is None:
            del sys.modules["server"]
        else:
            sys.modules["server"] = server


@case
def interrupt() -> dict:
    """Stop at the fifth look at the button; then the same prompt once more, undisturbed."""
    asked = {"steps": 4, "sampler_name": "euler", "seed": 22}
    look, looks = mm.throw_exception_if_processing_interrupted, [0]

    def fifth() -> None:
        looks[0] += 1
        if looks[0] == 5:
            nodes.interrupt_processing(True)
        look()

    def press() -> None:
        mm.throw_exception_if_processing_interrupted = fifth

    with told_on_nodes() as told:
        stopped = run(prompt("wide", **asked), press)
    stopped_after = looks[0]
    looks[0] = 5
    whole = run(prompt("wide", **asked))
    mm.throw_exception_if_processing_interrupted = look
    return {
        "stopped": stopped["end"],
        "looks": stopped_after,
        "told": told[-1:],
        "whole": whole["end"],
        "looks_in_whole": looks[0] - 5,
        "shape": list(TAKEN["value"].shape),
    }


@case
def limits() -> dict:
    """Inputs at the limits and just beyond them: accepted or not by ComfyUI's validation."""
    sides = {"size": "width and height", "size.width": 8, "size.height": 8}
    longest, area = {"size": "longest side"}, {"size": "megapixels"}
    beyond: list[dict] = [
        {"scale": 1.0},
        {"scale": 4.01},
        {"scale": "large"},
        sides | {"size.width": -1},
        sides | {"size.width": 65537},
        sides | {"size.height": -1},
        sides | {"size.height": 65537},
        {"size": "width and height", "size.width": 8},
        longest | {"size.longest_side": 0},
        longest | {"size.longest_side": 65537},
        area | {"size.megapixels": 0.0},
        area | {"size.megapixels": 4096.1},
        {"steps": -1},
        {"steps": 1001},
        {"sampler_name": "euler_ancestral"},
        {"sampler_name": ""},
        {"denoise": -0.01},
        {"denoise": 1.01},
        {"seed": -1},
        {"seed": 2**64},
        {"memory_budget": -0.1},
        {"memory_budget": 64.1},
    ]
    within: list[dict] = [
        {"scale": 1.01},
        {"scale": 4.0},
        sides | {"size.width": 0},
        sides | {"size.height": 65536},
        longest | {"size.longest_side": 1},
        longest | {"size.longest_side": 65536},
        area | {"size.megapixels": 0.01},
        area | {"size.megapixels": 4096.0},
        {"steps": 0},
        {"steps": 1000},
        {"denoise": 0.0},
        {"denoise": 1.0},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"memory_budget": 0.0},
        {"memory_budget": 64.0},
    ]
    loaders = [{"model_name": "../../secret.pt"}, {"dtype": "int8"}]
    return {
        "beyond": {str(inputs): valid(prompt(**inputs)) for inputs in beyond}
        | {str(inputs): valid(load_prompt(**inputs)) for inputs in loaders},
        "within": {str(inputs): valid(prompt(**inputs)) for inputs in within},
    }


@case
def refusals() -> dict:
    """Inputs that only the run itself can refuse: how it ends, in which words, and whether it loads weights first."""
    PICTURES["empty"] = torch.zeros(0, 8, 8, 3)
    PICTURES["nan"] = torch.full((1, 8, 8, 3), math.nan)
    PICTURES["grey"] = torch.rand(1, 8, 8, 1)
    cases = {
        "empty batch": prompt("empty"),
        "not finite": prompt("nan"),
        "one channel": prompt("grey"),
        "pixel by 1.01": prompt("pixel", scale=1.01),
        "too large": prompt("small", size="longest side", **{"size.longest_side": 4096}),
        "no size": prompt("small", size="thrice"),
    }
    found = {}
    for name, asked in cases.items():
        mm.unload_all_models()
        ended = run(asked)
        found[name] = {key: ended.get(key) for key in ("end", "message", "type")}
        found[name]["loaded"] = len(mm.current_loaded_models)
    unsaid = prompt("small")
    for name in ("size", "size.scale"):
        del unsaid["upscale"]["inputs"][name]
    found["size unsaid"] = {key: run(unsaid).get(key) for key in ("end", "message", "type")} | {"loaded": 0}
    return found


@case
def least_denoise() -> dict:
    """denoise 0 and the smallest scale run."""
    ended = run(prompt("wide", denoise=0.0, scale=1.01))
    return ended | facts(TAKEN["value"])

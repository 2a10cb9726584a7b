"""What Inf-DiT Upscale does: pictures, sizes, masks, refusals, the bar and the stop button. See drive.py."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import comfy.model_management as mm
import folder_paths
import numpy as np
import torch
from harness import (
    BAR,
    BASE,
    BUNDLED,
    NETWORK,
    NOISY,
    ODD,
    PACK,
    PACK_DIR,
    PICTURES,
    TAKEN,
    case,
    facts,
    give,
    library,
    load_pack,
    load_prompt,
    loader,
    nodes,
    pack,
    patched,
    prompt,
    run,
    size,
    take,
    valid,
)
from PIL import Image
from safetensors.torch import load_file, save_file


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
        ("scale by", {"scale": 8.0}, (10, 10)),
        ("scale by", {"scale": 18.0}, (10, 10)),
        ("longest side", {"longest_side": 8192}, (400, 300)),
        ("megapixels", {"megapixels": 1.0}, (1, 1)),
        ("width and height", {"width": 0, "height": 0}, (30, 40)),
        ("width and height", {"width": 641, "height": 0}, (30, 40)),
        ("width and height", {"width": 80, "height": 29}, (30, 40)),
        ("longest side", {"longest_side": 40}, (30, 40)),
        ("longest side", {"longest_side": 39}, (30, 40)),
        ("megapixels", {"megapixels": 250.0}, (1000, 1000)),
        ("twice", {}, (30, 40)),
    ]
    found: dict[str, Any] = {}
    for way, inputs, (height, width) in asked:
        found[f"{way} {inputs} of {height}x{width}"] = result_or_reason({"size": way, **inputs}, height, width)
    shapes = []
    for said in ({"size": "longest side", "size.longest_side": 100}, {"size": "megapixels", "size.megapixels": 0.01}):
        ended = run(prompt("wide", steps=1, **said))
        shapes.append(list(TAKEN["value"].shape) if "value" in TAKEN else ended)
    return {"asked": found, "through the node": shapes}


SDXL = ((1024, 1024), (1152, 896), (1216, 832), (1344, 768), (1536, 640))


@case
def size_defaults() -> dict:
    """What each way to say a size makes of SDXL's pictures at its own default: (height, width), or why not."""
    module, found = pack("nodes.size"), {}
    for option, (long, short) in itertools.product(module.size_input().options, SDXL):
        said = {"size": option.key} | {widget.id: widget.default for widget in option.inputs}
        for height, width in ((long, short), (short, long)):
            found[f"{option.key} of {height}x{width}"] = result_or_reason(said, height, width)
    return found


@case
def size_numbers() -> dict:
    """Sizes at random: of those that are refused, whether the number that the sentence says to type works."""
    rng, found = random.Random(4), []
    ranges = {"scale by": (0.5, 24.0), "longest side": (1, 36000), "megapixels": (0.01, 320)}
    for _ in range(3000):
        way = rng.choice([*ranges, "width and height"])
        height, width = (rng.choice((1, 7, 100, 333, 640, 1000, 1536, 2048)) for _ in range(2))
        said: dict[str, Any] = {"size": way}
        if way == "width and height":
            said |= {"width": rng.choice((0, rng.randint(1, 36000))), "height": rng.choice((0, rng.randint(1, 36000)))}
        else:
            name = {"scale by": "scale", "longest side": "longest_side"}.get(way, way)
            low, high = ranges[way]
            said[name] = rng.randint(low, high) if isinstance(low, int) else round(rng.uniform(low, high), 2)
        outcome = result_or_reason(said, height, width)
        told = []
        while isinstance(outcome, str) and (typed := re.search(r"(\w+) \S+ is too \w+: type ([\d.]+) at", outcome)):
            told.append(outcome)
            said[typed[1]] = float(typed[2])
            outcome = result_or_reason(said, height, width)
            if len(told) > 2:
                break
        found.append({"told": told, "said": said, "of": [height, width], "outcome": outcome})
    return {"tried": found}


def result_or_reason(said: dict, height: int, width: int) -> object:
    try:
        return pack("nodes.size").result_size(said, height, width)
    except ValueError as error:
        return str(error)


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
    PICTURES["sharp"] = torch.rand((1, 32, 32, 3), generator=torch.Generator().manual_seed(5))
    for name, picture, asked in (
        ("plain", "small", {"steps": 3, "sampler_name": "euler", "seed": 5}),
        ("budget", "batch", {"memory_budget": 0.02, "denoise": 0.5}),
        ("one step", "small", {"steps": 1, "sampler_name": "euler", "seed": 5}),
        ("none", "small", {"denoise": 0.0}),
        ("bundled", "small", {"steps": 4, "sampler_name": "euler", "seed": 5}),
        ("bundled, sharp", "sharp", {"size.scale": 1.0}),
    ):
        file = BUNDLED if name.startswith("bundled") else NOISY
        ended = run(prompt(picture, {"model_name": file}, **asked))
        found[name] = {"end": ended["end"], "report": TAKEN.get("report", ended["message"])}
    return found


@case
def presets() -> dict:
    """A model of many steps, with levels that were tuned to it, under each preset: beside the library, and reports."""
    defaults = {"steps": 4, "sampler": "heun", "sigma_max": 0.1, "sigma_min": 0.01}
    defaults |= {"tuned": [[0.1 * 0.75**i for i in range(8)]]}
    metadata = {"config": json.dumps({"position_period": 1024}), "defaults": json.dumps(defaults)}
    path = BASE / "models" / "infdit" / "tuned.safetensors"
    save_file(load_file(PACK_DIR / "infdit" / "weights" / "mini.safetensors"), path, metadata)
    infdit, found = library(), {}
    model = infdit.load_model(path, dtype=torch.float32, device="cpu")
    for preset in ("paper", "balanced", "draft"):
        asked = {"steps": 0, "sampler_name": "auto", "preset": preset}
        ended = run(prompt("small", {"model_name": path.name}, **asked))
        expected = infdit.upscale(model, PICTURES["small"], preset=preset, seed=7)
        image = TAKEN.get("value", torch.zeros(()))
        difference = (image - expected).abs().max().item()
        found[preset] = {"message": ended["message"], "report": TAKEN.get("report", ""), "difference": difference}
    return found


@case
def bar() -> dict:
    """The bar and its pictures over four steps, and what is written on the node."""
    with told_on_nodes() as told:
        ended = run(prompt("wide", steps=4, sampler_name="euler", seed=21))
    return ended | {"told": told}


@case
def several_told() -> dict:
    """What is written on the node while three pictures are enlarged."""
    PICTURES["three"] = PICTURES["wide"].repeat(3, 1, 1, 1)
    with told_on_nodes() as told, patched(pack("nodes.comfy_page"), TEXT_INTERVAL=0, BAR_INTERVAL=0):
        ended = run(prompt("three", steps=1, sampler_name="euler", seed=23))
    return {"end": ended["end"], "told": told}


@case
def failed_after_success() -> dict:
    """What is written on a node that has run, fails, and runs again; and on one that fails to load."""
    found = []
    with told_on_nodes() as told:
        for seed, side in ((24, 100), (25, 9000), (26, 100)):
            told.clear()
            run(prompt("wide", steps=1, seed=seed, size="longest side", **{"size.longest_side": side}))
            found.append(list(told))
        told.clear()
        (BASE / "models" / "infdit" / "damaged.safetensors").write_bytes(b"no such thing")
        failed = run(load_prompt(model_name="damaged.safetensors"))
    return {"told": found, "loader": list(told), "message": failed["message"]}


@case
def rejected() -> dict:
    """What is written on nodes of prompts that ComfyUI does not even begin, and what ComfyUI says."""
    clip = {"c": {"class_type": "InfDiTCLIPLoader", "inputs": {"clip_name": "nowhere.bin"}}}
    plan = {"width": 8, "height": 8, "memory_budget": 2000, **size({}), "model": ["loader", 0]}
    asked = {
        "model": load_prompt(model_name="nowhere.safetensors"),
        "clip": clip | {"take": take("INFDIT_CLIP", "c", 0)},
        "budget": prompt(memory_budget=-1),
        "plan": {"loader": loader(), "plan": {"class_type": "InfDiTMemoryPlan", "inputs": plan}},
    }
    found = {}
    for name, what in asked.items():
        with told_on_nodes() as told:
            ended = run(what)
        found[name] = {"end": ended["end"], "told": list(told), "message": ended["message"]}
    return found


@case
def pace() -> dict:
    """What is written on a node after the first of 10000 moves, and after some more."""
    page, report = pack("nodes.comfy_page"), library().Report()
    bar, found = page.Bar("node"), []
    with told_on_nodes() as told, patched(page, TEXT_INTERVAL=0, BAR_INTERVAL=0):
        for doing, done in (("preparing", 500), ("sampling", 501), ("sampling", 700)):
            report.doing = doing
            time.sleep(0.01)
            bar.show(report, done, 10000, None)
            found.append(told[-1][0])
    return {"told": found}


@case
def no_live_picture() -> dict:
    """Live pictures with --preview-method none, with auto, and with auto where the page's setting says none."""
    args, methods = pack("nodes.comfy_page").args, pack("nodes.comfy_page").LatentPreviewMethod
    found = {}
    for name, words, method in (
        ("none", ["--preview-method", "none"], methods.NoPreviews),
        ("auto", ["--preview-method=auto"], methods.Auto),
        ("page", ["--preview-method", "auto"], methods.NoPreviews),
    ):
        previews, bar = pack("nodes.comfy_page").wants_pictures, pack("nodes.comfy_page").Bar()
        with patched(sys, argv=["main.py", *words]), patched(args, preview_method=method):
            BAR.clear()
            bar.show(library().Report(), 1, 2, lambda: torch.zeros(4, 4, 3, dtype=torch.uint8))
            found[name] = [previews(), [move[3] is not None for move in BAR]]
    return found


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
def several_devices() -> dict:
    """The processor as two devices: the same bits, one bar, a stop, memory that runs out; names that are no devices."""
    PICTURES["long"] = PICTURES["wide"].repeat(1, 2, 2, 1)
    asked = {"steps": 2, "sampler_name": "euler", "seed": 93}
    run(prompt("long", **asked))
    alone = TAKEN["value"]
    both = run(prompt("long", {"devices": "cpu, cpu"}, **asked))
    found = {"end": both["end"], "report": TAKEN["report"], "bar": [move[1:3] for move in both["bar"]]}
    found["difference"] = (TAKEN["value"] - alone).abs().max().item()
    layer, times = pack("infdit.model").Layer, [0]
    forward = layer.forward

    def at_the(number: int, act: Callable[[], None]) -> Callable:
        times[0] = 0

        def computed(*given: Any) -> Any:
            times[0] += 1
            if times[0] == number:
                act()
            return forward(*given)

        return computed

    def full() -> None:
        raise RuntimeError("CUDA out of memory")

    stop = at_the(7, lambda: nodes.interrupt_processing(True))
    with patched(layer, forward=stop):
        found["stopped"] = run(prompt("long", {"devices": "cpu,cpu"}, **asked | {"seed": 94}))["end"]
    with patched(layer, forward=at_the(7, full)):
        found["out of memory"] = run(prompt("long", {"devices": "cpu,cpu"}, **asked | {"seed": 95}))["end"]
    lines = TAKEN.get("report", "").splitlines()
    found["replanned"] = [line for line in lines if line.startswith("note: out of memory")]
    refused = {name: run(load_prompt(devices=name)) for name in ("cuda:7", "nothing", "cpu,,cpu")}
    return found | {"refused": {name: ended["message"] for name, ended in refused.items()}}


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
        {"scale": 0.99},
        {"scale": 16.01},
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
        {"memory_budget": float("nan")},
        {"memory_budget": 1024.1},
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
    PICTURES["bytes"] = torch.full((1, 8, 8, 3), 200, dtype=torch.uint8)
    PICTURES["endless"] = torch.zeros(1, 1, 1, 3).expand(1, 2**20, 2**20, 3)  # 12 TiB to whoever copies it
    PICTURES["two channels"] = PICTURES["small"][..., :2]
    PICTURES["to 255"] = PICTURES["small"] * 255
    PICTURES["nan mask"] = torch.full((1, 8, 8), math.nan)
    PICTURES["mask to 255"] = torch.full((1, 8, 8), 255.0)
    PICTURES["nothing"], PICTURES["list"] = None, [PICTURES["small"]]  # pyright: ignore[reportArgumentType]
    ODD.update(none=None, way="scale by", below=-1.0, text="4", half=2.5, list=[1])
    cases = {
        "empty batch": prompt("empty"),
        "not finite": prompt("nan"),
        **{name: prompt(name) for name in ("bytes", "to 255", "nothing", "list", "two channels", "endless")},
        **{f"mask: {name}": masked(name) for name in ("nan mask", "mask to 255", "nothing", "list")},
        "link into size": linked(size="way"),
        "nothing into size": linked(size="none"),
        "scale none": linked(**{"size.scale": "none"}),
        "scale text": linked(**{"size.scale": "text"}),
        "budget below": linked(memory_budget="below"),
        "budget none": linked(memory_budget="none"),
        "half steps": linked(steps="half"),
        "denoise below": linked(denoise="below"),
        "seed list": linked(seed="list"),
        "no sampler": linked(sampler_name="text"),
        "too small": prompt("small", size="longest side", **{"size.longest_side": 5}),
        "too large": prompt("small", size="longest side", **{"size.longest_side": 4096}),
        "no size": prompt("small", size="thrice"),
    }
    found = {}
    for name, asked in cases.items():
        mm.unload_all_models()
        ended = run(asked)
        found[name] = {key: ended.get(key) for key in ("end", "message", "type")}
        found[name]["loaded"] = len(mm.current_loaded_models)
    for name, said in (("size unsaid", {}), ("size nested", {"size": {"size": "scale by", "scale": 2}})):
        unsaid = prompt("small")
        for key in ("size", "size.scale"):
            del unsaid["upscale"]["inputs"][key]
        unsaid["upscale"]["inputs"] |= said
        found[name] = {key: run(unsaid).get(key) for key in ("end", "message", "type")} | {"loaded": 0}
    return found


def masked(name: str) -> dict:
    """A prompt with a mask out of PICTURES."""
    asked = prompt("small")
    asked["mask"] = give(name)
    asked["upscale"]["inputs"]["mask"] = ["mask", 1]
    return asked


def linked(**inputs: str) -> dict:
    """A prompt in which inputs come by links, out of ODD."""
    asked = prompt("small")
    for name, odd in inputs.items():
        asked[f"odd {name}"] = {"class_type": "GiveAny", "inputs": {"name": odd}}
        asked["upscale"]["inputs"][name] = [f"odd {name}", 0]
    return asked


@case
def taken_as_they_are_meant() -> dict:
    """Pictures of one channel, values that overshoot, and links with numbers that fit: beside what they stand for."""
    grey, over = PICTURES["small"][..., :1], PICTURES["small"] * 1.4 - 0.2
    ODD.update(two=2, third=1 / 3)
    PICTURES.update({"grey": grey, "three greys": grey.expand(-1, -1, -1, 3).contiguous()})
    PICTURES.update({"over": over, "clipped": over.clamp(0, 1)})
    pairs = {
        "grey": (prompt("grey"), prompt("three greys")),
        "over": (prompt("over"), prompt("clipped")),
        "linked": (linked(steps="two", denoise="third", **{"size.scale": "two"}), prompt(denoise=1 / 3, scale=2)),
    }
    found = {}
    for name, (odd, meant) in pairs.items():
        ends, pictures, reports = [], [], []
        for asked in (odd, meant):
            ends.append(run(asked)["end"])
            pictures.append(TAKEN.get("value"))
            reports.append(TAKEN.get("report", ""))
        found[name] = {"ends": ends, "reports": reports}
        if ends == ["success", "success"]:
            found[name] |= {"difference": (pictures[0] - pictures[1]).abs().max().item()}
    return found


@case
def least_denoise() -> dict:
    """denoise 0 and the smallest scale run."""
    ended = run(prompt("wide", denoise=0.0, scale=1.01))
    return ended | facts(TAKEN["value"])

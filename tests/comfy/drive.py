"""Drives the nodes through ComfyUI's own validator and executor, in one process and without a server.

    python drive.py COMFYUI BASE FINDINGS.json

Run by conftest.py with ComfyUI's Python. Each function marked @case gives a dictionary of what it found; the tests
decide what is right. BASE has this pack in custom_nodes.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

COMFYUI, BASE, FINDINGS = (Path(a).absolute() for a in sys.argv[1:4])
PACK_DIR = next((BASE / "custom_nodes").iterdir())
PACK = str(PACK_DIR).replace(".", "_x_")  # the name under which ComfyUI imports it
NETWORK: list[str] = []  # everything that was connected to or looked up
CASES: dict[str, Callable[[], dict]] = {}


def watch_network(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        NETWORK.append(f"{event} {arguments[-2:]}")


sys.addaudithook(watch_network)
sys.argv = ["main.py", "--cpu", "--base-directory", str(BASE)]
sys.path[0] = str(COMFYUI)
os.chdir(COMFYUI)

import comfy.options  # noqa: E402 - flags first: ComfyUI reads them while it is imported

comfy.options.enable_args_parsing()
import comfy.model_management as mm  # noqa: E402
import comfy.utils  # noqa: E402
import execution  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402

nodes = importlib.import_module("nodes")  # ComfyUI's nodes.py; a plain import would read as this pack's nodes/

# ---- what stands in for a picture's source and destination, and for the server

PICTURES: dict[str, torch.Tensor] = {}
TAKEN: dict[str, Any] = {}


class Give:
    """A node that hands out PICTURES[name]."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "give", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 - ComfyUI's name
        return {"required": {"name": ("STRING", {})}}

    def give(self, name: str) -> tuple:
        return (PICTURES[name],)


class Take:
    """A node that keeps what it is given in TAKEN["value"]."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE, TYPE = (), "take", "test", True, "IMAGE"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {"required": {"value": (cls.TYPE, {})}}

    @classmethod
    def IS_CHANGED(cls, value: object) -> float:  # noqa: N802
        return float("nan")  # never equal to itself: it runs every time

    def take(self, value: object) -> tuple:
        TAKEN["value"] = value
        return ()


class TakeModel(Take):
    TYPE = "INFDIT_MODEL"


class Server:
    """What the executor wants of a server."""

    client_id, last_node_id, last_prompt_id = "drive", None, "p"

    def __init__(self) -> None:
        self.sockets_metadata: dict = {}
        self.sent: list[tuple] = []

    def send_sync(self, event: object, data: object, sid: object = None) -> None:
        self.sent.append((event, data))


SERVER = Server()
EXECUTOR: list[execution.PromptExecutor] = []
BAR: list[tuple] = []


def on_bar(value: int, total: int, preview: tuple | None, prompt_id: object = None, node_id: object = None) -> None:
    picture = None if preview is None else [preview[0], preview[1].mode, *preview[1].size, preview[2]]
    BAR.append((time.monotonic(), value, total, picture))


async def load_pack() -> bool:
    await nodes.init_public_apis()
    return await nodes.load_custom_node(str(PACK_DIR))


def run(prompt: dict, before: Callable[[], None] | None = None) -> dict:
    """Validate and execute: how it ended, with the message of an error, the nodes that ran and the bar's moves."""
    prompt = copy.deepcopy(prompt)  # ComfyUI writes into it
    ok, error, outputs, node_errors = asyncio.run(execution.validate_prompt("p", prompt, None))
    if not ok:
        return {"end": "rejected", "message": json.dumps([error, node_errors], default=str)}
    if before is not None:
        before()
    if not EXECUTOR:
        sizes = {"lru": 0, "ram": 0, "ram_inactive": 0}
        EXECUTOR.append(execution.PromptExecutor(SERVER, cache_type=execution.CacheType.CLASSIC, cache_args=sizes))
    for kept in (SERVER.sent, BAR, TAKEN):
        kept.clear()
    EXECUTOR[0].execute(prompt, "p", {"client_id": "drive"}, outputs)
    messages = {event: data for event, data in SERVER.sent if isinstance(event, str)}
    end = next(e for e in ("execution_error", "execution_interrupted", "execution_success") if e in messages)
    ran = [d["node"] for e, d in SERVER.sent if e == "executing" and d["node"]]
    failure = messages.get("execution_error", {})
    return {
        "end": end.removeprefix("execution_"),
        "message": failure.get("exception_message", ""),
        "type": failure.get("exception_type", ""),
        "ran": ran,
        "bar": list(BAR),
    }


def prompt(picture: str = "small", loader: dict | None = None, **changes: object) -> dict:
    """Loader and Upscale between Give and Take, float32, everything said."""
    loading = {"model_name": "mini (bundled)", "dtype": "fp32"} | (loader or {})
    asked = {"scale": 4.0, "steps": 2, "sampler_name": "heun", "denoise": 1.0, "seed": 7} | changes
    return {
        "loader": {"class_type": "InfDiTModelLoader", "inputs": loading},
        "give": {"class_type": "Give", "inputs": {"name": picture}},
        "upscale": {"class_type": "InfDiTUpscale", "inputs": {"model": ["loader", 0], "image": ["give", 0], **asked}},
        "take": {"class_type": "Take", "inputs": {"value": ["upscale", 0]}},
    }


def load_prompt(**loader: object) -> dict:
    loading = {"model_name": "mini (bundled)", "dtype": "fp32"} | loader
    return {
        "loader": {"class_type": "InfDiTModelLoader", "inputs": loading},
        "take": {"class_type": "TakeModel", "inputs": {"value": ["loader", 0]}},
    }


def facts(image: torch.Tensor) -> dict:
    return {
        "shape": list(image.shape),
        "dtype": str(image.dtype),
        "device": str(image.device),
        "finite": bool(image.isfinite().all()),
        "least": image.min().item(),
        "most": image.max().item(),
    }


def make_pictures() -> None:
    generator = torch.Generator().manual_seed(1)

    def smooth(*shape: int) -> torch.Tensor:
        b, h, w, c = shape
        rough = torch.rand((b, c, 4, 4), generator=generator)
        return torch.nn.functional.interpolate(rough, (h, w), mode="bilinear").movedim(1, -1).contiguous()

    PICTURES["small"] = smooth(1, 12, 10, 3)
    PICTURES["batch"] = smooth(2, 9, 12, 3)
    PICTURES["alpha"] = smooth(1, 10, 9, 4)
    PICTURES["pixel"] = smooth(1, 1, 1, 3)
    PICTURES["half"] = PICTURES["small"].half()
    PICTURES["wide"] = smooth(1, 24, 60, 3)


def case(function: Callable[[], dict]) -> Callable[[], dict]:
    CASES[function.__name__] = function
    return function


def library() -> ModuleType:
    """infdit by itself, as a program without ComfyUI would import it."""
    if str(PACK_DIR) not in sys.path:
        sys.path.append(str(PACK_DIR))  # last: the pack's own `nodes` must not hide ComfyUI's
    return importlib.import_module("infdit")


# ---- the cases, in the order in which they run


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
    loaded = asyncio.run(load_pack())
    seconds = time.perf_counter() - began
    paths, extensions = folder_paths.folder_names_and_paths["infdit"]
    tops = {name.split(".")[0] for name in set(sys.modules) - before if not name.startswith(PACK)}
    nodes.NODE_CLASS_MAPPINGS.update(Give=Give, Take=Take, TakeModel=TakeModel)
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
    model = infdit.load_model("mini", dtype=torch.float32, device="cpu")
    found = {}
    cases = {
        "small": {"steps": 2, "sampler_name": "heun", "seed": 7},
        "batch": {"steps": 1, "sampler_name": "euler", "seed": 2**64 - 1},
        "alpha": {"steps": 3, "sampler_name": "dpmpp_2m", "denoise": 0.6},
        "pixel": {"steps": 0, "sampler_name": "auto"},
        "wide": {"scale": 2.53, "steps": 1},
    }
    for name, asked in cases.items():
        kept = PICTURES[name].clone()
        ended = run(prompt(name, **asked))
        settings = prompt(name, **asked)["upscale"]["inputs"]
        automatic = settings["sampler_name"] == "auto"
        expected = infdit.upscale(
            model,
            kept,
            settings["scale"],
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
            "untouched": torch.equal(kept, PICTURES[name]),
            "contrast": expected.std().item(),
        }
    return found


@case
def half_picture() -> dict:
    """A picture of half precision, which ComfyUI may hand out."""
    return run(prompt("half")) | facts(TAKEN["value"])


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
def dtypes() -> dict:
    """What the choices of dtype load."""
    found = {}
    for name in ("auto", "bf16", "fp16", "fp32"):
        ended = run(load_prompt(dtype=name))
        network = TAKEN["value"].network
        found[name] = {"end": ended["end"], "dtypes": sorted({str(p.dtype) for p in network.parameters()})}
        found[name] |= run(prompt("pixel", {"dtype": name}, steps=1)) | facts(TAKEN["value"])
    library()
    device = importlib.import_module("infdit.device")
    found["auto"]["expected"] = str(device.default_dtype(torch.device("cpu")))
    return found


@case
def memory() -> dict:
    """Whether the weights are ComfyUI's: in its list of loaded models, and back after it has thrown them out."""
    run(prompt("pixel", steps=1))
    first = TAKEN["value"]
    loaded = [type(m.model.model).__name__ for m in mm.current_loaded_models]
    mm.unload_all_models()
    left = [type(m.model.model).__name__ for m in mm.current_loaded_models]
    ended = run(prompt("pixel", steps=1, seed=8))["end"]
    run(prompt("pixel", steps=1))
    return {"loaded": loaded, "left": left, "end": ended, "difference": (first - TAKEN["value"]).abs().max().item()}


@case
def bar() -> dict:
    """The bar and its pictures over four steps."""
    return run(prompt("wide", steps=4, sampler_name="euler", seed=21))


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

    stopped = run(prompt("wide", **asked), press)
    stopped_after = looks[0]
    looks[0] = 5
    whole = run(prompt("wide", **asked))
    mm.throw_exception_if_processing_interrupted = look
    return {
        "stopped": stopped["end"],
        "looks": stopped_after,
        "whole": whole["end"],
        "looks_in_whole": looks[0] - 5,
        "shape": list(TAKEN["value"].shape),
    }


@case
def files() -> dict:
    """Files that vanish, that are broken, that are something else; and one that is replaced by another."""
    folder = BASE / "models" / "infdit"
    mini = (PACK_DIR / "infdit" / "weights" / "mini.safetensors").read_bytes()
    contents = {
        "vanishing.safetensors": mini,
        "cut.safetensors": mini[: len(mini) // 2],
        "noise.safetensors": bytes(range(256)) * 64,
        "noise.pt": bytes(range(256)) * 64,
        "empty.safetensors": b"",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    found = {}
    for name in contents:
        gone = (folder / name).unlink if name.startswith("vanishing") else None
        ended = run(load_prompt(model_name=name), gone)
        found[name] = {key: ended.get(key) for key in ("end", "message", "type")}
    found["unlisted"] = run(load_prompt(model_name="nowhere.safetensors"))
    (folder / "x.clip.safetensors").write_bytes(mini)  # a CLIP model to ComfyUI's eyes, and so no choice
    found["clip"] = run(load_prompt(model_name="x.clip.safetensors"))
    return found


@case
def replaced() -> dict:
    """Which nodes run again: nothing changed; the file's time changed; then, the same file again."""
    path = BASE / "models" / "infdit" / "again.safetensors"
    shutil.copy(PACK_DIR / "infdit" / "weights" / "mini.safetensors", path)
    asked = load_prompt(model_name="again.safetensors")
    found = [run(asked)["ran"], run(asked)["ran"]]
    os.utime(path, (1, 1))
    return {"ran": [*found, run(asked)["ran"], run(asked)["ran"]]}


@case
def limits() -> dict:
    """Inputs at the limits and just beyond them: accepted or not by ComfyUI's validation."""
    beyond = {
        "scale": [1.0, 4.01, "large"],
        "steps": [-1, 1001],
        "sampler_name": ["euler_ancestral", ""],
        "denoise": [-0.01, 1.01],
        "seed": [-1, 2**64],
    }
    within = {"scale": [1.01, 4.0], "steps": [0, 1000], "denoise": [0.0, 1.0], "seed": [0, 2**64 - 1]}

    def accepted(name: str, value: Any) -> bool:
        return asyncio.run(execution.validate_prompt("p", prompt(**{name: value}), None))[0]

    loaders = [{"model_name": "../../secret.pt"}, {"dtype": "int8"}]
    return {
        "beyond": {f"{n}={v}": accepted(n, v) for n, values in beyond.items() for v in values}
        | {str(ld): asyncio.run(execution.validate_prompt("p", load_prompt(**ld), None))[0] for ld in loaders},
        "within": {f"{n}={v}": accepted(n, v) for n, values in within.items() for v in values},
    }


@case
def least_denoise() -> dict:
    """denoise 0 and the smallest scale run."""
    ended = run(prompt("small", denoise=0.0, scale=1.01))
    return ended | facts(TAKEN["value"])


def main() -> None:
    make_pictures()
    comfy.utils.set_progress_bar_global_hook(on_bar)
    findings = {}
    for name, function in CASES.items():
        began = time.perf_counter()
        try:
            findings[name] = function()
        except Exception:  # noqa: BLE001 - it is handed to the test that asks for this case
            findings[name] = {"traceback": traceback.format_exc()}
        print(f"{name}: {time.perf_counter() - began:.2f} s", flush=True)
    findings["network"] = {"reached": NETWORK}
    FINDINGS.write_text(json.dumps(findings, default=str))


if __name__ == "__main__":
    main()

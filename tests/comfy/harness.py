"""ComfyUI in this process, without a server, and prompts for its validator and executor: what the cases share.

Imported by drive.py, which says how it is run.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

COMFYUI, BASE, FINDINGS = (Path(a).absolute() for a in sys.argv[1:4])
PACK_DIR = next((BASE / "custom_nodes").iterdir())
PACK = str(PACK_DIR).replace(".", "_x_")  # the name under which ComfyUI imports it
BUNDLED, NOISY = "mini (bundled)", "noisy.safetensors"
NETWORK: list[str] = []  # everything that was connected to or looked up
CASES: dict[str, Callable[[], dict]] = {}


def watch_network(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        NETWORK.append(f"{event} {arguments[-2:]}")


sys.addaudithook(watch_network)
sys.argv = ["main.py", "--cpu", "--base-directory", str(BASE)]
sys.path[0] = str(COMFYUI)
sys.path.extend(map(str, Path(__file__).parents[:2]))  # the cases, and what they share with other tests
os.chdir(COMFYUI)

import comfy.options  # noqa: E402 - flags first: ComfyUI reads them while it is imported

comfy.options.enable_args_parsing()
import comfy.utils  # noqa: E402
import execution  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)  # on pictures this small threads only wait for each other
nodes = importlib.import_module("nodes")  # ComfyUI's nodes.py; a plain import would read as this pack's nodes/

# ---- what stands in for a picture's source and destination, and for the server

PICTURES: dict[str, torch.Tensor] = {}
ODD: dict[str, Any] = {}
TAKEN: dict[str, Any] = {}


class Give:
    """A node that hands out PICTURES[name], as an image and as a mask."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE", "MASK"), "give", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 - ComfyUI's name
        return {"required": {"name": ("STRING", {})}}

    def give(self, name: str) -> tuple:
        return PICTURES[name], PICTURES[name]


class Say:
    """A node that hands out a choice."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("COMBO",), "say", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {"required": {"text": ("STRING", {})}}

    def say(self, text: str) -> tuple:
        return (text,)


class AnyType(str):
    """A type that fits every input, as those of packs that pass on whatever comes."""

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return False


class GiveAny:
    """A node that hands out ODD[name], whatever it is."""

    RETURN_TYPES, FUNCTION, CATEGORY = (AnyType("*"),), "give", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {"required": {"name": ("STRING", {})}}

    def give(self, name: str) -> tuple:
        return (ODD[name],)


class Take:
    """A node that keeps what it is given in TAKEN[key]."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE, TYPE = (), "take", "test", True, "IMAGE"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {"required": {"value": (cls.TYPE, {})}, "optional": {"key": ("STRING", {"default": "value"})}}

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:  # noqa: N802
        return float("nan")  # never equal to itself: it runs every time

    def take(self, value: object, key: str = "value") -> tuple:
        TAKEN[key] = value
        return ()


TAKERS = {
    f"Take{kind}": type(f"Take{kind}", (Take,), {"TYPE": kind})
    for kind in ("IMAGE", "MASK", "STRING", "SIGMAS", "MODEL", "INFDIT_MODEL", "INFDIT_CLIP", "INFDIT_CONDITIONING")
}


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


async def load_core() -> None:
    """What of ComfyUI the prompts use."""
    await nodes.init_public_apis()
    samplers = COMFYUI / "comfy_extras" / "nodes_custom_sampler.py"
    await nodes.load_custom_node(str(samplers), module_parent="comfy_extras")
    nodes.NODE_CLASS_MAPPINGS.update(Give=Give, GiveAny=GiveAny, Say=Say, **TAKERS)


def load_pack() -> bool:
    return asyncio.run(nodes.load_custom_node(str(PACK_DIR)))


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
        "shown": [data["output"] for event, data in SERVER.sent if event == "executed" and data.get("output")],
        "bar": list(BAR),
    }


def make_models() -> None:
    """NOISY: the bundled model's weights, sampled from noise in any number of steps, which the bundled one is not."""
    path = BASE / "models" / "infdit" / NOISY
    path.parent.mkdir(parents=True, exist_ok=True)
    defaults = {"steps": 1, "sampler": "euler", "sigma_max": 0.1, "sigma_min": 0.01}
    metadata = {"config": json.dumps({"position_period": 1024}), "defaults": json.dumps(defaults)}
    save_file(load_file(PACK_DIR / "infdit" / "weights" / "mini.safetensors"), path, metadata)


def loader(**inputs: object) -> dict:
    return {"class_type": "InfDiTModelLoader", "inputs": {"model_name": NOISY, "dtype": "fp32"} | inputs}


def give(name: str) -> dict:
    return {"class_type": "Give", "inputs": {"name": name}}


def take(kind: str, node: str, slot: int, key: str = "value") -> dict:
    return {"class_type": f"Take{kind}", "inputs": {"value": [node, slot], "key": key}}


def size(inputs: dict) -> dict:
    """scale=2 and the like, in the words of a prompt."""
    said: dict[str, Any] = {"size": "scale by", "size.scale": 4.0} if "size" not in inputs else {}
    return said | {("size.scale" if name == "scale" else name): value for name, value in inputs.items()}


def prompt(picture: str = "small", loading: dict | None = None, **changes: object) -> dict:
    """Loader and Upscale between Give and takers of all that comes out, float32, everything said."""
    asked = {"steps": 2, "sampler_name": "heun", "denoise": 1.0, "seed": 7, "memory_budget": 0.0} | size(changes)
    return {
        "loader": loader(**(loading or {})),
        "give": give(picture),
        "upscale": {"class_type": "InfDiTUpscale", "inputs": {"model": ["loader", 0], "image": ["give", 0], **asked}},
        "take": take("IMAGE", "upscale", 0),
        "take mask": take("MASK", "upscale", 1, "mask"),
        "take report": take("STRING", "upscale", 2, "report"),
    }


def load_prompt(**loading: object) -> dict:
    return {"loader": loader(**loading), "take": take("INFDIT_MODEL", "loader", 0)}


def valid(asked: dict) -> bool:
    """Whether ComfyUI would run a prompt at all."""
    return asyncio.run(execution.validate_prompt("p", copy.deepcopy(asked), None))[0]


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


def pack(name: str) -> ModuleType:
    """A module of the pack as ComfyUI has it, such as nodes.host."""
    return importlib.import_module(f"{PACK}.{name}")


@contextmanager
def patched(place: object, **values: object) -> Iterator[None]:
    """Attributes of a module or object replaced for a while."""
    kept = {name: getattr(place, name) for name in values}
    for name, value in values.items():
        setattr(place, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(place, name, value)



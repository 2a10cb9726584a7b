"""A pack for a server on a card: a model that yields by itself (DynamicVRAM) beside ours, and what it has there.

test_on_a_card.py puts it into custom_nodes, since ComfyUI's own loaders need files of gigabytes. A prompt of its one
node, CardProbe, loads the model, and GET /card_probe says what each such node saw.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import torch
from aiohttp import web
from server import PromptServer

MIB = 2**20
SIDE, PARTS = 8192, 32  # 128 MiB each in bfloat16: 4 GiB
KEPT: dict[str, Any] = {}
SEEN: dict[str, dict] = {}


class Other(torch.nn.Module):
    """Linear layers as ComfyUI's own models have them, which fetch their weights when they compute."""

    def __init__(self) -> None:
        super().__init__()
        make = comfy.ops.manual_cast.Linear
        self.layers = torch.nn.ModuleList(make(SIDE, SIDE, bias=False, dtype=torch.bfloat16) for _ in range(PARTS))
        self.device = torch.device("cpu")
        for number, layer in enumerate(self.layers):
            torch.nn.init.constant_(layer.weight, (number + 1) / SIDE / PARTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def other() -> comfy.model_patcher.ModelPatcher:
    """The other model, as ComfyUI's loaders would hand it out."""
    if "other" not in KEPT:
        device = mm.get_torch_device()
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)  # of 0.8.0
        KEPT["other"] = patcher(Other(), device, torch.device("cpu"))
    return KEPT["other"]


def free() -> int:
    """Bytes that the card has."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else mm.get_free_memory()


class CardProbe:
    """Maybe compute with the other model, maybe fill the card up to so many MiB; note how things are then."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "look", "test", True

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 - ComfyUI's name
        return {"required": {"name": ("STRING", {}), "compute": ("BOOLEAN", {}), "leave": ("INT", {"default": 0})}}

    def look(self, name: str, compute: bool, leave: int) -> tuple:
        patcher, result = other(), None
        if compute:
            mm.load_models_gpu([patcher])
            with torch.inference_mode():
                x = torch.ones((1, SIDE), dtype=torch.bfloat16, device=patcher.load_device)
                result = patcher.model(x).float().sum().item()
        if leave and torch.cuda.is_available():
            mm.soft_empty_cache()
            KEPT["ballast"] = torch.empty(max(0, free() - leave * MIB), dtype=torch.uint8, device=patcher.load_device)
        SEEN[name] = {
            "dynamic": getattr(patcher, "is_dynamic", bool)(),
            "registered": any(loaded.model is patcher for loaded in mm.current_loaded_models),
            "loaded": patcher.loaded_size(),
            "free": free(),
            "result": result,
        }
        return ()


NODE_CLASS_MAPPINGS = {"CardProbe": CardProbe}


@PromptServer.instance.routes.get("/card_probe")
async def probe(_: web.Request) -> web.Response:
    return web.json_response(SEEN)

"""A pack for the soak test's own servers: GET /soak_probe says what this process holds.

test_soak.py puts it into custom_nodes, since nobody outside can count a server's tensors. Ask while nothing runs.
"""

from __future__ import annotations

import gc
from collections import Counter

import psutil
import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, type] = {}  # without it ComfyUI would not take this for a pack


def holdings() -> dict:
    """Tensors by number and kind, the bytes of their storages, each once, Python's objects, resident bytes."""
    gc.collect()
    things = gc.get_objects()
    # by type: isinstance would ask objects for their class, and proxies of what is gone raise then
    tensors = [thing for thing in things if issubclass(type(thing), torch.Tensor)]
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return {
        "tensors": len(tensors),
        "bytes": sum(storages.values()),
        "kinds": Counter(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors),
        "objects": len(things),
        "rss": psutil.Process().memory_info().rss,
    }


@PromptServer.instance.routes.get("/soak_probe")
async def probe(_: web.Request) -> web.Response:
    return web.json_response(holdings())

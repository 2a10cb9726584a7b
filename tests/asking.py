"""A running ComfyUI asked over HTTP: a prompt of one upscale, and what comes of it."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

PATIENCE = 120  # seconds


def ask(address: str, said: dict | None = None) -> dict:
    """The JSON that GET brings, or POST of what is said."""
    body = None if said is None else json.dumps(said).encode()
    with urllib.request.urlopen(urllib.request.Request(address, body), timeout=60) as answer:
        return json.loads(answer.read())


def one_upscale(picture: str, model: str = "mini (bundled)", **asked: object) -> dict[str, Any]:
    """A picture of the input folder, four times as large, in the output folder; the report too."""
    upscale = {
        "model": ["model", 0], "image": ["picture", 0], "size": "scale by", "size.scale": 4, "steps": 0,
        "sampler_name": "auto", "denoise": 1, "seed": 0, "memory_budget": 0,
    }  # fmt: skip
    return {
        "model": {"class_type": "InfDiTModelLoader", "inputs": {"model_name": model, "dtype": "fp32"}},
        "picture": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "upscale": {"class_type": "InfDiTUpscale", "inputs": upscale | asked},
        "saved": {"class_type": "SaveImage", "inputs": {"images": ["upscale", 0], "filename_prefix": "result"}},
        "shown": {"class_type": "PreviewAny", "inputs": {"source": ["upscale", 2]}},
    }


def queue(address: str, prompt: dict, **more: object) -> str:
    """The id of a prompt that was queued."""
    return ask(f"{address}/prompt", {"prompt": prompt, **more})["prompt_id"]


def ended(address: str, key: str) -> dict[str, dict]:
    """What each node put out, once a prompt has ended."""
    until = time.monotonic() + PATIENCE
    while not (history := ask(f"{address}/history/{key}")):
        assert time.monotonic() < until
        time.sleep(0.05)
    return history[key]["outputs"]


def saved(outputs: dict[str, dict], output: Path) -> Path:
    """The picture that `one_upscale` saved."""
    return output / outputs["saved"]["images"][0]["filename"]

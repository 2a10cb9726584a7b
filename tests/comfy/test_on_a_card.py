"""A server on a real card, beside a model that yields by itself (DynamicVRAM, ComfyUI's default there since 2026).

Skipped where there is no card. What ComfyUI is asked for is tested on stand-ins in test_memory_management.py.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import ask, ended, one_upscale, queue, saved
from PIL import Image

pytestmark = [pytest.mark.comfy, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROBE = Path(__file__).parent / "card_probe.py"
LEFT = 768  # MiB free on the card, besides what the other model would yield


def upscaled(address: str, base: Path, side: int, **asked: object) -> tuple[np.ndarray, str]:
    """The picture of a run at four times `side`, and its report."""
    Image.radial_gradient("L").resize((side, side)).convert("RGB").save(base / "input" / f"{side}.png")
    outputs = ended(address, queue(address, one_upscale(f"{side}.png", **asked)))
    with Image.open(saved(outputs, base / "output")) as image:
        return np.asarray(image), "".join(outputs["shown"]["text"])


def look(address: str, name: str, compute: bool = False, leave: int = 0) -> dict:
    """What the other model has on the card, after it was computed with or the card was filled."""
    asked = {"class_type": "CardProbe", "inputs": {"name": name, "compute": compute, "leave": leave}}
    ended(address, queue(address, {"probe": asked}))
    return ask(f"{address}/card_probe")[name]


def test_a_model_that_yields_stays_and_yields(
    serving: Callable[..., AbstractContextManager[str]], new_base: Callable[[str], Path]
) -> None:
    base = new_base("card")
    shutil.copy(PROBE, base / "custom_nodes")
    with serving(base, card=True) as address:
        before = look(address, "before", compute=True)
        if not before["dynamic"]:
            pytest.skip("this ComfyUI has no DynamicVRAM here")
        assert before["loaded"] > 3 * 2**30

        small, _ = upscaled(address, base, 64)
        after = look(address, "after a small run")
        assert (after["registered"], after["loaded"]) == (True, before["loaded"]), "nobody is moved for a small run"

        full = look(address, "filled", leave=LEFT)
        large, report = upscaled(address, base, 1024, memory_budget=2.0)
        (planned,) = re.findall(r"peak: ([\d.]+) GiB predicted", report)
        assert float(planned) * 2**30 > full["free"], "it could not have been had without the other model's room"
        yielded = look(address, "after a large run")
        assert yielded["registered"], "it was not unloaded"
        assert yielded["loaded"] < before["loaded"], "it gave what was wanted, by itself"
        again = look(address, "again", compute=True)
        assert again["result"] == before["result"]
    with serving(base) as address:  # without a card
        for side, found in ((64, small), (1024, large)):
            expected, _ = upscaled(address, base, side)
            assert np.abs(expected.astype(int) - found).max() <= 1

"""A hundred runs in one server leave nothing behind, beside a hundred of a core node in a server of its own.

What a process holds is asked of a small pack inside it (soak_probe.py) after a few runs, by when all that is made once
is made, and after the last. Both servers do the same but for the node that enlarges the picture.
"""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.comfy

PROBE = Path(__file__).parent / "soak_probe.py"
WARM, RUNS = 5, 100  # runs before the first look, and before the last
SIDE, LARGER = 64, 96  # pixels
RESULT = 3 * 4 * LARGER**2  # bytes
MIB = 2**20
GROWTH = 64 * MIB  # of resident memory
OBJECTS = 10  # of Python, in a run: connections and caches of the server itself
PATIENCE = 60  # seconds for a run

# the default of newer versions keeps old results for as long as the machine has much memory to spare
FLAGS = ("--cache-classic",)

ENLARGERS = {
    "InfDiTUpscale": {
        "model": ["model", 0],
        "size": "scale by",
        "size.scale": LARGER / SIDE,
        "steps": 2,
        "sampler_name": "dpmpp_2m",  # which keeps something from step to step
        "denoise": 1.0,
        "memory_budget": 0.0,
    },
    "ImageScale": {"upscale_method": "bicubic", "width": LARGER, "height": LARGER, "crop": "disabled"},
}


def prompt(node: str, seed: int) -> dict:
    """ImageScale knows no seed and is not given it; but results are cached by all that is said, so it runs."""
    drawn = {
        "picture": {"class_type": "LoadImage", "inputs": {"image": "picture.png"}},
        "enlarged": {"class_type": node, "inputs": {"image": ["picture", 0], "seed": seed} | ENLARGERS[node]},
        "shown": {"class_type": "PreviewImage", "inputs": {"images": ["enlarged", 0]}},
    }
    if node == "InfDiTUpscale":
        loading = {"model_name": "mini (bundled)", "dtype": "auto"}
        drawn["model"] = {"class_type": "InfDiTModelLoader", "inputs": loading}
    return drawn


def ask(address: str, said: dict | None = None) -> dict:
    """The JSON that GET brings, or POST of what is said."""
    body = None if said is None else json.dumps(said).encode()
    asked = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=PATIENCE) as reply:
        return json.loads(reply.read() or "{}")


def run(address: str, node: str, seed: int) -> None:
    """Queue a prompt and wait for its entry in the history, which ComfyUI writes when the executor is done with it."""
    key = ask(f"{address}/prompt", {"prompt": prompt(node, seed)})["prompt_id"]
    until = time.monotonic() + PATIENCE
    while not (history := ask(f"{address}/history/{key}")):
        assert time.monotonic() < until, f"run {seed} of {node} did not end"
        time.sleep(0.02)
    status = history[key]["status"]
    assert status["status_str"] == "success", status
    cached = next(data["nodes"] for event, data in status["messages"] if event == "execution_cached")
    assert not {"enlarged", "shown"} & set(cached), f"run {seed} of {node} was answered from the cache"


def look(address: str) -> dict:
    """What the server holds, its record of past prompts apart: ComfyUI keeps thousands of them, by design."""
    ask(f"{address}/history", {"clear": True})
    return ask(f"{address}/soak_probe")


@dataclass(frozen=True)
class Soak:
    """What a server held after the first runs and after the last."""

    node: str
    early: dict
    late: dict

    def growth(self, what: str) -> int:
        return self.late[what] - self.early[what]

    def __str__(self) -> str:
        tensors, size, rss = ([at[what] for at in (self.early, self.late)] for what in ("tensors", "bytes", "rss"))
        new = Counter(self.late["kinds"]) - Counter(self.early["kinds"])
        return (
            f"{self.node}, {WARM} and {RUNS} runs: {tensors[0]} and {tensors[1]} tensors, {size[0]} and {size[1]} bytes"
            f" (new: {dict(new) or 'none'}); RSS {rss[0] / MIB:.1f} and {rss[1] / MIB:.1f} MiB,"
            f" {self.growth('rss') / MIB:+.1f}; {self.growth('objects'):+d} objects"
        )


def soak(address: str, node: str) -> Soak:
    looks = []
    for done in range(1, RUNS + 1):
        run(address, node, seed=done)
        if done in (WARM, RUNS):
            looks.append(look(address))
    return Soak(node, *looks)


@pytest.fixture(scope="module")
def soaks(serving: Callable[..., AbstractContextManager[str]], new_base: Callable[[str], Path]) -> dict[str, Soak]:
    """Ours and the control, one after the other."""
    found = {}
    for node in ENLARGERS:
        base = new_base(node)
        shutil.copy(PROBE, base / "custom_nodes")
        Image.radial_gradient("L").resize((SIDE, SIDE)).convert("RGB").save(base / "input" / "picture.png")
        with serving(base, *FLAGS) as address:
            found[node] = soak(address, node)
    print(beside(found))
    return found


def beside(soaks: dict[str, Soak]) -> str:
    """Both, for whoever compares them."""
    return "\n" + "\n".join(map(str, soaks.values()))


@pytest.mark.parametrize("node", ENLARGERS)
def test_no_tensor_is_left_behind(soaks: dict[str, Soak], node: str) -> None:
    found = soaks[node]
    assert found.early["bytes"] >= RESULT  # the probe sees: the last result is in the cache
    assert (found.growth("tensors"), found.growth("bytes")) == (0, 0), beside(soaks)


@pytest.mark.parametrize("node", ENLARGERS)
def test_resident_memory_hardly_grows(soaks: dict[str, Soak], node: str) -> None:
    assert soaks[node].growth("rss") < GROWTH, beside(soaks)


@pytest.mark.parametrize("node", ENLARGERS)
def test_objects_hardly_pile_up(soaks: dict[str, Soak], node: str) -> None:
    """What is too small for the resident memory to show: finalizers, for one."""
    assert soaks[node].growth("objects") < OBJECTS * (RUNS - WARM), beside(soaks)

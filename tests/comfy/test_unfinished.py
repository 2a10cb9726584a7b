"""`resume` on Inf-DiT Upscale: stop is a pause, and neither an error nor kill -9 loses more than a step."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from asking import ended, one_upscale, queue, saved
from PIL import Image
from safetensors.torch import load_file, save_file

from nodes.words import in_language

pytestmark = pytest.mark.comfy

ROOT = Path(__file__).parents[2]
GOES_ON = r"note: picture (\d) goes on after step (\d) of {}{}"


@pytest.mark.parametrize(
    ("name", "kept", "goes_on"),
    [
        ("steps", ["picture.0.state"], [GOES_ON.format(6, "")]),
        ("error", ["picture.0.state"], [GOES_ON.format(6, "")]),
        ("batch", ["picture.0.state", "picture.1.state"], [GOES_ON.format(4, "")] * 2),
        ("passes", ["picture.0.1.state"], [GOES_ON.format(1, " in pass 1")]),
        (
            "many",
            [f"picture.{i}.state" for i in range(5)],
            [GOES_ON.format(1, ""), "note: 3 more such notes are in the receipt", GOES_ON.format(1, "")],
        ),
    ],
)
def test_what_was_stopped_goes_on_when_it_is_queued_again(
    inside: dict, name: str, kept: list[str], goes_on: list[str]
) -> None:
    found = inside["unfinished"][name]
    assert found["off"] == {"end": "success", "notes": [], "left": [], "there": False}
    assert found["stopped"] == {
        "end": "error" if name == "error" else "interrupted", "notes": [], "left": kept, "there": True,
    }  # fmt: skip
    assert found["again"]["end"] == "success"
    assert found["difference"] == 0
    assert len(found["again"]["notes"]) == len(goes_on)
    assert all(map(re.fullmatch, goes_on, found["again"]["notes"]))
    assert not found["again"]["there"]  # neither states nor the folder


def test_another_run_has_a_state_of_its_own(inside: dict) -> None:
    assert inside["unfinished_beside_another"]["other"] == {
        "end": "success", "notes": [], "left": ["picture.0.state"], "there": True,
    }  # fmt: skip


def test_a_damaged_state_is_told_and_not_used(inside: dict) -> None:
    found = inside["unfinished_beside_another"]
    (note,) = found["damaged"]["notes"]
    assert note.endswith("picture.0.state: the state is damaged; this run starts afresh")
    assert found["difference"] == 0
    assert not found["damaged"]["there"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("one step", "note: resume: nothing is kept, for this run is of one step at most"),
        ("in the way", "the state cannot be written (Not a directory); the run goes on"),
        ("deleted", "the state cannot be written (No such file or directory); the run goes on"),
    ],
)
def test_a_run_without_states_says_so(inside: dict, name: str, words: str) -> None:
    found = inside["unfinished_without_states"][name]
    (note,) = found["notes"]
    assert note.endswith(words)
    assert (found["end"], found["left"]) == ("success", [])
    assert found["there"] == (name == "in the way")


def test_all_that_is_said_has_chinese_words(inside: dict) -> None:
    runs = [case["again"] for case in inside["unfinished"].values()]
    runs += [inside["unfinished_beside_another"]["damaged"], *inside["unfinished_without_states"].values()]
    for note in {note for found in runs for note in found["notes"]}:
        said = re.sub(r"：/[^：]*|（[A-Z][a-z ]+）", "", in_language(note, "zh"))  # but a path, and the system's words
        assert not re.search(r"[A-Za-z]{3,} [A-Za-z]{2,}", said), (note, said)


# ---- by force


def result(address: str, prompt: dict, output: Path) -> tuple[np.ndarray, str]:
    """The pixels and the report of a prompt, from its queueing to its end."""
    outputs = ended(address, queue(address, prompt))
    with Image.open(saved(outputs, output)) as image:
        return np.asarray(image), "".join(outputs["shown"]["text"])


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_killed_server_goes_on_when_it_is_started_again(
    serving: Callable[..., AbstractContextManager[str]], new_base: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # on pictures this small threads only wait for each other
    base, steps, processes = new_base("killed"), 30, dict[str, subprocess.Popen]()
    about = {"steps": steps, "sampler": "dpmpp_2m", "sigma_max": 1.0, "sigma_min": 0.01}
    metadata = {"config": json.dumps({"position_period": 1024}), "defaults": json.dumps(about)}
    weights = load_file(ROOT / "infdit" / "weights" / "mini.safetensors")
    save_file(weights, base / "models" / "infdit" / "slow.safetensors", metadata)
    Image.effect_noise((24, 16), 90).convert("RGB").save(base / "input" / "picture.png")
    prompt = one_upscale("picture.png", "slow.safetensors", seed=5, resume=True)
    place = ("--output-directory", str(tmp_path))
    with serving(base, *place, processes=processes) as address:
        queue(address, prompt)
        written, until = set(), time.monotonic() + 120
        while len(written) < 4 and time.monotonic() < until:
            for state in tmp_path.glob("inf-dit-unfinished/*/*.state"):
                written.add(state.stat().st_mtime_ns)
            time.sleep(0.002)
        processes[address].kill()
        processes[address].wait()
    assert len(written) == 4
    assert list(tmp_path.glob("*.png")) == []
    with serving(base, *place) as address:
        pixels, report = result(address, prompt, tmp_path)
        prompt["upscale"]["inputs"]["resume"] = False
        whole, undisturbed = result(address, prompt, tmp_path)
    after = re.search(rf"^note: picture 1 goes on after step (\d+) of {steps}$", report, re.MULTILINE)
    assert 4 <= int(after[1]) < steps
    assert "goes on" not in undisturbed
    assert np.array_equal(pixels, whole)
    assert sorted(path.suffix for path in tmp_path.rglob("*")) == [".png", ".png"]

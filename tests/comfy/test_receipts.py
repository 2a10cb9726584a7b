"""What ComfyUI's Save Image writes beside a picture that Inf-DiT made, and the same picture made from it again."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from asking import ended, one_upscale, queue, saved
from PIL import Image

from infdit.picture import read_note, read_picture

pytestmark = pytest.mark.comfy

ROOT = Path(__file__).parents[2]
TEXTS = {"extra_data": {"extra_pnginfo": {"workflow": {"nodes": []}}}}  # as the page sends them


def receipt_of(report: str) -> dict:
    return json.loads(report.splitlines()[-1].removeprefix("receipt: "))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def picture(server: tuple[str, Path]) -> Path:
    path = server[1] / "input" / "receipts.png"
    Image.effect_noise((24, 16), 90).convert("RGB").save(path)
    return path


def test_the_same_picture_from_what_save_image_wrote(
    server: tuple[str, Path], picture: Path, python: Path, tmp_path: Path
) -> None:
    address, base = server
    asked = one_upscale(picture.name, fidelity=0.5, denoise=0.9)
    key = queue(address, asked, **TEXTS)
    outputs = ended(address, key)
    made = saved(outputs, base / "output")
    note = json.loads(read_note(made))
    assert note == receipt_of("".join(outputs["shown"]["text"]))
    with Image.open(made) as image:
        assert sorted(image.text) == ["inf-dit", "prompt", "workflow"]
        assert json.loads(image.text["prompt"]).keys() == asked.keys()
    command = [python, "-m", "infdit", "upscale", picture, "--device", "cpu", "--from-receipt", made]
    subprocess.run([*command, "-o", tmp_path / "again.tif", "--bits", "32"], cwd=ROOT, check=True)
    again = read_picture(tmp_path / "again.tif").pixels.numpy()
    assert np.array_equal(pixels(made), np.floor(again * 255))  # as Save Image rounds
    # as any picture, ComfyUI reads one that the shell has made
    subprocess.run([*command, "-o", base / "input" / "again.png"], cwd=ROOT, check=True)
    enlarged = ended(address, queue(address, one_upscale("again.png", **{"size.scale": 1.5})))
    assert pixels(saved(enlarged, base / "output")).shape == (96, 144, 3)


def test_of_two_runs_both_and_of_none_none(server: tuple[str, Path], picture: Path) -> None:
    address, base = server
    asked = one_upscale(picture.name, denoise=0.8)
    asked["more"] = {"class_type": "InfDiTUpscale", "inputs": {**asked["upscale"]["inputs"], "image": ["upscale", 0]}}
    asked["more"]["inputs"]["size.scale"] = 1.5
    asked["saved"]["inputs"]["images"] = ["more", 0]
    made = saved(ended(address, queue(address, asked, **TEXTS)), base / "output")
    assert [run["settings"]["size"] for run in json.loads(read_note(made))] == [[64, 96], [96, 144]]
    without = saved(ended(address, queue(address, one_upscale(picture.name, denoise=0.7))), base / "output")
    assert read_note(without) == ""  # who sends a prompt may want none


def test_a_long_receipt_is_not_written_into_each_of_many_pictures(server: tuple[str, Path], picture: Path) -> None:
    address, base = server
    asked = one_upscale(picture.name, denoise=0.6)
    asked["many"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["picture", 0], "amount": 300}}
    asked["small"] = {
        "class_type": "ImageScale",
        "inputs": {"image": ["many", 0], "upscale_method": "area", "width": 4, "height": 4, "crop": "disabled"},
    }
    asked["upscale"]["inputs"]["image"] = ["small", 0]
    outputs = ended(address, queue(address, asked, **TEXTS))
    receipt = receipt_of("".join(outputs["shown"]["text"]))
    assert len(receipt["faithful"]) == 300
    assert read_note(saved(outputs, base / "output")) == ""


def test_two_prompts_at_once(server: tuple[str, Path], picture: Path) -> None:
    """Queued together, each makes what it makes alone, and says of itself alone what it did."""
    address, base = server
    asked = [one_upscale(picture.name, denoise=share) for share in (0.55, 0.45)]
    together = [ended(address, key) for key in [queue(address, prompt, **TEXTS) for prompt in asked]]
    ask_free(address)
    alone = []
    for prompt in asked:
        alone.append(ended(address, queue(address, prompt, **TEXTS)))
        ask_free(address)
    files = [[saved(outputs, base / "output") for outputs in both] for both in (together, alone)]
    assert not np.array_equal(pixels(files[0][0]), pixels(files[0][1]))
    for one, other in zip(*files, strict=True):
        assert np.array_equal(pixels(one), pixels(other))
        first, second = (json.loads(read_note(path)) for path in (one, other))
        assert first["settings"] == second["settings"]


def ask_free(address: str) -> None:
    """Have ComfyUI forget what it has cached."""
    urllib.request.urlopen(urllib.request.Request(f"{address}/free", b'{"free_memory": true}'), timeout=60).close()

"""The zip that the registry would serve, installed as by ComfyUI's manager: alone, without the checkout around it."""

from __future__ import annotations

import json
import subprocess
import urllib.request
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from packing import pack
from PIL import Image

from api_client.upscale_folder import Server, with_image

pytestmark = pytest.mark.comfy

NAME = "inf-dit"


@pytest.fixture
def installed(tmp_path: Path, new_base: Callable[[str], Path]) -> Path:
    """A base directory of ComfyUI whose custom_nodes has the zip's content and nothing else."""
    base = new_base("package")
    place = base / "custom_nodes" / NAME
    place.unlink()  # the link to the checkout
    with zipfile.ZipFile(pack(tmp_path / "node.zip")) as archive:
        archive.extractall(place)
    return base


def test_it_runs_in_comfyui_and_in_the_shell(
    installed: Path, serving: Callable[..., AbstractContextManager[str]], python: Path, tmp_path: Path
) -> None:
    place = installed / "custom_nodes" / NAME
    picture = tmp_path / "tiny.png"
    Image.linear_gradient("L").resize((12, 8)).convert("RGB").save(picture)
    prompt = json.loads((place / "workflows/api/Upscale a picture with Inf-DiT.json").read_text(encoding="utf-8"))
    with serving(installed) as address:
        server = Server(address)
        (image,) = server.wait(server.queue(with_image(prompt, server.upload(picture))))
        (tmp_path / "result.png").write_bytes(server.download(image))
        with urllib.request.urlopen(f"{address}/workflow_templates", timeout=30) as answer:
            templates = json.loads(answer.read())[NAME]
    assert Image.open(tmp_path / "result.png").size == (48, 32)
    assert sorted(templates) == sorted(path.stem for path in (place / "workflows").glob("*.json"))
    log = (installed / "server.log").read_text(encoding="utf-8")
    assert "IMPORT FAILED" not in log
    command = [python, "-m", "infdit", "upscale", picture, "-o", tmp_path / "shell.png"]
    subprocess.run(command, cwd=place, check=True, capture_output=True)
    assert Image.open(tmp_path / "shell.png").size == (48, 32)

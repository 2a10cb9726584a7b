"""The zip that the registry would serve, in environments of its own: the README's first command; and as a package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from packing import pack
from PIL import Image


@pytest.fixture
def place() -> Iterator[Path]:
    """What is in the zip; gone at once, for pytest would keep three."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "inf-dit"
        with zipfile.ZipFile(pack(Path(folder) / "node.zip")) as archive:
            archive.extractall(place)
        yield place


@pytest.mark.slow
def test_quick_start_of_the_zip_in_an_empty_environment(place: Path) -> None:
    """It installs from the index that pip is set to, PyTorch too: some minutes, and gigabytes."""
    section = (place / "README.md").read_text(encoding="utf-8").partition("\n## Quick start\n")[2]
    command = re.findall(r"^```sh\n(.+)\n```$", section, re.MULTILINE)[0]
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && ")
    given = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    given["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{given['PATH']}"
    done = subprocess.run(["sh", "-c", command], cwd=place, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(place / "pictures/flowers.png") as small, Image.open(place / "flowers_x4.png") as large:
        assert large.size == (4 * small.width, 4 * small.height)
        near = large.convert("RGB").resize(small.size, Image.Resampling.BOX).tobytes()
        off = [abs(a - b) for a, b in zip(near, small.convert("RGB").tobytes(), strict=True)]
    assert sum(off) / len(off) < 4, "grey levels: it is that picture"
    check = [place / ".venv/bin/pip", "check"]
    assert subprocess.run(check, env=given, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_installed_as_a_package_it_is_a_command_with_its_model(place: Path, tmp_path: Path) -> None:
    """`pip install .` into an environment that borrows all other packages from this one."""
    if not (find_spec("pip") and find_spec("setuptools")):
        pytest.skip("there is no pip, or nothing that it could build with")
    home = tmp_path / "home"
    venv.create(home)
    programs = home / ("Scripts" if os.name == "nt" else "bin")
    given = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}

    def run(*command: object) -> str:
        return subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, check=True).stdout

    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(programs / "python", "-c", ask).strip())
    borrowed = "\n".join({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})
    (packages / "borrowed.pth").write_text(borrowed, encoding="utf-8")
    options = "--no-deps", "--no-build-isolation", "--disable-pip-version-check"
    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", "-q", *options, place)
    assert {path.name for path in packages.iterdir() if not path.name.endswith((".pth", ".dist-info"))} == {"infdit"}
    Image.new("RGB", (6, 4)).save(tmp_path / "in.png")
    assert "out.png: 24×16" in run(programs / "infdit", "upscale", "in.png", "-o", "out.png")
    assert str(packages / "infdit" / "weights" / "mini.safetensors") in run(programs / "infdit", "info", "mini")
    assert run(programs / "python", "-c", "from infdit.receipt import version; print(version())").strip() != "unknown"

"""A real ComfyUI for the tests: where it is, which Python runs it, one driver run and one server per checkout.

ComfyUI is never imported here. Everything that needs it happens in subprocesses over a temporary base directory into
which this pack is linked, and comes back as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = Path(__file__).absolute().parents[2]  # not resolved: the pack may be a link inside custom_nodes
PACK = "inf-dit"  # the folder that the registry installs it in
SERVER_PATIENCE = 120  # seconds


@dataclass(frozen=True)
class Checkout:
    """A ComfyUI to test against."""

    path: Path

    @property
    def version(self) -> str:
        found = re.search(r'"([^"]+)"', (self.path / "comfyui_version.py").read_text())
        return found[1] if found else self.path.name


def checkout_places() -> list[Path]:
    places = [Path(p) for p in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if p]
    if ROOT.parent.name == "custom_nodes":
        places.append(ROOT.parents[1])
    home = Path.home() / "comfy"
    return [*places, home / "ComfyUI", home / "ComfyUI-0.8.0"]


def find_checkouts() -> list[Checkout]:
    found = {p.resolve(): Checkout(p) for p in checkout_places() if (p / "comfyui_version.py").is_file()}
    return list(found.values())


def python_places(checkout: Checkout) -> list[Path]:
    named = os.environ.get("COMFYUI_PYTHON")
    return [
        *([Path(named)] if named else []),
        checkout.path / ".venv" / "bin" / "python",
        checkout.path / "venv" / "bin" / "python",
        Path.home() / "comfy" / "venv" / "bin" / "python",
        ROOT / ".venv-comfy" / "bin" / "python",
        Path(sys.executable),
    ]


@functools.cache
def runs_comfyui(python: Path) -> bool:
    """Whether it has what ComfyUI needs; tried, for a torchvision that does not fit its torch fails only on import."""
    if not python.is_file():
        return False
    tried = subprocess.run([python, "-c", "import aiohttp, torchvision"], capture_output=True, check=False)
    return tried.returncode == 0


def environment(card: bool = False) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    hidden = {} if card else {"CUDA_VISIBLE_DEVICES": ""}
    return kept | hidden | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _names(places: list[Path]) -> str:
    return ", ".join(map(str, places))


CHECKOUTS = find_checkouts()


@pytest.fixture(scope="session", params=CHECKOUTS or [None], ids=lambda c: c.version if c else "none")
def checkout(request: pytest.FixtureRequest) -> Checkout:
    if request.param is None:
        pytest.skip(f"no ComfyUI; looked for a checkout in COMFYUI_PATH, {_names(checkout_places())}")
    return request.param


def find_python(checkout: Checkout) -> Path:
    places = python_places(checkout)
    found = next(filter(runs_comfyui, places), None)
    if found is None:
        pytest.skip(f"no Python imports aiohttp and torchvision; tried COMFYUI_PYTHON, {_names(places)}")
    return found


@pytest.fixture(scope="session")
def python(checkout: Checkout) -> Path:
    return find_python(checkout)


def make_base(base: Path) -> Path:
    """A base directory: ComfyUI's models, custom_nodes, input, output, temp and user folders."""
    for folder in ("models/infdit", "custom_nodes", "input", "output", "temp", "user"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
    return base


@pytest.fixture(scope="session")
def new_base(checkout: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a base directory of that name."""
    return lambda name: make_base(tmp_path_factory.mktemp(f"{name}-{checkout.version}"))


class Findings(dict[str, dict]):
    """What a script found, case by case; asking for a case that failed shows its traceback."""

    def __getitem__(self, case: str) -> dict:
        found = super().__getitem__(case)
        if "traceback" in found:
            pytest.fail(f"{case} failed inside ComfyUI:\n{found['traceback']}", pytrace=False)
        return found


def _run(python: Path, script: str, *arguments: str | Path) -> Findings:
    """A script of this folder, with the path of the JSON to write as its last argument."""
    out = Path(arguments[-1])
    command = [python, HERE / script, *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode or not out.is_file():
        pytest.fail(f"{script} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}", pytrace=False)
    return Findings(json.loads(out.read_text()))


@pytest.fixture(scope="session")
def inside(checkout: Checkout, python: Path, new_base: Callable[[str], Path]) -> Findings:
    """All cases of drive.py: prompts through the real validator and executor, in one process."""
    base = new_base("drive")
    return _run(python, "drive.py", checkout.path, base, base / "findings.json")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait(server: subprocess.Popen, url: str, log: Path) -> None:
    until = time.monotonic() + SERVER_PATIENCE
    while time.monotonic() < until:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    pytest.fail(f"ComfyUI's server did not come up:\n{log.read_text()[-6000:]}", pytrace=False)


@contextmanager
def _serving(
    checkout: Checkout,
    python: Path,
    base: Path,
    *flags: str,
    port: int = 0,
    processes: dict | None = None,
    card: bool = False,
) -> Iterator[str]:
    """The address of a server over a base directory, for as long as it is needed; its process by the address."""
    port, log = port or _free_port(), base / "server.log"
    own = f"--listen 127.0.0.1 --port {port} --disable-auto-launch --disable-api-nodes --log-stdout"
    place = ["--database-url", "sqlite:///:memory:", "--base-directory", base]
    command = [python, "main.py", *([] if card else ["--cpu"]), *own.split(), *place, *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=checkout.path, env=environment(card), stdout=out, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    if processes is not None:
        processes[address] = process
    try:
        _wait(process, f"{address}/system_stats", log)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(base / "output", ignore_errors=True)


@pytest.fixture(scope="session")
def serving(checkout: Checkout, python: Path) -> Callable[..., AbstractContextManager[str]]:
    """Starts a server of its own over a base directory, with more flags: `with serving(base) as address`."""
    return functools.partial(_serving, checkout, python)


@pytest.fixture
def every_server(tmp_path_factory: pytest.TempPathFactory) -> list[Callable[..., AbstractContextManager[str]]]:
    """Starts a server of each version that is here, over a new base directory each time: newest first."""
    if not CHECKOUTS:
        pytest.skip("no ComfyUI")

    def start(checkout: Checkout, **options: object) -> AbstractContextManager[str]:
        base = make_base(tmp_path_factory.mktemp(f"many-{checkout.version}"))
        return _serving(checkout, find_python(checkout), base, **options)

    return [functools.partial(start, checkout) for checkout in CHECKOUTS]


@pytest.fixture
def free_port() -> int:
    return _free_port()


@pytest.fixture(scope="session")
def server(
    serving: Callable[..., AbstractContextManager[str]], new_base: Callable[[str], Path]
) -> Iterator[tuple[str, Path]]:
    """A running server: its address and base directory."""
    base = new_base("server")
    (base / "models" / "infdit" / "broken.safetensors").write_bytes(b"no such thing")
    with serving(base) as address:
        yield address, base


@pytest.fixture(scope="session")
def online(server: tuple[str, Path], python: Path) -> Findings:
    """All cases of client.py: what a user of the frontend or of the HTTP interface sees."""
    address, base = server
    return _run(python, "client.py", address, ROOT, base / "findings.json")


@pytest.fixture(scope="session")
def run_script(python: Path) -> Callable[..., Findings]:
    """Runs a script of this folder, which writes its findings to the file that is its last argument."""
    return functools.partial(_run, python)

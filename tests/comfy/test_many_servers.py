"""A folder over several real servers of all versions that are here, one lost, one late, one that is no ComfyUI."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from api_client import upscale_folder as client

pytestmark = pytest.mark.comfy

COUNT, SIZE = 30, (12, 8)
Start = Callable[..., AbstractContextManager[str]]


class Garbage(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send_response(random.choice([200, 200, 502]))
        self.end_headers()
        self.wfile.write(random.choice([b"<html>Sign in</html>", b"{}", b'{"name": "x", "prompt_id": "x"}', b""]))

    def do_POST(self) -> None:
        self.do_GET()


@pytest.fixture
def garbage() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Garbage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def colour(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=float).mean((0, 1))


def images_of(address: str) -> list[str]:
    """What Load Image had in each run that a server remembers."""
    with urllib.request.urlopen(f"{address}/history", timeout=30) as answer:
        return [client.image_of(entry["prompt"][2]) for entry in json.loads(answer.read()).values()]


def test_every_picture_once_and_rightly(
    every_server: list[Start], free_port: int, garbage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("SILENCE", 3.0), ("REST", 1.0), ("LONGEST_REST", 2.0), ("POLL", 1.0)):
        monkeypatch.setattr(client, name, seconds)
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(COUNT):  # each of a colour of its own
        rgb = (number // 10 * 100 + 20, number % 10 * 22 + 20, 250 - number * 7)
        Image.new("RGB", SIZE, rgb).save(folder / f"{number:02}.png")
    processes: dict[str, subprocess.Popen] = {}
    first, second, third = (every_server * 3)[:3]

    def receipts() -> list[dict]:
        return [json.loads(line) for line in (out / client.RECEIPTS).read_text().splitlines()]

    def wait_for(reached: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not reached() and time.monotonic() < end:
            time.sleep(0.1)

    with ExitStack() as stack:
        stays = stack.enter_context(first(processes=processes))
        dies = stack.enter_context(second(processes=processes))
        late = f"http://127.0.0.1:{free_port}"

        def disturb() -> None:
            wait_for(lambda: len(receipts()) >= 6 and dies in {receipt["server"] for receipt in receipts()})
            processes[dies].kill()

        def start_late() -> None:
            wait_for(lambda: bool(receipts()))
            stack.enter_context(third(port=free_port, processes=processes))

        out.mkdir()
        (out / client.RECEIPTS).touch()
        disturbing = [threading.Thread(target=disturb), threading.Thread(target=start_late)]
        for thread in disturbing:
            thread.start()
        addresses = [word for address in (garbage, dies, late, stays) for word in ("--server", address)]
        scale = ["--set", "InfDiTUpscale.size.scale=2"]
        status = client.main([str(folder), "-o", str(out), *addresses, *scale])
        for thread in disturbing:
            thread.join()
        remembered = images_of(stays) + images_of(late)
        by_jobs, by_history = client.Server(stays), client.Server(stays)
        by_history.has_jobs = False
        done = next(receipt["prompt_id"] for receipt in receipts() if receipt["server"] == stays)
        assert by_jobs.wait(done) == by_history.wait(done)
    assert status == 0
    assert sorted(path.name for path in out.glob("*.png")) == sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        with Image.open(out / path.name) as image:
            assert image.size == (2 * SIZE[0], 2 * SIZE[1])
        assert np.abs(colour(out / path.name) - colour(path)).max() < 1.5, "no two are so alike"
    told = receipts()
    assert Counter(receipt["result"] for receipt in told) == dict.fromkeys((p.name for p in folder.iterdir()), 1)
    assert {receipt["server"] for receipt in told} == {stays, dies, late}
    assert max(Counter(remembered).values()) == 1, "no picture twice"
    assert len(remembered) >= COUNT - sum(receipt["server"] == dies for receipt in told)

"""A server that answers as ComfyUI does, or as a test wants it to, and what tests of the client share."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filebytes import png
from PIL import Image

from api_client import upscale_folder as client

FAILS = "b.png"  # the picture that the server cannot open


def result_of(content: bytes, prompt: dict | None = None, **chunks: bytes) -> bytes:
    """A PNG whose pixel tells what was uploaded, with the workflow in it as Save Image puts it there."""
    if prompt is not None:
        chunks["tEXt"] = b"prompt\0" + json.dumps(prompt).encode()
    return png(1, [hashlib.sha256(content).digest()[:3]], 8, 2, **chunks)


def pixel(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def pixel_of(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:3]


class Fake(ThreadingHTTPServer):
    """A ComfyUI without nodes: a picture of its bytes comes out, after two looks at what became of it.

    hostile: what it does in place of an answer, by the beginning of the path, "/api" left out. seconds: what a picture
    takes. has_jobs: whether there is /api/jobs, or the history only.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Answers)
        self.uploads: dict[str, bytes] = {}
        self.prompts: dict[str, dict] = {}
        self.looks: dict[str, int] = {}
        self.headers: list[str | None] = []  # the keys that came
        self.seconds = 0.0
        self.slowness = 2  # looks in vain
        self.has_jobs = True
        self.rejects = False
        self.forgets = False
        self.hostile: dict[str, Callable[[Answers], None]] = {}

    def handle_error(self, *_: object) -> None:
        """Of a client that has gone."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *_: object) -> None:
        pass

    def parse_request(self) -> bool:
        whole = super().parse_request()
        if whole:
            self.path = self.path.removeprefix("/api")
            self.server.headers.append(self.headers["X-API-Key"])
        return whole

    def answer(self, body: bytes | dict, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def is_hostile(self) -> bool:
        for path, act in self.server.hostile.items():
            if self.path.startswith(path):
                act(self)
                return True
        return False

    def do_POST(self) -> None:
        body = self.body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.is_hostile():
            self.post(body)

    def post(self, body: bytes) -> None:
        if self.path == "/upload/image":
            boundary = self.headers["Content-Type"].partition("boundary=")[2].encode()
            (part,) = (p for p in body.split(b"--" + boundary) if b"filename=" in p)
            head, _, content = part.partition(b"\r\n\r\n")
            name = head.decode().partition('filename="')[2].partition('"')[0]
            self.server.uploads[name.partition(" ")[2]] = content.removesuffix(b"\r\n")
            self.answer({"name": name, "subfolder": "upscale_folder", "type": "input"})
        elif self.path != "/prompt":
            self.answer(b"")
        elif self.server.rejects:
            error = {"message": "Value -1 smaller than min of 0", "details": "steps"}
            self.answer({"error": {"message": "no"}, "node_errors": {"3": {"class_type": "U", "errors": [error]}}}, 400)
        else:
            asked = json.loads(body)
            assert str(uuid.UUID(asked["prompt_id"])) == asked["prompt_id"]
            self.server.prompts[asked["prompt_id"]] = asked["prompt"]
            time.sleep(self.server.seconds)
            self.answer({"prompt_id": asked["prompt_id"]})

    def do_GET(self) -> None:
        if not self.is_hostile():
            self.get()

    def view(self) -> None:
        (name,) = urllib.parse.parse_qs(self.path.partition("?")[2])["filename"]
        made = [p for p in self.server.prompts.values() if client.image_of(p).endswith(f" {name}")]
        self.answer(result_of(self.server.uploads[name], made[-1]))

    def get(self) -> None:
        if self.path == "/queue":
            waiting = [] if self.server.forgets else [[0, prompt_id] for prompt_id in self.server.prompts]
            return self.answer({"queue_running": [], "queue_pending": waiting})
        if self.path.startswith("/view"):
            return self.view()
        kind, _, prompt_id = self.path[1:].partition("/")
        if kind == "jobs" and not self.server.has_jobs:
            return self.answer(b"404: Not Found", 404)
        self.server.looks[prompt_id] = self.server.looks.get(prompt_id, 0) + 1
        known = prompt_id in self.server.prompts and not self.server.forgets
        if not known or self.server.looks[prompt_id] <= self.server.slowness:
            if kind == "history":
                return self.answer({})
            return self.answer(*(({"status": "pending"}, 200) if known else ({"error": "Job not found"}, 404)))
        name = client.image_of(self.server.prompts[prompt_id]).partition(" ")[2]
        error = {"node_type": "LoadImage", "exception_message": "cannot identify image file\n"}
        fails = name == FAILS
        messages = [["execution_start", {}], *([["execution_error", error]] if fails else [])]
        preview = {"filename": "preview", "subfolder": "", "type": "temp"}
        outputs = {"4": {"images": [preview, {"filename": name, "subfolder": "", "type": "output"}]}}
        if kind == "history":
            status = {"status_str": "error" if fails else "success", "messages": messages}
            return self.answer({prompt_id: {"status": status, "outputs": outputs}})
        job = {"status": "failed" if fails else "completed", "outputs": outputs}
        return self.answer({**job, "execution_status": {"messages": messages}})


@contextmanager
def serving(port: int = 0) -> Iterator[Fake]:
    fake = Fake(port)
    thread = threading.Thread(target=fake.serve_forever, args=(0.005,), daemon=True)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join(5)


def run(server: Fake, folder: Path, *arguments: str) -> int:
    return client.main([str(folder), "-o", str(folder.parent / "out"), "--server", server.address, *arguments])


def results(out: Path) -> list[Path]:
    """What is in the folder beside the receipts."""
    return sorted(path for path in out.iterdir() if path.name != client.RECEIPTS)


def receipts(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / client.RECEIPTS).read_text().splitlines()]


def one_sentence(capsys: pytest.CaptureFixture) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def run_all(folder: Path, servers: Iterable[str], *arguments: str) -> int:
    addresses = [word for address in servers for word in ("--server", address)]
    return client.main([str(folder), "-o", str(folder.parent / "out"), *addresses, *arguments])


def all_are_made(folder: Path) -> list[dict]:
    """That each picture has its own result, once; the receipts."""
    out = folder.parent / "out"
    assert {path.name: pixel(path) for path in results(out)} == {
        path.name: pixel_of(path.read_bytes()) for path in folder.iterdir()
    }
    told = receipts(out)
    assert sorted(receipt["result"] for receipt in told) == [path.name for path in results(out)]
    return told


def body(content: bytes, status: int = 200) -> Callable[[Answers], None]:
    return lambda answers: answers.answer(content, status)


# ---- what no ComfyUI answers

DEEP = b"[" * 100_000
ANY = {  # bodies that come with 200 wherever an answer is wanted
    "nothing": b"",
    "html": b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "text": b"ok",
    "null": b"null",
    "true": b"true",
    "number": b"7",
    "huge number": b"9" * 10_000,
    "infinity": b"Infinity",
    "list": b"[]",
    "lists": b"[[[]]]",
    "empty": b"{}",
    "string": b'"x"',
    "half": b'{"name": "a.p',
    "not utf-8": b'{"name": "\xff\xfe"}',
    "utf-16": '{"name": "a.png"}'.encode("utf-16"),
    "deep": DEEP,
    "deep in a dict": b'{"name": ' + DEEP,
    "zeros": bytes(1000),
    "surrogate": b'{"name": "\\ud800", "prompt_id": "\\ud800", "status": "\\ud800"}',
    "wrong kinds": b'{"name": 1, "prompt_id": 2, "status": 3, "queue_running": 4}',
    "nulls": b'{"name": null, "prompt_id": null, "status": null, "queue_running": null}',
    "lists inside": b'{"name": [], "prompt_id": ["0"], "status": [1], "queue_running": [1]}',
    "dicts inside": b'{"name": {}, "subfolder": {}, "prompt_id": {}, "status": {"a": 1}, "queue_running": [{}]}',
    "path": b'{"name": "../../x", "subfolder": "..", "prompt_id": "../queue?x=", "queue_running": {}}',
    "long": json.dumps({"name": "x" * 10**6, "prompt_id": "y" * 10**6}).encode(),
    "control": b'{"prompt_id": "\\u001b[2J\\r\\n", "name": "\\u001b[2J\\r\\n"}',
    "half a picture": result_of(b"x")[:40],
    "no picture": b"\x89PNG\r\n\x1a\n",
}


def raw(*pieces: bytes, wait: float = 0, again: bool = False) -> Callable[[Answers], None]:
    """Bytes on the wire as they are, one piece after another, over and over if wanted."""

    def act(answers: Answers) -> None:
        with suppress(OSError):
            while True:
                for piece in pieces:
                    answers.connection.sendall(piece)
                    time.sleep(wait)
                if not again:
                    return

    return act


def silent(answers: Answers) -> None:
    time.sleep(3)

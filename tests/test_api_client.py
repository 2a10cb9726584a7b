"""api_client/upscale_folder.py against a server that answers as ComfyUI does: what it sends, keeps and says."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from api_client import upscale_folder as client

FAILS = "b.png"  # the picture that the server cannot open


class Fake(ThreadingHTTPServer):
    """A ComfyUI without nodes: a picture comes out as it went in, after two looks at the history."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.uploads: dict[str, bytes] = {}
        self.prompts: dict[str, dict] = {}
        self.looks: dict[str, int] = {}
        self.rejects = False
        self.forgets = False

    def image_of(self, prompt_id: str) -> str:
        return next(n["inputs"]["image"] for n in self.prompts[prompt_id].values() if n["class_type"] == "LoadImage")


class Answers(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes | dict, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/upload/image":
            boundary = self.headers["Content-Type"].partition("boundary=")[2].encode()
            (part,) = (p for p in body.split(b"--" + boundary) if b"filename=" in p)
            head, _, content = part.partition(b"\r\n\r\n")
            name = head.decode().partition('filename="')[2].partition('"')[0]
            self.server.uploads[name] = content.removesuffix(b"\r\n")
            self.answer({"name": name, "subfolder": "upscale_folder", "type": "input"})
        elif self.server.rejects:
            error = {"message": "Value -1 smaller than min of 0", "details": "steps"}
            self.answer({"error": {"message": "no"}, "node_errors": {"3": {"class_type": "U", "errors": [error]}}}, 400)
        else:
            prompt_id = str(len(self.server.prompts))
            self.server.prompts[prompt_id] = json.loads(body)["prompt"]
            self.answer({"prompt_id": prompt_id})

    def do_GET(self) -> None:
        if self.path == "/queue":
            waiting = [] if self.server.forgets else [[0, prompt_id] for prompt_id in self.server.prompts]
            return self.answer({"queue_running": [], "queue_pending": waiting})
        if self.path.startswith("/view"):
            return self.answer(self.server.uploads[self.path.partition("filename=")[2].partition("&")[0]])
        prompt_id = self.path.removeprefix("/history/")
        self.server.looks[prompt_id] = self.server.looks.get(prompt_id, 0) + 1
        if self.server.forgets or self.server.looks[prompt_id] < 3:
            return self.answer({})
        name = self.server.image_of(prompt_id).removeprefix("upscale_folder/")
        error = {"node_type": "LoadImage", "exception_message": "cannot identify image file\n"}
        messages = [["execution_start", {}], *([["execution_error", error]] if name == FAILS else [])]
        preview = {"filename": "preview", "subfolder": "", "type": "temp"}
        images = [preview, {"filename": name, "subfolder": "", "type": "output"}]
        return self.answer({prompt_id: {"status": {"messages": messages}, "outputs": {"4": {"images": images}}}})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(client, "POLL", 0.01)
    fake = Fake()
    thread = threading.Thread(target=fake.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join(5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    made.mkdir()
    for name in ("a.png", FAILS, "c.jpg", "c.webp", "notes.txt"):
        (made / name).write_bytes(name.encode() * 3)
    return made


def run(server: Fake, folder: Path, *arguments: str) -> int:
    address = f"127.0.0.1:{server.server_port}"
    return client.main([str(folder), "-o", str(folder.parent / "out"), "--server", address, *arguments])


def test_each_picture_is_uploaded_upscaled_and_kept(server: Fake, folder: Path) -> None:
    assert run(server, folder) == 1  # one of them failed
    results = {path.name: path.read_bytes() for path in (folder.parent / "out").iterdir()}
    assert results == {name + ".png": (name + end).encode() * 3
                       for name, end in (("a", ".png"), ("c.jpg", ""), ("c.webp", ""))}  # fmt: skip
    assert [server.image_of(i) for i in server.prompts] == [f"upscale_folder/{n}" for n in sorted(server.uploads)]
    shipped = json.loads(client.WORKFLOW.read_text(encoding="utf-8"))
    sent = server.prompts["0"]
    for node in (*shipped.values(), *sent.values()):
        if node["class_type"] == "LoadImage":
            node["inputs"].pop("image")
    assert sent == shipped


def test_a_failed_picture_is_told_in_its_line(server: Fake, folder: Path, capsys: pytest.CaptureFixture) -> None:
    run(server, folder)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"{i} of 4" for i in (1, 2, 3, 4)]
    assert lines[1] == "2 of 4  b.png  failed: LoadImage: cannot identify image file"


def test_what_is_there_is_left_alone_unless_forced(server: Fake, folder: Path) -> None:
    out = folder.parent / "out"
    out.mkdir()
    (out / "a.png").write_bytes(b"mine")
    run(server, folder)
    assert (out / "a.png").read_bytes() == b"mine"
    assert "a.png" not in server.uploads
    run(server, folder, "--force")
    assert (out / "a.png").read_bytes() == b"a.png" * 3


def test_settings_are_sent(server: Fake, folder: Path) -> None:
    run(server, folder, "--set", "InfDiTUpscale.size=longest side", "--set", "InfDiTUpscale.size.longest_side=900")
    (upscale,) = client.nodes_of(server.prompts["0"], "InfDiTUpscale")
    assert upscale["inputs"]["size"] == "longest side"
    assert upscale["inputs"]["size.longest_side"] == 900


def one_sentence(capsys: pytest.CaptureFixture) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_rejected_workflow_ends_the_run(server: Fake, folder: Path, capsys: pytest.CaptureFixture) -> None:
    server.rejects = True
    assert run(server, folder) == 2
    assert "U: Value -1 smaller than min of 0 (steps)" in one_sentence(capsys)
    assert len(server.uploads) == 1


def test_a_prompt_that_somebody_removed_ends_the_run(server: Fake, folder: Path, capsys: pytest.CaptureFixture) -> None:
    server.forgets = True
    assert run(server, folder) == 2
    assert "taken out of ComfyUI's queue" in one_sentence(capsys)


def test_no_server(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    assert client.main([str(folder), "-o", str(tmp_path / "out"), "--server", address]) == 2
    assert f"no ComfyUI answers at http://{address}" in one_sentence(capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "InfDiTUpscale.stepps=2"], "InfDiTUpscale has no input stepps, only "),
        (["--set", "Nothing.steps=2"], "with one of the nodes InfDiTModelLoader, InfDiTUpscale, LoadImage, SaveImage"),
        (["--set", "InfDiTUpscale.steps"], "is not NODE.INPUT=VALUE"),
        (["--workflow", "nowhere.json"], "nowhere.json cannot be read"),
        (["--workflow", str(client.WORKFLOW.parents[1] / client.WORKFLOW.name)], "is not in API format"),
    ],
)
def test_wrong_arguments(
    server: Fake, folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], said: str
) -> None:
    assert run(server, folder, *arguments) == 2
    assert said in one_sentence(capsys)
    assert server.uploads == {}


def test_folders_that_cannot_be(server: Fake, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(server, empty) == 2
    assert "has no pictures" in one_sentence(capsys)
    assert run(server, tmp_path / "nowhere") == 2
    assert "cannot be opened" in one_sentence(capsys)
    assert client.main([str(folder), "-o", str(folder), "--server", f"127.0.0.1:{server.server_port}"]) == 2
    assert "is the input folder" in one_sentence(capsys)

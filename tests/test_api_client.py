"""api_client/upscale_folder.py against a server that answers as ComfyUI does: what it sends, keeps and says."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import suppress
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
    """A ComfyUI without nodes: a picture of its bytes comes out, after two looks at the history.

    hostile: what it does in place of an answer, by the beginning of the path.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.uploads: dict[str, bytes] = {}
        self.prompts: dict[str, dict] = {}
        self.looks: dict[str, int] = {}
        self.rejects = False
        self.forgets = False
        self.hostile: dict[str, Callable[[Answers], None]] = {}

    def handle_error(self, *_: object) -> None:
        """Of a client that has gone."""

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

    def is_hostile(self) -> bool:
        for path, act in self.server.hostile.items():
            if self.path.startswith(path):
                act(self)
                return True
        return False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.is_hostile():
            return
        if self.path == "/upload/image":
            boundary = self.headers["Content-Type"].partition("boundary=")[2].encode()
            (part,) = (p for p in body.split(b"--" + boundary) if b"filename=" in p)
            head, _, content = part.partition(b"\r\n\r\n")
            name = head.decode().partition('filename="')[2].partition('"')[0]
            self.server.uploads[name] = content.removesuffix(b"\r\n")
            self.answer({"name": name, "subfolder": "upscale_folder", "type": "input"})
        elif self.path != "/prompt":
            self.answer(b"")
        elif self.server.rejects:
            error = {"message": "Value -1 smaller than min of 0", "details": "steps"}
            self.answer({"error": {"message": "no"}, "node_errors": {"3": {"class_type": "U", "errors": [error]}}}, 400)
        else:
            prompt_id = str(len(self.server.prompts))
            self.server.prompts[prompt_id] = json.loads(body)["prompt"]
            self.answer({"prompt_id": prompt_id})

    def do_GET(self) -> None:
        if self.is_hostile():
            return None
        if self.path == "/queue":
            waiting = [] if self.server.forgets else [[0, prompt_id] for prompt_id in self.server.prompts]
            return self.answer({"queue_running": [], "queue_pending": waiting})
        if self.path.startswith("/view"):
            (name,) = urllib.parse.parse_qs(self.path.partition("?")[2])["filename"]
            return self.answer(result_of(self.server.uploads[name], list(self.server.prompts.values())[-1]))
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
    results = {path.name: pixel(path) for path in (folder.parent / "out").iterdir()}
    assert results == {name + ".png": pixel_of((name + end).encode() * 3)
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
    assert [line.split("  ")[0] for line in lines[1:]] == [f"{i} of 4" for i in (1, 2, 3, 4)]
    assert lines[2] == "2 of 4  b.png  failed: LoadImage: cannot identify image file"


def test_what_is_there_is_left_alone_unless_forced(server: Fake, folder: Path) -> None:
    out = folder.parent / "out"
    out.mkdir()
    mine = result_of(b"mine")
    (out / "a.png").write_bytes(mine)
    run(server, folder)
    assert (out / "a.png").read_bytes() == mine
    assert "a.png" not in server.uploads
    run(server, folder, "--force")
    assert pixel(out / "a.png") == pixel_of(b"a.png" * 3)


def test_what_other_settings_made_is_not_taken_for_done(
    server: Fake, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / FAILS).unlink()
    size = ("--set", "InfDiTUpscale.size.scale=2", "--set", "SaveImage.filename_prefix=2024")
    assert run(server, folder, *size) == 0
    assert run(server, folder, *size) == 0
    assert capsys.readouterr().out.count("is there already") == len(server.prompts) == 3
    before = {path: path.read_bytes() for path in (folder.parent / "out").iterdir()}
    assert run(server, folder) == 1
    assert capsys.readouterr().out.count("made with other settings: give another -o, or --force") == 3
    (folder.parent / "out" / "a.png").write_bytes(b"<html>")
    assert run(server, folder, *size) == 1
    assert "is there, but no whole picture" in capsys.readouterr().out
    assert len(server.prompts) == 3
    assert all(path.read_bytes() == data for path, data in before.items() if path.name != "a.png")


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
        (["--set", "Nothing.steps=2"], "nodes InfDiTModelLoader, InfDiTUpscale, LoadImage, PreviewAny, SaveImage"),
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


# ---- names and addresses


def test_what_is_left_out_is_said(server: Fake, folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "more").mkdir()
    (folder / "._a.png").write_bytes(b"\0\5\x16\7")
    (folder / "b.psd").write_bytes(b"8BPS")
    run(server, folder)
    assert capsys.readouterr().out.splitlines()[0] == "left out: 1 folder, 1 × .psd, 1 × .txt, 1 × hidden"
    assert sorted(server.uploads) == ["a.png", FAILS, "c.jpg", "c.webp"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_names_that_are_not_utf8(server: Fake, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in (b"\xfcber.png", 'ü \x1b[31m".png'.encode()):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(name)
    address = f"127.0.0.1:{server.server_port}"
    command = [sys.executable, client.__file__, folder, "-o", out, "--server", address]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert "→" in done.stdout.decode("utf-8")
    assert b"\x1b" not in done.stdout
    assert {os.fsencode(path.name): pixel(path) for path in out.iterdir()} == {
        os.fsencode(path.name): pixel_of(path.read_bytes()) for path in folder.iterdir()
    }


def test_no_two_results_have_one_name() -> None:
    names = ["a.jpg", "a.png", "a.jpg.png", "B.png", "b.jpg", "c.gif"]
    results = client.result_names([Path(name) for name in names], Path("out"))
    assert len({path.name.casefold() for path in results.values()}) == len(names)
    assert results[Path("c.gif")] == Path("out/c.png")


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("localhost", "http://localhost:8188"),
        ("http://10.0.0.1/", "http://10.0.0.1:8188"),
        ("http://host:80/comfy/", "http://host:80/comfy"),
        ("https://host", "https://host:443"),
        ("[::1]", "http://[::1]:8188"),
    ],
)
def test_addresses(given: str, address: str) -> None:
    assert client.Server(given).address == address


@pytest.mark.parametrize("given", ["", "ftp://host", "http://", "host:port", "host:99999", "a b", "a:b@host", "[::1"])
def test_no_addresses(server: Fake, folder: Path, given: str, capsys: pytest.CaptureFixture) -> None:
    assert client.main([str(folder), "-o", str(folder.parent / "out"), "--server", given]) == 2
    assert "is no address like http://127.0.0.1:8188" in one_sentence(capsys)


def test_no_proxy_for_this_machine(server: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (folder / FAILS).unlink()
    assert run(server, folder) == 0


# ---- targets and stops


@pytest.mark.skipif(not Path("/proc").exists(), reason="a folder that not even root can write to")
def test_a_target_that_cannot_be_written_is_found_first(
    server: Fake, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out in ("/proc", "/proc/no", tmp_path / "file", tmp_path / "file" / "out"):
        arguments = [str(folder), "-o", str(out), "--server", f"127.0.0.1:{server.server_port}"]
        assert client.main(arguments) == 2
        assert "give another -o" in one_sentence(capsys)
    assert server.uploads == {}


def test_a_target_that_is_gone_stops_the_run_and_says_where_the_result_is(
    server: Fake, folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", gone)
    assert run(server, folder) == 2
    error = one_sentence(capsys)
    assert "No space left on device" in error
    assert "ComfyUI has kept the result in its output folder as a.png" in error
    assert list(server.uploads) == ["a.png"]
    assert list((folder.parent / "out").iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_by_a_stop(server: Fake, folder: Path, how: signal.Signals) -> None:
    held, cancelled = threading.Event(), []
    server.hostile = {"/history": lambda answers: (held.set(), answers.answer({}))[1]}
    out = folder.parent / "out"
    command = [sys.executable, client.__file__, folder, "-o", out, "--server", f"127.0.0.1:{server.server_port}"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert held.wait(20)
    live = list(out.iterdir())
    assert [path.suffix for path in live] == [".part"]
    client.sweep(out)
    assert list(out.iterdir()) == live  # it is somebody's
    server.hostile["/interrupt"] = lambda answers: (cancelled.append(1), answers.answer({}))[1]
    running.send_signal(how)
    running.communicate(timeout=20)
    if how == signal.SIGKILL:
        assert list(out.iterdir()) == live
        (out / ".mine.part").write_bytes(b"")
        client.sweep(out)
        assert [path.name for path in out.iterdir()] == [".mine.part"]
    else:
        assert (running.returncode, cancelled, list(out.iterdir())) == (130, [1], [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_reader_who_has_read_enough_and_a_full_disk(server: Fake, folder: Path) -> None:
    command = [sys.executable, client.__file__, folder, "-o", folder.parent / "out"]
    command += ["--server", f"127.0.0.1:{server.server_port}"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"No space left on device" in done.stderr


def test_no_wait_is_endless(
    server: Fake, folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.hostile = {"/history": lambda answers: answers.answer({})}  # and the queue says that it is running
    assert run(server, folder, "--hours", "1e-5") == 2
    assert "not done after 1e-05 hours" in one_sentence(capsys)


# ---- a server that is none, or broken

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
    "surrogate": b'{"name": "\\ud800", "prompt_id": "\\ud800", "0": "\\ud800"}',
    "wrong kinds": b'{"name": 1, "prompt_id": 2, "0": 3, "queue_running": 4}',
    "nulls": b'{"name": null, "prompt_id": null, "0": null, "queue_running": null}',
    "lists inside": b'{"name": [], "prompt_id": ["0"], "0": [1], "queue_running": [1]}',
    "dicts inside": b'{"name": {}, "subfolder": {}, "prompt_id": {}, "0": {"a": 1}, "queue_running": [{}]}',
    "path": b'{"name": "../../x", "subfolder": "..", "prompt_id": "../queue?x=", "queue_running": {}}',
    "long": json.dumps({"name": "x" * 10**6, "prompt_id": "y" * 10**6}).encode(),
    "control": b'{"prompt_id": "\\u001b[2J\\r\\n", "name": "\\u001b[2J\\r\\n"}',
    "half a picture": result_of(b"x")[:40],
    "no picture": b"\x89PNG\r\n\x1a\n",
}
ENTRIES = [  # of the history
    "[]", "7", '"x"', "[[]]", '{"outputs": 1}', '{"outputs": []}', '{"outputs": {}}', '{"outputs": {"4": []}}',
    '{"outputs": {"4": {"images": 3}}}', '{"outputs": {"4": {"images": [3]}}}', '{"outputs": {"4": {"images": [{}]}}}',
    '{"outputs": {"4": {"images": [{"filename": 3}]}}}', '{"outputs": {"4": {"images": null}}}',
    '{"outputs": {"4": {"images": [{"filename": "\\ud800"}]}}}', '{"outputs": {"4": null}}', '{"status": {}}',
    '{"outputs": {}, "status": 3}', '{"outputs": {}, "status": {"messages": 3}}',
    '{"status": {"messages": [[[], {}]]}}',
    '{"status": {"messages": [["execution_error", {}]]}}', '{"status": {"messages": [["execution_error", 3]]}}',
    '{"status": {"messages": [["execution_error", {"node_type": 3, "exception_message": []}]]}}',
    '{"status": {"messages": [["execution_error", {"exception_message": "\\u001b[2J\\n\\n"}]]}}',
    '{"status": {"messages": [["execution_interrupted", null]]}}', '{"status": {"status_str": "error"}}',
]  # fmt: skip


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


def body(content: bytes, status: int = 200) -> Callable[[Answers], None]:
    return lambda answers: answers.answer(content, status)


def silent(answers: Answers) -> None:
    time.sleep(3)


REJECTIONS = [
    b"", b"{}", b"[]", DEEP, b"\xff" * 999, b'{"error": 3}', b'{"error": {"message": {}}, "node_errors": null}',
    b'{"node_errors": 3}', b'{"node_errors": {"3": {"errors": [1]}}}',
]  # fmt: skip
HEAD = b"HTTP/1.1 200 OK\r\n"
WIRE = {
    "closes": raw(),
    "never": silent,
    "drips a head": raw(b"H", wait=0.1, again=True),
    "drips headers": lambda answers: (raw(HEAD)(answers), raw(b"X: y\r\n", wait=0.1, again=True)(answers))[1],
    "drips a body": lambda answers: (raw(HEAD + b"\r\n")(answers), raw(b" ", wait=0.1, again=True)(answers))[1],
    "endless body": lambda answers: (raw(HEAD + b"\r\n")(answers), raw(bytes(2**20), again=True)(answers))[1],
    "continues": raw(b"HTTP/1.1 100 Continue\r\n\r\n", wait=0.01, again=True),
    "no http": raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "no status": raw(b"HTTP/1.1\r\n\r\n"),
    "status of letters": raw(b"HTTP/1.1 abc OK\r\n\r\n"),
    "long line": raw(b"HTTP/1.1 200 " + b"x" * 100_000 + b"\r\n\r\n"),
    "many headers": raw(HEAD + b"a: b\r\n" * 500 + b"\r\n"),
    "long length": raw(HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n{}"),
    "length of letters": raw(HEAD + b"Content-Length: many\r\n\r\n{}"),
    "half a chunk": raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\nff\r\n{}"),
    "chunk of letters": raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}"),
    "reason": raw(b"HTTP/1.1 500 \x1b[2J\xff\r\n\r\n"),
    "loop": lambda answers: raw(b"HTTP/1.1 302 Found\r\nLocation: " + answers.path.encode() + b"\r\n\r\n")(answers),
    "elsewhere": raw(b"HTTP/1.1 307 No\r\nLocation: file:///etc/hostname\r\n\r\n"),
    **{f"status {n}": body(b"<html>no</html>", n) for n in (201, 204, 304, 400, 401, 403, 404, 413, 500, 502, 503)},
    **{f"rejects {n}": body(text, 400) for n, text in enumerate(REJECTIONS)},
}


def broken_pictures() -> Iterator[bytes]:
    """A PNG cut, changed and put together wrongly, seeded."""
    picture = io.BytesIO()
    Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3600)).save(picture, "PNG")
    whole, rng = picture.getvalue(), random.Random(1)
    yield from (whole[: rng.randrange(len(whole))] for _ in range(12))
    for _ in range(12):
        place = rng.randrange(len(whole))
        yield whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]
    yield from (png(2, rows, 8, 2) for rows in ([], [b""], [b"123"], [b"1234567"], [b"123456", b""]))
    for width, depth, colour in ((0, 8, 2), (2**31, 8, 2), (1, 3, 2), (1, 8, 5)):
        yield png(width, [b"123"], depth, colour)
    yield png(1, [b"123"], 8, 2).replace(b"IDAT", b"iDAT")
    for kind in ("JPEG", "WEBP", "GIF"):
        other = io.BytesIO()
        Image.new("RGB", (4, 3)).save(other, kind)
        yield other.getvalue()


ENDPOINTS = ["/upload", "/prompt", "/history", "/queue", "/view"]
HOSTILE = [(path, name, body(content)) for path in ENDPOINTS for name, content in ANY.items()]
HOSTILE += [(path, name, act) for path in ENDPOINTS for name, act in WIRE.items()]
HOSTILE += [("/history", entry, body(b'{"0": %s}' % entry.encode())) for entry in ENTRIES]
HOSTILE += [("/view", f"picture {n}", body(content)) for n, content in enumerate(broken_pictures())]


@pytest.mark.parametrize(("path", "act"), [(p, a) for p, _, a in HOSTILE], ids=[f"{p} {n[:60]}" for p, n, _ in HOSTILE])
def test_every_answer_ends_in_a_picture_or_a_sentence(
    path: str, act: Callable[[Answers], None], server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(client, "PATIENCE", 0.4)
    monkeypatch.setattr(client, "MOST", 2**22)
    monkeypatch.setattr(client, "MOST_OF_A_PICTURE", 2**22)
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"a")
    server.hostile = {path: act}
    began = time.monotonic()
    status = run(server, folder, "--hours", "2e-4")
    assert time.monotonic() - began < 10
    said = capsys.readouterr()
    assert (said.out + said.err).replace("\n", "").isprintable()
    if status == 0:
        with Image.open(out / "a.png") as image:
            image.load()
        return
    assert list(out.iterdir()) == []
    assert "a.png  failed: " in said.out if status == 1 else said.err.startswith("error: ")
    assert (said.out.count("\n"), said.err.count("\n")) == (1, status - 1)

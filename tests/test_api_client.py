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
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("POLL", 0.01), ("SILENCE", 0.04), ("REST", 0.05), ("LONGEST_REST", 0.1)):
        monkeypatch.setattr(client, name, seconds)


@contextmanager
def serving(port: int = 0) -> Iterator[Fake]:
    fake = Fake(port)
    thread = threading.Thread(target=fake.serve_forever, args=(0.005,), daemon=True)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join(5)


@pytest.fixture
def server() -> Iterator[Fake]:
    with serving() as fake:
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    made.mkdir()
    for name in ("a.png", FAILS, "c.jpg", "c.webp", "notes.txt"):
        (made / name).write_bytes(name.encode() * 3)
    return made


def run(server: Fake, folder: Path, *arguments: str) -> int:
    return client.main([str(folder), "-o", str(folder.parent / "out"), "--server", server.address, *arguments])


def results(out: Path) -> list[Path]:
    """What is in the folder beside the receipts."""
    return sorted(path for path in out.iterdir() if path.name != client.RECEIPTS)


def receipts(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / client.RECEIPTS).read_text().splitlines()]


@pytest.mark.parametrize("has_jobs", [True, False])
def test_each_picture_is_uploaded_upscaled_and_kept(server: Fake, folder: Path, has_jobs: bool) -> None:
    server.has_jobs = has_jobs
    assert run(server, folder) == 1  # one of them failed
    made = {path.name: pixel(path) for path in results(folder.parent / "out")}
    assert made == {name + ".png": pixel_of((name + end).encode() * 3)
                    for name, end in (("a", ".png"), ("c.jpg", ""), ("c.webp", ""))}  # fmt: skip
    asked = [client.image_of(prompt) for prompt in server.prompts.values()]
    digests = [hashlib.sha256(content).hexdigest()[:16] for _, content in sorted(server.uploads.items())]
    assert asked == [f"upscale_folder/{d} {n}" for d, n in zip(digests, sorted(server.uploads), strict=True)]
    shipped = json.loads(client.WORKFLOW.read_text(encoding="utf-8"))
    sent = next(iter(server.prompts.values()))
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
    before = {path: path.read_bytes() for path in results(folder.parent / "out")}
    assert run(server, folder) == 1
    told = "made with other settings, or of another picture: give another -o, or --force"
    assert capsys.readouterr().out.count(told) == 3
    (folder.parent / "out" / "a.png").write_bytes(b"<html>")
    assert run(server, folder, *size) == 1
    assert "is there, but no whole picture" in capsys.readouterr().out
    assert len(server.prompts) == 3
    assert all(path.read_bytes() == data for path, data in before.items() if path.name != "a.png")


def test_settings_are_sent(server: Fake, folder: Path) -> None:
    run(server, folder, "--set", "InfDiTUpscale.size=longest side", "--set", "InfDiTUpscale.size.longest_side=900")
    (upscale,) = client.nodes_of(next(iter(server.prompts.values())), "InfDiTUpscale")
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
    assert client.main([str(folder), "-o", str(folder), "--server", server.address]) == 2
    assert "is the input folder" in one_sentence(capsys)


# ---- several servers


@pytest.fixture
def many(tmp_path: Path) -> Path:
    made = tmp_path / "many"
    made.mkdir()
    for number in range(12):
        (made / f"{number:02}.png").write_bytes(f"{number}".encode() * 5)
    return made


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


def test_servers_share_a_folder_and_receipts_say_which_made_what(many: Path) -> None:
    with serving() as one, serving() as two:
        one.seconds = two.seconds = 0.02
        assert run_all(many, (one.address, two.address, one.address + "/")) == 0
    told = all_are_made(many)
    for server in (one, two):
        made = {(client.image_of(prompt).partition(" ")[2], i) for i, prompt in server.prompts.items()}
        assert made == {(r["picture"], r["prompt_id"]) for r in told if r["server"] == server.address}
        assert len(made) > 2
    assert len(one.prompts) + len(two.prompts) == 12, "no picture twice"
    assert all(receipt["seconds"] > 0 for receipt in told)


def test_a_slow_server_leaves_the_last_pictures_to_a_fast_one(many: Path) -> None:
    with serving() as slow, serving() as fast:
        slow.seconds = 1.5
        assert run_all(many, (slow.address, fast.address)) == 0
    all_are_made(many)
    assert len(slow.prompts) == 1


def answers_garbage(answers: Answers) -> None:
    garbage = random.Random(len(answers.server.headers)).choice([*ANY.values(), b"{}" * 99])
    answers.answer(garbage, random.Random(len(garbage)).choice([200, 200, 400, 500]))


@pytest.mark.parametrize("hostile", ["", "/upload", "/prompt", "/jobs", "/view", "/"])
def test_one_dies_one_starts_late_one_answers_garbage(many: Path, hostile: str) -> None:
    """The fourth is sound; with none hostile the garbage is well formed: pictures of others."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with serving() as sound, serving() as dying, serving() as odd, ExitStack() as later:
        sound.seconds = dying.seconds = 0.1

        def die(answers: Answers) -> None:
            dying.server_close()
            dying.hostile[""] = raw()
            started.append(later.enter_context(serving(port)))

        started: list[Fake] = []
        made = iter(range(2))
        dying.hostile["/view"] = lambda answers: die(answers) if next(made, None) is None else answers.view()
        if hostile:
            odd.hostile[hostile] = answers_garbage
        else:
            odd.hostile["/view"] = body(result_of(b"?", json.loads(client.WORKFLOW.read_text(encoding="utf-8"))))
        assert run_all(many, (odd.address, dying.address, f"127.0.0.1:{port}", sound.address)) == 0
        (late,) = started
        assert late.prompts
    told = all_are_made(many)
    assert {receipt["server"] for receipt in told} <= {dying.address, late.address, sound.address}


def test_what_one_cannot_make_another_may(many: Path, capsys: pytest.CaptureFixture) -> None:
    """Such as for want of memory; what none can make fails once."""
    (many / FAILS).write_bytes(b"broken")
    with serving() as small, serving() as large:
        error = {"node_type": "InfDiTUpscale", "exception_message": "1 GiB is too little"}
        small.hostile["/jobs"] = lambda answers: answers.answer({"status": "failed", "execution_error": error})
        assert run_all(many, (small.address, large.address)) == 1
        assert any(FAILS in client.image_of(prompt) for prompt in large.prompts.values())
    (many / FAILS).unlink()
    assert {receipt["server"] for receipt in all_are_made(many)} == {large.address}
    assert capsys.readouterr().out.count("failed: ") == 1


def test_a_slow_server_tries_what_the_fast_one_cannot_make(many: Path) -> None:
    """Even as the last, when the fast one would be done with anything else long before."""
    (many / FAILS).write_bytes(b"broken")
    ended: list[int] = []
    with serving() as fast, serving() as slow:
        slow.seconds = 1.0
        work = threading.Thread(
            target=lambda: ended.append(run_all(many, (fast.address, slow.address))), daemon=True
        )  # fmt: skip
        work.start()
        work.join(60)
        assert ended == [1]


def test_a_run_whose_answer_is_lost_is_found_by_its_id(server: Fake, many: Path) -> None:
    """Else it would be queued a second time."""
    lost: list[str] = []

    def lose(answers: Answers) -> None:
        asked = json.loads(answers.body)
        server.prompts[asked["prompt_id"]] = asked["prompt"]
        lost.append(asked["prompt_id"])

    server.hostile["/prompt"] = lose
    assert run(server, many) == 0
    assert [receipt["prompt_id"] for receipt in all_are_made(many)] == lost == list(server.prompts)


def test_what_a_lost_server_still_has_is_taken_from_it(many: Path) -> None:
    """When it answers again: another has made it by then."""
    taken: list[dict] = []
    with serving() as sound, serving() as lost:
        sound.seconds = 0.05
        silent_until = time.monotonic() + 0.25
        for path in ("/jobs", "/queue", "/interrupt"):
            lost.hostile[path] = lambda a: None if time.monotonic() < silent_until else heard(a)

        def heard(answers: Answers) -> None:
            if answers.command == "POST":
                taken.append(json.loads(answers.body))
            answers.post(answers.body) if answers.command == "POST" else answers.get()

        assert run_all(many, (sound.address, lost.address)) == 0
        first = next(iter(lost.prompts))
    assert taken[:2] == [{"delete": [first]}, {"prompt_id": first}]
    assert first not in {receipt["prompt_id"] for receipt in all_are_made(many)}


def test_one_that_never_answers_does_not_hold_up_the_rest(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is asked in vain while the run ends."""
    monkeypatch.setattr(client, "PATIENCE", 0.1)
    with serving() as sound, serving() as mute:
        mute.hostile[""] = silent
        sound.seconds = 0.02
        assert run_all(many, (mute.address, sound.address)) == 0
    all_are_made(many)


def test_none_left(many: Path, capsys: pytest.CaptureFixture) -> None:
    with serving() as one, serving() as two:
        one.rejects = True
        two.hostile["/upload"] = body(b"", 503)
        assert run_all(many, (one.address, two.address)) == 2
    error = one_sentence(capsys)
    assert "ComfyUI rejects the workflow: U: Value -1" in error
    assert f"{two.address}/api/upload/image answers 503" in error


# ---- the API key


def test_the_key_goes_to_one_host_in_a_header_and_nowhere_else(
    server: Fake, many: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host may keep pictures elsewhere."""
    with serving() as store:
        store.prompts, store.uploads = server.prompts, server.uploads

        def leads_away(answers: Answers) -> None:
            answers.send_response(302)
            answers.send_header("Location", f"{store.address}{answers.path}")
            answers.end_headers()

        server.hostile["/view"] = leads_away
        monkeypatch.setenv(client.KEY, "secret-1")
        assert run(server, many) == 0
        assert set(server.headers) == {"secret-1"}
        assert set(store.headers) == {None}
    all_are_made(many)
    server.hostile = {"/prompt": lambda answers: answers.answer(b"no " + answers.headers["X-API-Key"].encode(), 400)}
    assert run(server, many, "--force", "--api-key", "secret-2") == 2
    said = capsys.readouterr()
    assert "no ***" in said.err
    assert "secret" not in said.out + said.err + (many.parent / "out" / client.RECEIPTS).read_text()


@pytest.mark.parametrize(
    ("key", "servers", "said"),
    [
        ("a\nb", ["127.0.0.1"], "has characters that no header can have"),
        ("k", ["https://a.test", "https://b.test"], "would go to a.test and b.test"),
        ("k", ["http://a.test"], "would go to no server with https"),
    ],
)
def test_a_key_that_others_could_read(
    folder: Path, key: str, servers: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert run_all(folder, servers, "--api-key", key) == 2
    assert said in one_sentence(capsys)


def test_receipts_do_not_follow_a_link_out_of_the_folder(
    server: Fake, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / client.RECEIPTS).symlink_to(tmp_path / "mine")
    assert run(server, folder) == 2
    assert f"{client.RECEIPTS} cannot be written" in one_sentence(capsys)
    assert not (tmp_path / "mine").exists()


def test_a_picture_that_was_replaced_is_not_taken_for_done(
    server: Fake, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    run(server, folder)
    (folder / "a.png").write_bytes(b"another")
    run(server, folder)
    assert "a.png is there, made with other settings, or of another picture" in capsys.readouterr().out


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
    server.slowness = 0
    command = [sys.executable, client.__file__, folder, "-o", out, "--server", server.address]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert "→" in done.stdout.decode("utf-8")
    assert b"\x1b" not in done.stdout
    assert {os.fsencode(path.name): pixel(path) for path in results(out)} == {
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
        arguments = [str(folder), "-o", str(out), "--server", server.address]
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
    assert results(folder.parent / "out") == []


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_by_a_stop(server: Fake, folder: Path, how: signal.Signals) -> None:
    held, cancelled = threading.Event(), []
    server.hostile = {"/jobs": lambda answers: (held.set(), answers.answer({"status": "in_progress"}))[1]}
    out = folder.parent / "out"
    command = [sys.executable, client.__file__, folder, "-o", out, "--server", server.address]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert held.wait(20)
    server.hostile["/interrupt"] = lambda answers: (cancelled.append(1), answers.answer({}))[1]
    running.send_signal(how)
    running.communicate(timeout=20)
    assert results(out) == []
    if how != signal.SIGKILL:
        assert (running.returncode, cancelled) == (130, [1])


def test_what_a_kill_left_while_it_wrote_is_removed_when_it_is_old(tmp_path: Path) -> None:
    names = {".0123456789abcdef.part": 7200, ".123456789abcdef0.part": 60, ".mine.part": 7200, "a.png": 7200}
    for name, age in names.items():
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    client.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names.keys() - {".0123456789abcdef.part"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_reader_who_has_read_enough_and_a_full_disk(server: Fake, folder: Path) -> None:
    command = [sys.executable, client.__file__, folder, "-o", folder.parent / "out"]
    command += ["--server", server.address]
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
    server.hostile = {"/jobs": lambda answers: answers.answer({"status": "in_progress"})}
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


JOBS = [  # of /api/jobs
    *(entry[:-1] + ', "status": "completed"}' for entry in ENTRIES if entry.startswith('{"outputs')),
    '{"status": "gone"}', '{"status": "completed"}', '{"status": "failed"}',
    '{"status": "failed", "execution_error": 3}',
    '{"status": "failed", "execution_error": {"exception_message": "\\u001b[2J\\n\\n"}}', '{"status": "cancelled"}',
    '{"status": "completed", "outputs": {}, "execution_status": 3}',
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


def of_run(template: str) -> Callable[[Answers], None]:
    return lambda answers: answers.answer((template % answers.path.rpartition("/")[2]).encode())


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
    **{f"status {n}": body(b"<html>no</html>", n) for n in (204, 304, 400, 401, 404, 413, 503)},
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


ENDPOINTS = ["/upload", "/prompt", "/jobs", "/history", "/queue", "/view"]
HOSTILE = [(path, name, body(content)) for path in ENDPOINTS for name, content in ANY.items()]
HOSTILE += [(path, name, act) for path in ENDPOINTS for name, act in WIRE.items()]
HOSTILE += [("/prompt", f"rejects {n}", body(text, 400)) for n, text in enumerate(REJECTIONS)]
HOSTILE += [("/history", entry, of_run('{"%s": ' + entry + "}")) for entry in ENTRIES]
HOSTILE += [("/jobs", job, body(job.encode())) for job in JOBS]
HOSTILE += [("/view", f"picture {n}", body(content)) for n, content in enumerate(broken_pictures())]


@pytest.mark.parametrize(("path", "act"), [(p, a) for p, _, a in HOSTILE], ids=[f"{p} {n[:60]}" for p, n, _ in HOSTILE])
def test_every_answer_ends_in_a_picture_or_a_sentence(
    path: str, act: Callable[[Answers], None], server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    server.has_jobs = path not in ("/history", "/queue")
    monkeypatch.setattr(client, "PATIENCE", 0.2)
    monkeypatch.setattr(client, "MOST", 2**22)
    monkeypatch.setattr(client, "MOST_OF_A_PICTURE", 2**22)
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"a")
    server.hostile = {path: act}
    began = time.monotonic()
    status = run(server, folder, "--hours", "3e-5")
    assert time.monotonic() - began < 10
    said = capsys.readouterr()
    assert (said.out + said.err).replace("\n", "").isprintable()
    if status == 0:
        with Image.open(out / "a.png") as image:
            image.load()
        return
    assert results(out) == []
    assert "a.png  failed: " in said.out if status == 1 else said.err.startswith("error: ")
    assert (said.out.count("\n"), said.err.count("\n")) == (2 - status, status - 1)

"""docs/errors.md says what is said: all that was done there in a shell is done again, and by the client for folders."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from filebytes import tiff
from folder_client.fake import ANY, Fake, body, serving
from PIL import Image
from said import rows

from api_client import upscale_folder as client
from infdit.__main__ import main


def assert_said(sentence: str, line: str) -> None:
    """A line is a sentence of the page; … stands for anything."""
    assert re.fullmatch(".*".join(map(re.escape, sentence.split("…"))), line), line
    assert 30 < len(line) < 300


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which all of it was done."""
    monkeypatch.chdir(tmp_path)
    for name in ("photo.png", "made.png", "holiday/a.png", "holiday/b.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").resize((12, 9)).convert("RGB").save(name)
    Path("nothing").mkdir()
    Path("notes.png").write_text("milk, bread")
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:-60])
    Image.linear_gradient("L").resize((12, 9)).convert("F").save("light.tif")
    Path("raw.dng").write_bytes(tiff({256: 2, 257: 1, 258: 8, 259: 1, 262: 1, 277: 1, 254: 1}, b"\7\x09", pages=2))
    return tmp_path


@pytest.mark.parametrize(("done", "said"), rows("In a shell"))
def test_a_command_says_so(things: Path, capsys: pytest.CaptureFixture[str], done: str, said: str) -> None:
    before = {path: path.read_bytes() for path in things.rglob("*") if path.is_file()}
    _, *arguments = shlex.split(done.strip("`"))
    try:
        status = main(arguments)
    except SystemExit as left:
        status = left.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert_said(said, line)
    assert {path: path.read_bytes() for path in things.rglob("*") if path.is_file()} == before


def rejects(server: Fake) -> None:
    server.rejects = True


def forgets(server: Fake) -> None:
    server.forgets = True


def answers(path: str, content: bytes, status: int = 200) -> Callable[[Fake], None]:
    def act(server: Fake) -> None:
        server.hostile[path] = body(content, status)

    return act


SERVERS = {
    "an address where something else serves": answers("/upload", b"", 404),
    "a page to sign in, in its place": answers("/upload", ANY["html"]),
    "a server that wants a key": answers("/upload", b"", 401),
    "a picture that is too large for it": answers("/upload", b"", 413),
    "a workflow that ComfyUI rejects": rejects,
    "a queue that somebody empties": forgets,
    "a workflow that saves no PNG": answers("/view", b"\xff\xd8\xff"),
    "a result that comes damaged": answers("/view", ANY["half a picture"]),
    "a picture that ComfyUI cannot open": lambda server: None,
}


@pytest.mark.parametrize(("done", "said"), rows("The client for folders"))
def test_the_client_says_so(
    things: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], done: str, said: str
) -> None:
    for name, seconds in (("POLL", 0.01), ("SILENCE", 0.04), ("REST", 0.05)):
        monkeypatch.setattr(client, name, seconds)
    if done.startswith("`"):
        _, *arguments = shlex.split(done.strip("`"))
        assert client.main(arguments) == 2
    else:
        with serving() as server:
            SERVERS[done](server)
            status = client.main(["holiday", "-o", "out", "--server", server.address])
            said = said.replace("http://127.0.0.1:8188", server.address)
        assert status == (1 if "failed: " in said else 2)
    told = "".join(capsys.readouterr()).splitlines()
    assert_said(said, next(line for line in told if "error: " in line or "failed: " in line))
    assert [path.name for path in (things / "out").glob("*.png")] in ([], ["a.png"])

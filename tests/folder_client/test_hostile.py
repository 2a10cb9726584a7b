"""A server that is none, or broken: every answer ends in a picture or one sentence."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filebytes import png
from folder_client.fake import (
    ANY,
    DEEP,
    Answers,
    Fake,
    body,
    raw,
    results,
    run,
    silent,
)
from PIL import Image

from api_client import upscale_folder as client

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


def of_run(template: str) -> Callable[[Answers], None]:
    return lambda answers: answers.answer((template % answers.path.rpartition("/")[2]).encode())


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
    monkeypatch.setattr(client, "PATIENCE", 0.4)
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

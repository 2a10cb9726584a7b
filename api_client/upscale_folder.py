"""Upscales a folder of pictures on running ComfyUIs through their HTTP interface: on one, or on many at once.

    python upscale_folder.py photos/ -o photos_x4/ [--server http://127.0.0.1:8188] [--server http://10.0.0.2:8188]

For each picture: upload it, queue `workflows/api/Upscale a picture with Inf-DiT.json` with its name in Load Image, wait
for the end, download what was saved. Any other workflow in API format with one Load Image and a Save Image will do
(--workflow). All servers take from one queue, each at its own speed. What a server had when it was lost goes to
another; one that does not answer is asked again, so it may also be started late. The run ends when none is left.

Pictures whose result is there already are left out, so a run that was stopped goes on where it was: the picture and the
settings that made a result are read from the PNG. upscale_folder.jsonl beside the results has a line for each: which
server made it, when and how fast. Needs nothing but Python: copy the file and the workflow wherever you like.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import io
import ipaddress
import json
import os
import queue
import re
import secrets
import signal
import struct
import sys
import threading
import time
import urllib.parse
import urllib.request
import uuid
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO, TypeVar

WORKFLOW = Path(__file__).resolve().parent.parent / "workflows" / "api" / "Upscale a picture with Inf-DiT.json"
PICTURES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
UPLOADS = "upscale_folder"  # folder for the uploaded pictures in ComfyUI's input folder
RECEIPTS = "upscale_folder.jsonl"  # in the folder of the results
KEY = "UPSCALE_FOLDER_API_KEY"  # environment variable
PORT = 8188
POLL = 0.5  # seconds between two looks at a run
PATIENCE = 60.0  # seconds in which the server must begin to answer, and each PIECE must have come
SILENCE = 20.0  # seconds for which a server may give no answer, or none that is understood, during a run
REST = 5.0  # seconds until a server that failed is asked again; twice as many each time, up to
LONGEST_REST = 60.0
PIECE = 2**20  # bytes
MOST = 2**28  # bytes of an answer that is no picture
MOST_OF_A_PICTURE = 2**32
NONSENSE = (AttributeError, LookupError, RecursionError, TypeError, ValueError)  # of JSON with other things in it

Prompt = dict[str, dict]  # a workflow in API format: node id → class_type and inputs
Answer = TypeVar("Answer")
Make = Callable[["Server", "Picture"], str]
Say = Callable[..., None]


class ClientError(Exception):
    """What went wrong, in one sentence, with everything: the run ends."""

    def __init__(self, message: str) -> None:
        super().__init__(plain(message))


class PictureError(ClientError):
    """What is wrong with a picture, whoever makes it."""


class AttemptError(ClientError):
    """Why a server could not make a picture: another server may, and this one may make others."""


class ServerError(ClientError):
    """What is wrong with a server, whatever the picture."""


def plain(text: str) -> str:
    """Text in one line of at most 600 characters that a terminal can be given, wherever it comes from."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "�" for c in line[:600]) + "…" * (len(line) > 600)


# ---- ComfyUI


class _AsTheyCome(urllib.request.HTTPErrorProcessor):
    """Gives back every answer, errors too: what was posted does not survive the redirections that urllib follows."""

    def http_response(self, request: urllib.request.Request, response: http.client.HTTPResponse) -> object:
        """The answer."""
        return response

    https_response = http_response


class Server:
    """The few calls that are needed of ComfyUI's HTTP interface.

    Whatever answers, a call ends in bounded time, with what ComfyUI would give or with a ClientError; and at once when
    `stop` is set. `seconds`: what its last picture took, 0 before.
    """

    def __init__(self, address: str, stop: threading.Event | None = None) -> None:
        self.address, self.host = _address(address)
        self.key, self.seconds, self.stop = "", 0.0, stop or threading.Event()
        self._run = ""  # which it may still have
        self.has_jobs = True  # until it says otherwise
        direct = [urllib.request.ProxyHandler({})] if is_loopback(self.host) else []
        self._opener = urllib.request.build_opener(_AsTheyCome, *direct)

    def upload(self, path: Path) -> str:
        """Put a picture into ComfyUI's input folder; its name for Load Image."""
        content = read_picture(path)
        boundary = uuid.uuid4().hex
        name = f'"image"; filename="{upload_name(path, content)}"'
        fields = {'"subfolder"': UPLOADS, '"overwrite"': "true", name: ""}
        head = f"--{boundary}\r\nContent-Disposition: form-data; name="
        text = "\r\n".join(f"{head}{field}\r\n\r\n{value}" for field, value in fields.items())
        body = text.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        status, reason, answer = self._call("/api/upload/image", body, f"multipart/form-data; boundary={boundary}")
        if status == 413:
            raise AttemptError("it is too large for ComfyUI: start that with a larger --max-upload-size")
        with self._understood("/api/upload/image", status, reason):
            answer = json.loads(answer)
            return "/".join(filter(None, (_text(answer.get("subfolder") or ""), _text(answer["name"]))))

    def queue(self, prompt: Prompt) -> str:
        """Queue a workflow; the id of its run, made here: if no answer comes, it tells whether the workflow did."""
        self._run = str(uuid.uuid4())
        try:
            texts = {"extra_pnginfo": {}}  # place for the receipt that Inf-DiT leaves in the pictures of a prompt
            body = json.dumps({"prompt": prompt, "prompt_id": self._run, "extra_data": texts}).encode()
            status, reason, answer = self._call("/api/prompt", body)
        except ServerError:
            if self._job(self._run) is None:
                raise
            return self._run
        if status == 400:
            raise ServerError(f"ComfyUI rejects the workflow: {_rejection(answer)}")
        with self._understood("/api/prompt", status, reason):
            prompt_id = json.loads(answer)["prompt_id"]
            if not re.fullmatch(r"[\w-]{1,100}", prompt_id, re.ASCII):
                raise ValueError("no id")
            self._run = prompt_id
            return prompt_id

    def wait(self, prompt_id: str, hours: float = 24) -> list[Mapping[str, str]]:
        """Wait for the end; the pictures that the workflow has saved."""
        heard, end = time.monotonic(), time.monotonic() + 3600 * hours
        while True:
            try:
                job = self._job(prompt_id)
                if job is None:
                    raise ServerError("taken out of ComfyUI's queue by somebody else, or ComfyUI was started anew")
                if job:
                    with self._understood("/api/jobs"):
                        return _saved(job)
                heard = time.monotonic()
            except ServerError:
                if time.monotonic() > heard + SILENCE:
                    raise
            if time.monotonic() > end:
                raise ServerError(f"not done after {hours:g} hours: look at ComfyUI, or give more --hours")
            if self.stop.wait(POLL):
                raise ClientError("stopped")

    def download(self, image: Mapping[str, str]) -> bytes:
        """The bytes of a picture that was saved."""
        path = f"/api/view?{urllib.parse.urlencode(image, errors='replace')}"
        status, reason, answer = self._call(path, most=MOST_OF_A_PICTURE)
        with self._understood("/api/view", status, reason):
            return answer

    def cancel(self) -> None:
        """Take our run out of the queue, or stop it, if there may be one; it is remembered if that fails."""
        for path, body in (("/api/queue", {"delete": [self._run]}), ("/api/interrupt", {"prompt_id": self._run})):
            if self._run:
                with contextlib.suppress(ClientError):
                    self._call(path, json.dumps(body).encode(), last=True)

    def check(self) -> None:
        """See whether it answers again; what it still has of ours, another has taken on."""
        self._json("/api/queue")
        self.cancel()

    def _job(self, prompt_id: str) -> dict | None:
        """What became of a run; nothing while it waits or runs, None where there is none of that id."""
        path = f"/api/jobs/{prompt_id}"
        status, reason, answer = self._call(path) if self.has_jobs else (404, "", b"")
        if status != 404:
            with self._understood(path, status, reason):
                job = dict(json.loads(answer).items())
                waits = {"pending": True, "in_progress": True, "completed": False, "failed": False, "cancelled": False}
                return {} if waits[job["status"]] else job
        if b'"error"' in answer:  # the page is there, and the run is not
            return None
        self.has_jobs = False
        if entry := self._json(f"/api/history/{prompt_id}").get(prompt_id):
            with self._understood("/api/history"):
                status = entry.get("status") or {}
                return {"status": status.get("status_str"), "execution_status": status, "outputs": entry["outputs"]}
        waiting = self._json("/api/queue")
        with self._understood("/api/queue"):
            return {} if any(prompt_id in item for items in waiting.values() for item in items) else None

    def _json(self, path: str) -> dict:
        status, reason, answer = self._call(path)
        with self._understood(path, status, reason):
            return dict(json.loads(answer).items())

    @contextlib.contextmanager
    def _understood(self, path: str, status: int = 200, reason: str = "") -> Iterator[None]:
        """Whatever an answer is that ComfyUI would not give, one sentence."""
        where = f"{self.address}{path}"
        if status != 200:
            hints = dict.fromkeys(range(300, 400), ": give the address it leads to with --server")
            hints |= dict.fromkeys((401, 403), f": give --api-key, or {KEY} in the environment")
            hints |= dict.fromkeys((404, 405, 501), ": give the address of a ComfyUI with --server")
            raise ServerError(f"{where} answers {status} {reason}{hints.get(status, '')}")
        try:
            yield
        except NONSENSE as error:
            raise ServerError(f"{where} does not answer as ComfyUI does: give the address of one") from error

    def _call(
        self, path: str, body: bytes | None = None, kind: str = "application/json", most: int = 0, last: bool = False
    ) -> tuple[int, str, bytes]:
        """Status, its reason and the content of an answer; `last`: in 5 seconds, even if all shall stop."""
        stop, patience = (threading.Event(), min(PATIENCE, 5)) if last else (self.stop, PATIENCE)
        headers = {"Content-Type": kind if body else "", "X-API-Key": self.key}
        seconds = patience * (1 + len(body or b"") / PIECE)
        try:
            sent = {name: value for name, value in headers.items() if value}
            request = urllib.request.Request(self.address + path, body, sent)
            answer = within(seconds, lambda: self._opener.open(request, timeout=seconds), stop)
            if most and answer.status in (301, 302, 303, 307, 308):  # to where a host keeps pictures: without the key
                place = urllib.parse.urljoin(request.full_url, answer.headers["Location"])
                if not re.match("https?://", place):
                    raise OSError("it leads to no address")
                answer = within(seconds, lambda: self._opener.open(place, timeout=seconds), stop)
            content = bytearray()
            while piece := within(patience, lambda: answer.read(PIECE), stop):
                content += piece
                if len(content) > (most or MOST):
                    raise OSError(f"an answer of more than {len(content) - 1} bytes")
            answer.close()
            return answer.status, answer.reason, bytes(content)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(f"no ComfyUI answers at {self.address} ({reason}): start it, or give --server") from error


def within(seconds: float, work: Callable[[], Answer], stop: threading.Event) -> Answer:
    """The result of some work, or a TimeoutError: a socket's own timeout begins anew with every byte."""
    end = time.monotonic() + seconds
    done: queue.SimpleQueue[tuple[Answer | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except Exception as error:  # noqa: BLE001 - raised below
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    while not stop.is_set() and (left := end - time.monotonic()) > 0:
        with contextlib.suppress(queue.Empty):
            result, error = done.get(timeout=min(left, 0.2))
            if error:
                raise error
            return result  # type: ignore[return-value]
    raise ClientError("stopped") if stop.is_set() else TimeoutError(f"nothing whole has come in {seconds:.0f} s")


def _address(text: str) -> tuple[str, str]:
    """An address written out, and its host."""
    try:
        parts = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port or {"http": PORT, "https": 443}[parts.scheme]
        if not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment or re.search(r"\s", text):
            raise ValueError(text)
    except (KeyError, ValueError) as error:
        raise ClientError(f"--server {text} is no address like http://127.0.0.1:{PORT}") from error
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}", parts.hostname


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, which no proxy can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host.split(".")[-1] == "localhost"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _saved(job: Mapping) -> list[Mapping[str, str]]:
    """The pictures of a run that has ended."""
    messages = dict((job.get("execution_status") or {}).get("messages") or [])
    if "execution_interrupted" in messages or job["status"] == "cancelled":
        raise ClientError("stopped in ComfyUI")
    if "execution_error" in messages or job["status"] in ("failed", "error"):
        error = messages.get("execution_error") or job.get("execution_error") or {}
        words = _text(error.get("exception_message") or "no reason given").strip()
        raise AttemptError(f"{_text(error.get('node_type') or 'ComfyUI')}: {words}")
    images = [image for output in job["outputs"].values() for image in output.get("images") or []]
    keys = ("filename", "subfolder", "type")
    saved: list[Mapping[str, str]] = [{key: _text(image.get(key) or "") for key in keys} for image in images]
    return [image for image in saved if image["type"] == "output"] or saved


def _rejection(answer: bytes) -> str:
    """ComfyUI's reasons for not queueing a workflow, in one line."""
    try:
        told = json.loads(answer)
        reasons = [
            f"{node['class_type']}: {error['message']} ({error['details']})"
            for node in (told.get("node_errors") or {}).values()
            for error in node["errors"]
        ]
        return "; ".join(reasons) or _text(told["error"]["message"])
    except NONSENSE:
        return answer[:300].decode(errors="replace") or "no reason given"


# ---- the workflow


def read_workflow(path: Path) -> Prompt:
    """A workflow in API format, as exported by ComfyUI's File → Export (API)."""
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClientError(f"{path} cannot be read ({error}): give --workflow") from error
    nodes = prompt.values() if isinstance(prompt, dict) else [None]
    if not all(isinstance(n, dict) and isinstance(n.get("inputs"), dict) and "class_type" in n for n in nodes):
        raise ClientError(f"{path} is not in API format: export it with File → Export (API)")
    return prompt


def nodes_of(prompt: Prompt, kind: str) -> list[dict]:
    """Nodes of one class."""
    return [node for node in prompt.values() if node["class_type"] == kind]


def image_of(prompt: Prompt) -> str:
    """The picture's name in Load Image."""
    return nodes_of(prompt, "LoadImage")[0]["inputs"]["image"]


def with_image(prompt: Prompt, name: str) -> Prompt:
    """The workflow with a picture's name in Load Image."""
    copy = {key: {**node, "inputs": {**node["inputs"]}} for key, node in prompt.items()}
    nodes_of(copy, "LoadImage")[0]["inputs"]["image"] = name
    return copy


def change(prompt: Prompt, setting: str) -> None:
    """Apply NODE.INPUT=VALUE, such as InfDiTUpscale.size.scale=2, to all nodes of that class."""
    target, given, value = setting.partition("=")
    kind, _, name = target.partition(".")
    nodes = nodes_of(prompt, kind)
    if not (given and name and nodes):
        known = ", ".join(sorted({node["class_type"] for node in prompt.values()}))
        raise ClientError(f"--set {setting} is not NODE.INPUT=VALUE with one of the nodes {known}")
    try:
        parsed = json.loads(value)
    except (RecursionError, ValueError):
        parsed = value
    for node in nodes:
        inputs = node["inputs"]
        if name not in inputs and name.partition(".")[0] not in inputs:  # size.width may come in for size.scale
            raise ClientError(f"{kind} has no input {name}, only {', '.join(inputs)}")
        inputs[name] = value if isinstance(inputs.get(name), str) else parsed  # a text may be all digits


# ---- results


def read_png(data: bytes) -> Prompt | None:
    """Check that a PNG is whole, as Save Image writes them; the workflow that Save Image has put into it.

    Raises:
        ValueError: what is wrong with it.
    """
    inflate, prompt, expected, found = zlib.decompressobj(), None, 0, 0
    try:
        for kind, content in _chunks(data):
            if kind == b"IHDR":
                width, height, depth, colour, *_, interlaced = struct.unpack(">IIBBBBB", content)
                row = width * {0: 1, 2: 3, 4: 2, 6: 4}[colour] * {8: 1, 16: 2}[depth]
                expected = height * (row + 1) if row and not interlaced else 0
            elif kind == b"IDAT":
                for start in range(0, len(content), 2**16):  # which a bomb makes 64 MiB of
                    found += len(inflate.decompress(content[start : start + 2**16]))
            elif kind == b"tEXt" and content.startswith(b"prompt\0"):
                with contextlib.suppress(ValueError, RecursionError):
                    prompt = json.loads(content[7:])
    except (LookupError, struct.error, zlib.error) as error:
        raise ValueError(f"no PNG as Save Image writes it ({error})") from error
    if not 0 < found == expected or not inflate.eof:
        raise ValueError(f"{found} bytes of pixels where {expected} are needed")
    return prompt


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each part of a PNG."""
    kind, place, view = b"", 8, memoryview(data)
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        if struct.unpack_from(">I", data, end)[0] != zlib.crc32(view[place + 4 : end]):
            raise ValueError("a checksum is wrong")
        yield kind, data[place + 8 : end]
        place = end + 4


def settings_of(prompt: Prompt) -> dict:
    """What makes a workflow what it is: ComfyUI adds keys of its own to the nodes."""
    return {i: (node["class_type"], node["inputs"]) for i, node in prompt.items()}


def write_whole(result: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    part = result.with_name(f".{secrets.token_hex(8)}.part")
    try:
        part.write_bytes(data)
        part.replace(result)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a run has left that was killed while it wrote; what is younger than an hour may be another's."""
    for part in folder.glob(f".{'[0-9a-f]' * 16}.part"):
        with contextlib.suppress(OSError):
            if part.stat().st_mtime < time.time() - 3600:
                part.unlink()


def open_receipts(folder: Path) -> int:
    """A file to which lines can be added; it also shows, before the work, that results can be written."""
    how = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # a link may lead out of the folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / RECEIPTS, how, 0o666)
    except OSError as error:
        raise ClientError(f"{folder / RECEIPTS} cannot be written ({error.strerror}): give another -o") from error


# ---- the folder


@dataclass
class Picture:
    """A picture, where its result goes, and the servers that could not make it."""

    path: Path
    result: Path
    tried: set[Server] = field(default_factory=set)


def read_picture(path: Path) -> bytes:
    """The bytes of a picture."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise PictureError(f"it cannot be read ({error.strerror})") from error


def upload_name(path: Path, content: bytes) -> str:
    """A picture's name as every system can have it, and no other picture: a PNG that tells it tells its origin."""
    stem = path.stem.encode(errors="surrogateescape")[:100].decode(errors="replace")  # 255 bytes are allowed in all
    return hashlib.sha256(content).hexdigest()[:16] + " " + re.sub(r"[^\w. ()+,-]", "_", stem + path.suffix)


def find_pictures(folder: Path) -> tuple[list[Path], str]:
    """The pictures in a folder, by name, without those of its subfolders; and what is left out, in words."""
    try:
        there = sorted(folder.iterdir())
        found = [path for path in there if _is_picture(path)]
        folders = sum(path.is_dir() for path in there)
    except OSError as error:
        raise ClientError(f"{folder} cannot be opened ({error.strerror}): give a folder") from error
    others = [path for path in there if path not in found and not path.is_dir()]
    kinds = Counter("hidden" if path.name.startswith(".") else path.suffix.lower() or "no ending" for path in others)
    words = [f"{count} folder{'s' * (count > 1)}" for count in [folders] if count]
    words += [f"{count} × {kind}" for kind, count in sorted(kinds.items())]
    left_out = ", ".join(words)
    if not found:
        also = f", only {left_out}" if left_out else ""
        raise ClientError(f"{folder} has no pictures ({', '.join(sorted(PICTURES))}){also}")
    return found, left_out


def _is_picture(path: Path) -> bool:
    # ._x.png is what macOS notes about x.png on the disks of others
    return path.suffix.lower() in PICTURES and not path.name.startswith(".") and path.is_file()


def is_there(result: Path, prompt: Prompt, picture: Path) -> str:
    """In words, that a result is there, or nothing.

    Raises:
        PictureError: something else has its name: it was made otherwise, or it is no picture.
    """
    try:
        made = read_png(result.read_bytes())
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{result} is there, but no whole picture ({reason}): make it anew with --force") from error
    prompt = with_image(prompt, f"{UPLOADS}/{upload_name(picture, read_picture(picture))}")
    try:
        if made is None:
            return "is there already, made with settings that it does not tell"
        same = settings_of(made) == settings_of(prompt)
    except NONSENSE:
        same = False
    if not same:
        what = "made with other settings, or of another picture"
        raise PictureError(f"{result} is there, {what}: give another -o, or --force")
    return "is there already"


def result_names(pictures: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where results go: NAME.png; NAME.jpg.png where another picture is called NAME too, in the eyes of any disk."""
    stems, names = Counter(p.stem.casefold() for p in pictures), {p.name.casefold() for p in pictures}
    alone = {p: stems[p.stem.casefold()] == 1 and p.stem.casefold() not in names for p in pictures}
    return {p: folder / f"{p.stem if alone[p] else p.name}.png" for p in pictures}


def upscale(server: Server, prompt: Prompt, picture: Picture, receipts: int, hours: float = 24) -> str:
    """One picture, from upload to result; what is said of it."""
    began = time.monotonic()
    try:
        prompt = with_image(prompt, server.upload(picture.path))
        prompt_id = server.queue(prompt)
        images = server.wait(prompt_id, hours)
    except ClientError:
        server.cancel()
        raise
    if not images:
        raise ServerError("the workflow saves no picture: give one with Save Image")
    name = "/".join(filter(None, (images[0]["subfolder"], images[0]["filename"])))
    kept = f"ComfyUI has kept the result in its {images[0]['type'] or 'output'} folder as {name}"
    made = {"picture": picture.path.name, "result": picture.result.name, "server": server.address}
    try:
        write_whole(picture.result, picture_of(server, prompt, images[0]))
        server.seconds = time.monotonic() - began
        ended = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        made |= {"prompt_id": prompt_id, "seconds": round(server.seconds, 2), "ended": ended}
    except ServerError as error:
        raise ServerError(f"{error}; {kept}") from error
    except OSError as error:
        message = f"{picture.result} cannot be written ({error.strerror}): make room, or give another -o; {kept}"
        raise ClientError(message) from error
    try:
        os.write(receipts, json.dumps(made).encode() + b"\n")
    except OSError as error:
        message = f"{picture.result} is there, but no receipt can be written beside it ({error.strerror}): make room"
        raise ClientError(message) from error
    also = "" if len(images) == 1 else f", the first of {len(images)}; the others are in ComfyUI's output folder"
    return f"{server.seconds:.1f} s on {server.address} → {picture.result}{also}"


def picture_of(server: Server, prompt: Prompt, image: Mapping[str, str]) -> bytes:
    """The bytes of what a workflow has made, whole, and of the picture that it was made for."""
    data = server.download(image)
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ServerError("the workflow saves no PNG: let it end in Save Image")
    try:
        made = read_png(data)
        if made is not None and image_of(made) != image_of(prompt):
            raise ValueError("it is another picture")
    except NONSENSE as error:
        raise ServerError(f"what {server.address} sends is damaged ({error})") from error
    return data


class Crew:
    """Servers that share a queue of pictures, with a thread each.

    make: what a server is to do with a picture; it gives what is said of it. say: takes the parts of a line.
    """

    def __init__(self, servers: Sequence[Server], pictures: Sequence[Picture], make: Make, say: Say) -> None:
        self.servers, self.waiting, self.make, self.say = servers, deque(pictures), make, say
        self.total, self.done, self.failed = len(pictures), 0, 0
        self.resting: dict[Server, ServerError] = {}
        self.error: BaseException | None = None
        self.changed = threading.Condition()

    def run(self, stop: threading.Event) -> int:
        """Wait until all is done; the number of pictures that failed."""
        threads = [threading.Thread(target=self._serve, args=(server,), daemon=True) for server in self.servers]
        for thread in threads:
            thread.start()
        try:
            with self.changed:
                while not self._is_over():
                    self.changed.wait(0.5)  # between two waits Windows hears Ctrl+C
        finally:
            stop.set()
            for thread in threads:
                thread.join(15)
        if self.error:
            raise self.error
        return self.failed

    def _is_over(self) -> bool:
        return self.error is not None or self.done == self.total

    def _serve(self, server: Server) -> None:
        """What one thread does: picture after picture."""
        rest = REST
        try:
            while picture := self._take(server):
                try:
                    self._tell(picture, self.make(server, picture))
                    rest = REST
                except PictureError as error:
                    self._tell(picture, f"failed: {error}", failed=True)
                except AttemptError as error:
                    self._try_elsewhere(server, picture, error)
                except ServerError as error:
                    self._rest(server, picture, error, rest)
                    rest = min(2 * rest, LONGEST_REST)
        except BaseException as error:  # noqa: BLE001 - run raises it
            with self.changed:
                self.error = error if not self._is_over() else self.error
                self.changed.notify_all()

    def _take(self, server: Server) -> Picture | None:
        """The next picture for a server, waited for; None when all is over."""
        with self.changed:
            while not self._is_over():
                if picture := next((p for p in self.waiting if self._is_for(server, p)), None):
                    self.waiting.remove(picture)
                    return picture
                self.changed.wait(0.5)
        return None

    def _is_for(self, server: Server, picture: Picture) -> bool:
        """Whether a server takes a picture: not if others have yet to try it, or would be done with all sooner."""
        others = [other for other in self.servers if other is not server and other not in self.resting]
        if server in picture.tried:
            return not set(others) - picture.tried
        speeds = [1 / other.seconds for other in others if other.seconds and other not in picture.tried]
        return server.seconds * sum(speeds) <= len(self.waiting) + len(speeds)

    def _tell(self, picture: Picture, said: str, failed: bool = False) -> None:
        with self.changed:
            self.done += 1
            self.failed += failed
            self.say(f"{self.done} of {self.total}", picture.path.name, said)
            self.changed.notify_all()

    def _try_elsewhere(self, server: Server, picture: Picture, error: AttemptError) -> None:
        with self.changed:
            picture.tried.add(server)
            if again := bool(set(self.servers) - picture.tried - self.resting.keys()):
                self.waiting.append(picture)
                self.changed.notify_all()
        if not again:
            self._tell(picture, f"failed: {error}", failed=True)

    def _rest(self, server: Server, picture: Picture, error: ServerError, seconds: float) -> None:
        """Leave a server alone until it answers again; others take its picture."""
        with self.changed:
            self.waiting.appendleft(picture)
            self.resting[server] = error
            if len(self.resting) == len(self.servers):
                raise ClientError("; ".join(dict.fromkeys(map(str, self.resting.values()))))
            self.say(f"{server.address} is left out for now: {error}")
            self.changed.notify_all()
        while not server.stop.wait(seconds):
            with contextlib.suppress(ServerError):
                server.check()
                break
            seconds = min(2 * seconds, LONGEST_REST)
        with self.changed:
            del self.resting[server]


def open_servers(addresses: Sequence[str], key: str, stop: threading.Event) -> list[Server]:
    """Each server once. The key goes over https to one host, or to this machine: never where others could read it."""
    servers = list({server.address: server for server in (Server(address, stop) for address in addresses)}.values())
    trusted = [s for s in servers if s.address.startswith("https:")] or [s for s in servers if is_loopback(s.host)]
    if key and not re.fullmatch("[!-~]+", key):
        raise ClientError("the API key has characters that no header can have")
    if key and len({server.host for server in trusted}) != 1:
        hosts = " and ".join(sorted({server.host for server in trusted})) or "no server with https"
        raise ClientError(f"the API key would go to {hosts}: run this once for the host that it belongs to")
    for server in trusted:
        server.key = key
    return servers


def run(arguments: argparse.Namespace, say: Say) -> int:
    """All pictures; the number of those that failed."""
    prompt, stop = read_workflow(arguments.workflow), threading.Event()
    if len(nodes_of(prompt, "LoadImage")) != 1:
        raise ClientError(f"{arguments.workflow} must have one Load Image, for the picture")
    for setting in arguments.set:
        change(prompt, setting)
    servers = open_servers(arguments.server or [f"127.0.0.1:{PORT}"], arguments.api_key, stop)
    found, left_out = find_pictures(arguments.folder)
    if arguments.output.resolve() == arguments.folder.resolve():
        raise ClientError("the output folder is the input folder: give another one")
    receipts = open_receipts(arguments.output)
    sweep(arguments.output)
    if left_out:
        say(f"left out: {left_out}")

    def make(server: Server, picture: Picture) -> str:
        there = "" if arguments.force else is_there(picture.result, prompt, picture.path)
        return there or upscale(server, prompt, picture, receipts, arguments.hours)

    pictures = [Picture(path, result) for path, result in result_names(found, arguments.output).items()]
    try:
        return Crew(servers, pictures, make, say).run(stop)
    finally:
        if not stop.is_set():  # else a thread may still write to it
            os.close(receipts)


def main(argv: Sequence[str] | None = None) -> int:
    """0: all done; 1: some pictures failed; 2: it could not go on; 130: stopped; 141: nobody reads what it says."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the console is: it must not turn success into failure
            stream.reconfigure(encoding="utf-8", errors="replace")
    arguments = _parser().parse_args(argv)

    def say(*texts: str, stream: TextIO | None = None) -> None:
        line = "  ".join(map(plain, texts))
        hidden = line.replace(arguments.api_key, "***") if arguments.api_key else line  # a server may echo it
        print(hidden, file=stream, flush=True)

    try:
        return 1 if run(arguments, say) else 0
    except ClientError as error:
        say(f"error: {error}", stream=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except OSError as error:  # of stdout: all others are told above
        if isinstance(sys.stdout, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())  # Python would try again at exit, and complain
        if isinstance(error, BrokenPipeError):  # whoever read has read enough, like `head`
            return 141
        print(f"error: what is said cannot be written ({error.strerror})", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Upscale a folder of pictures on running ComfyUIs.")
    parser.add_argument("folder", type=Path, help="folder with the pictures")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results, as PNG")
    parser.add_argument(
        "--server", action="append", help=f"address of a ComfyUI; again for each more (default: 127.0.0.1:{PORT})"
    )
    key_help = f"for a hosted server, by https; better in the environment, as {KEY}, for others see a command line"
    parser.add_argument("--api-key", default=os.environ.get(KEY, ""), metavar="KEY", help=key_help)
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="in API format, with one Load Image")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="such as InfDiTUpscale.size.scale=2"
    )
    parser.add_argument("--hours", type=float, default=24, help="time for one picture, waiting included (default 24)")
    parser.add_argument("--force", action="store_true", help="make results anew that are there already")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop, as by Ctrl+C
    sys.exit(main())

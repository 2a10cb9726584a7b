"""Upscales a folder of pictures on a running ComfyUI, one after another, through its HTTP interface.

    python upscale_folder.py photos/ -o photos_x4/ [--server http://127.0.0.1:8188]

For each picture: upload it, queue `workflows/api/Upscale a picture with Inf-DiT.json` with its name in Load Image, wait
until the history has it, download what was saved. Any other workflow in API format with one Load Image and a Save
Image will do (--workflow). Pictures whose result is there already are left out, so a run that was stopped goes on where
it was; the settings that made a result are read from the PNG. Needs nothing but Python: copy the file and the workflow
wherever you like.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # Windows, which deletes no file that somebody holds open
    fcntl = None

WORKFLOW = Path(__file__).resolve().parent.parent / "workflows" / "api" / "Upscale a picture with Inf-DiT.json"
PICTURES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
UPLOADS = "upscale_folder"  # folder for the uploaded pictures in ComfyUI's input folder
PORT = 8188
POLL = 0.5  # seconds between two looks at the history
PATIENCE = 60.0  # seconds in which the server must begin to answer, and each PIECE must have come
PIECE = 2**20  # bytes
MOST = 2**28  # bytes of an answer that is no picture
MOST_OF_A_PICTURE = 2**32
NONSENSE = (AttributeError, LookupError, RecursionError, TypeError, ValueError)  # of JSON with other things in it

Prompt = dict[str, dict]  # a workflow in API format: node id → class_type and inputs
Answer = TypeVar("Answer")


class ClientError(Exception):
    """What went wrong, in one sentence. `fatal`: it would go wrong with every other picture too."""

    def __init__(self, message: str, fatal: bool = False) -> None:
        super().__init__(plain(message))
        self.fatal = fatal


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

    Whatever answers, a call ends in bounded time, with what ComfyUI would give or with a ClientError.
    """

    def __init__(self, address: str) -> None:
        self.address, host = _address(address)
        direct = [urllib.request.ProxyHandler({})] if _is_loopback(host) else []
        self._opener = urllib.request.build_opener(_AsTheyCome, *direct)

    def upload(self, path: Path) -> str:
        """Put a picture into ComfyUI's input folder; its name for Load Image."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ClientError(f"it cannot be read ({error.strerror})") from error
        boundary = uuid.uuid4().hex
        fields = {'"subfolder"': UPLOADS, '"overwrite"': "true", f'"image"; filename="{upload_name(path)}"': ""}
        head = f"--{boundary}\r\nContent-Disposition: form-data; name="
        text = "\r\n".join(f"{head}{field}\r\n\r\n{value}" for field, value in fields.items())
        body = text.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        status, reason, answer = self._call("/upload/image", body, f"multipart/form-data; boundary={boundary}")
        if status == 413:
            raise ClientError("it is too large for ComfyUI: start that with a larger --max-upload-size")
        with self._understood("/upload/image", status, reason):
            answer = json.loads(answer)
            return "/".join(filter(None, (_text(answer.get("subfolder") or ""), _text(answer["name"]))))

    def queue(self, prompt: Prompt) -> str:
        """Queue a workflow; the id under which the history will have it."""
        status, reason, answer = self._call("/prompt", json.dumps({"prompt": prompt}).encode())
        if status == 400:
            raise ClientError(f"ComfyUI rejects the workflow: {_rejection(answer)}", fatal=True)
        with self._understood("/prompt", status, reason):
            prompt_id = json.loads(answer)["prompt_id"]
            if not re.fullmatch(r"[\w-]{1,100}", prompt_id, re.ASCII):
                raise ValueError("no id")
            return prompt_id

    def wait(self, prompt_id: str, hours: float = 24) -> list[Mapping[str, str]]:
        """Wait for the end; the pictures that the workflow has saved."""
        missed, end = 0, time.monotonic() + 3600 * hours
        while not (entry := self._json(f"/history/{prompt_id}").get(prompt_id)):
            waiting = self._json("/queue")
            with self._understood("/queue"):
                known = any(prompt_id in item for items in waiting.values() for item in items)
            missed = 0 if known else missed + 1
            if missed > 2:  # not only between the queue and the history
                raise ClientError("taken out of ComfyUI's queue by somebody else", fatal=True)
            if time.monotonic() > end:
                self.cancel(prompt_id)
                raise ClientError(f"not done after {hours:g} hours: look at ComfyUI, or give more --hours", fatal=True)
            time.sleep(POLL)
        with self._understood("/history"):
            status = entry.get("status") or {}
            messages = dict(status.get("messages") or [])
            if "execution_interrupted" in messages:
                raise ClientError("stopped in ComfyUI", fatal=True)
            if "execution_error" in messages or status.get("status_str") == "error":
                error = messages.get("execution_error") or {}
                words = _text(error.get("exception_message") or "no reason given").strip()
                raise ClientError(f"{_text(error.get('node_type') or 'ComfyUI')}: {words}")
            images = [image for output in entry["outputs"].values() for image in output.get("images") or []]
            keys = ("filename", "subfolder", "type")
            saved: list[Mapping[str, str]] = [{key: _text(image.get(key) or "") for key in keys} for image in images]
        return [image for image in saved if image["type"] == "output"] or saved

    def download(self, image: Mapping[str, str]) -> bytes:
        """The bytes of a picture that was saved."""
        query = urllib.parse.urlencode(image, errors="replace")
        status, reason, answer = self._call(f"/view?{query}", most=MOST_OF_A_PICTURE)
        with self._understood("/view", status, reason):
            return answer

    def cancel(self, prompt_id: str) -> None:
        """Take a workflow out of the queue, or stop it if it runs; nothing is said if that fails."""
        for path, body in (("/queue", {"delete": [prompt_id]}), ("/interrupt", {"prompt_id": prompt_id})):
            with contextlib.suppress(ClientError):
                self._call(path, json.dumps(body).encode(), patience=5)

    def _json(self, path: str) -> dict:
        status, reason, answer = self._call(path)
        with self._understood(path, status, reason):
            return dict(json.loads(answer).items())

    @contextlib.contextmanager
    def _understood(self, path: str, status: int = 200, reason: str = "") -> Iterator[None]:
        """Whatever an answer is that ComfyUI would not give, one sentence."""
        where = f"{self.address}{path}"
        if status != 200:
            hint = ": give the address it leads to with --server" if status in range(300, 400) else ""
            raise ClientError(f"{where} answers {status} {reason}{hint}", fatal=True)
        try:
            yield
        except NONSENSE as error:
            message = f"{where} does not answer as ComfyUI does: give the address of one with --server"
            raise ClientError(message, fatal=True) from error

    def _call(
        self,
        path: str,
        body: bytes | None = None,
        kind: str = "application/json",
        most: int | None = None,
        patience: float | None = None,
    ) -> tuple[int, str, bytes]:
        """Status, its reason and the content of an answer."""
        patience = patience or PATIENCE
        try:
            request = urllib.request.Request(self.address + path, body, {"Content-Type": kind} if body else {})
            seconds = patience * (1 + len(body or b"") / PIECE)
            answer = within(seconds, lambda: self._opener.open(request, timeout=seconds))
            content = bytearray()
            while piece := within(patience, lambda: answer.read(PIECE)):
                content += piece
                if len(content) > (most or MOST):
                    raise OSError(f"an answer of more than {len(content) - 1} bytes")
            answer.close()
            return answer.status, answer.reason, bytes(content)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            message = f"no ComfyUI answers at {self.address} ({reason}): start it, or give --server"
            raise ClientError(message, fatal=True) from error


def within(seconds: float, work: Callable[[], Answer]) -> Answer:
    """The result of some work, or a TimeoutError: a socket's own timeout begins anew with every byte."""
    done: queue.SimpleQueue[tuple[Answer | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except Exception as error:  # noqa: BLE001 - raised below
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"nothing whole has come in {seconds:.0f} s") from None
    if error:
        raise error
    return result  # type: ignore[return-value]


def _address(text: str) -> tuple[str, str]:
    """An address written out, and its host."""
    try:
        parts = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port or {"http": PORT, "https": 443}[parts.scheme]
        if not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment or re.search(r"\s", text):
            raise ValueError(text)
    except (KeyError, ValueError) as error:
        raise ClientError(f"--server {text} is no address like http://127.0.0.1:{PORT}", fatal=True) from error
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}", parts.hostname


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine, which no proxy can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host.split(".")[-1] == "localhost"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def upload_name(path: Path) -> str:
    """A picture's name as every system can have it."""
    return re.sub(r"[^\w. ()+,-]", "_", path.name)


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
        raise ClientError(f"{path} cannot be read ({error}): give --workflow", fatal=True) from error
    nodes = prompt.values() if isinstance(prompt, dict) else [None]
    if not all(isinstance(n, dict) and isinstance(n.get("inputs"), dict) and "class_type" in n for n in nodes):
        raise ClientError(f"{path} is not in API format: export it with File → Export (API)", fatal=True)
    return prompt


def nodes_of(prompt: Prompt, kind: str) -> list[dict]:
    """Nodes of one class."""
    return [node for node in prompt.values() if node["class_type"] == kind]


def image_of(prompt: Prompt) -> dict:
    """The inputs of Load Image, whose "image" is the picture's name."""
    return nodes_of(prompt, "LoadImage")[0]["inputs"]


def change(prompt: Prompt, setting: str) -> None:
    """Apply NODE.INPUT=VALUE, such as InfDiTUpscale.size.scale=2, to all nodes of that class."""
    target, given, value = setting.partition("=")
    kind, _, name = target.partition(".")
    nodes = nodes_of(prompt, kind)
    if not (given and name and nodes):
        known = ", ".join(sorted({node["class_type"] for node in prompt.values()}))
        raise ClientError(f"--set {setting} is not NODE.INPUT=VALUE with one of the nodes {known}", fatal=True)
    try:
        parsed = json.loads(value)
    except (RecursionError, ValueError):
        parsed = value
    for node in nodes:
        inputs = node["inputs"]
        if name not in inputs and name.partition(".")[0] not in inputs:  # size.width may come in for size.scale
            raise ClientError(f"{kind} has no input {name}, only {', '.join(inputs)}", fatal=True)
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


@contextlib.contextmanager
def reserved(result: Path) -> Iterator[Callable[[bytes], None]]:
    """A place for a result, found before the work: a function that writes it, whole or not at all.

    Its hidden file is locked as long as this process lives, which tells it from what a killed one has left.
    """
    part = result.with_name(f".{secrets.token_hex(8)}.part")
    try:
        file = part.open("xb")
    except OSError as error:
        message = f"{result.parent} cannot be written ({error.strerror}): give another -o"
        raise ClientError(message, fatal=True) from error

    def write(data: bytes) -> None:
        file.write(data)
        file.close()
        part.replace(result)

    try:
        if fcntl:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield write
    finally:
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the hidden files that a killed run has left."""
    for part in folder.glob(f".{'[0-9a-f]' * 16}.part"):
        with contextlib.suppress(OSError):
            if fcntl:
                with part.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


# ---- the folder


def find_pictures(folder: Path) -> tuple[list[Path], str]:
    """The pictures in a folder, by name, without those of its subfolders; and what is left out, in words."""
    try:
        there = sorted(folder.iterdir())
        found = [path for path in there if _is_picture(path)]
        folders = sum(path.is_dir() for path in there)
    except OSError as error:
        raise ClientError(f"{folder} cannot be opened ({error.strerror}): give a folder", fatal=True) from error
    others = [path for path in there if path not in found and not path.is_dir()]
    kinds = Counter("hidden" if path.name.startswith(".") else path.suffix.lower() or "no ending" for path in others)
    words = [f"{count} folder{'s' * (count > 1)}" for count in [folders] if count]
    words += [f"{count} × {kind}" for kind, count in sorted(kinds.items())]
    left_out = ", ".join(words)
    if not found:
        also = f", only {left_out}" if left_out else ""
        raise ClientError(f"{folder} has no pictures ({', '.join(sorted(PICTURES))}){also}", fatal=True)
    return found, left_out


def _is_picture(path: Path) -> bool:
    # ._x.png is what macOS notes about x.png on the disks of others
    return path.suffix.lower() in PICTURES and not path.name.startswith(".") and path.is_file()


def upscale(server: Server, prompt: Prompt, picture: Path, result: Path, hours: float = 24) -> str:
    """One picture, from upload to result; what else there is to say. A result is there whole or not at all."""
    with reserved(result) as write:
        image_of(prompt)["image"] = server.upload(picture)
        prompt_id = server.queue(prompt)
        try:
            images = server.wait(prompt_id, hours)
        except KeyboardInterrupt:
            server.cancel(prompt_id)
            raise
        if not images:
            raise ClientError("the workflow saves no picture: give one with Save Image", fatal=True)
        name = "/".join(filter(None, (images[0]["subfolder"], images[0]["filename"])))
        kept = f"ComfyUI has kept the result in its {images[0]['type'] or 'output'} folder as {name}"
        try:
            data = server.download(images[0])
            if not data.startswith(b"\x89PNG\r\n\x1a\n"):
                raise ClientError("the workflow saves no PNG: let it end in Save Image", fatal=True)
            read_png(data)
            write(data)
        except ClientError as error:
            raise ClientError(f"{error}; {kept}", error.fatal) from error
        except ValueError as error:
            raise ClientError(f"what {server.address} sends is damaged ({error}); {kept}") from error
        except OSError as error:
            message = f"{result} cannot be written ({error.strerror}): make room, or give another -o; {kept}"
            raise ClientError(message, fatal=True) from error
    return "" if len(images) == 1 else f", the first of {len(images)}; the others are in ComfyUI's output folder"


def is_there(result: Path, prompt: Prompt, picture: Path) -> str:
    """In words, that a result is there, or nothing.

    Raises:
        ClientError: something else has its name: other settings made it, or it is no picture.
    """
    try:
        made = read_png(result.read_bytes())
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ClientError(f"{result} is there, but no whole picture ({reason}): make it anew with --force") from error
    image_of(prompt)["image"] = f"{UPLOADS}/{upload_name(picture)}"
    try:
        if made is None:
            return "is there already, made with settings that it does not tell"
        same = settings_of(made) == settings_of(prompt)
    except NONSENSE:
        same = False
    if not same:
        raise ClientError(f"{result} is there, made with other settings: give another -o, or --force")
    return "is there already"


def result_names(pictures: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where results go: NAME.png; NAME.jpg.png where another picture is called NAME too, in the eyes of any disk."""
    stems, names = Counter(p.stem.casefold() for p in pictures), {p.name.casefold() for p in pictures}
    alone = {p: stems[p.stem.casefold()] == 1 and p.stem.casefold() not in names for p in pictures}
    return {p: folder / f"{p.stem if alone[p] else p.name}.png" for p in pictures}


def run(arguments: argparse.Namespace) -> int:
    """All pictures; the number of those that failed."""
    prompt = read_workflow(arguments.workflow)
    if len(nodes_of(prompt, "LoadImage")) != 1:
        raise ClientError(f"{arguments.workflow} must have one Load Image, for the picture", fatal=True)
    for setting in arguments.set:
        change(prompt, setting)
    pictures, left_out = find_pictures(arguments.folder)
    if arguments.output.resolve() == arguments.folder.resolve():
        raise ClientError("the output folder is the input folder: give another one", fatal=True)
    results, server, failed = result_names(pictures, arguments.output), Server(arguments.server), 0
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{arguments.output} cannot be made ({error.strerror}): give another -o"
        raise ClientError(message, fatal=True) from error
    sweep(arguments.output)
    if left_out:
        print(f"left out: {plain(left_out)}", flush=True)
    for number, (picture, result) in enumerate(results.items(), 1):
        print(f"{number} of {len(results)}  {plain(picture.name)}", end="  ", flush=True)
        began = time.monotonic()
        try:
            said = "" if arguments.force else is_there(result, prompt, picture)
            if not said:
                also = upscale(server, prompt, picture, result, arguments.hours)
                said = f"{time.monotonic() - began:.1f} s → {result}{also}"
        except ClientError as error:
            if error.fatal:
                print(flush=True)
                raise
            said = f"failed: {error}"
            failed += 1
        print(plain(said), flush=True)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """0: all done; 1: some pictures failed; 2: it could not go on; 130: stopped; 141: nobody reads what it says."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the console is: it must not turn success into failure
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        return 1 if run(_parser().parse_args(argv)) else 0
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
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
    parser = argparse.ArgumentParser(description="Upscale a folder of pictures on a running ComfyUI.")
    parser.add_argument("folder", type=Path, help="folder with the pictures")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results, as PNG")
    parser.add_argument("--server", default=f"127.0.0.1:{PORT}", help="address of ComfyUI (default: %(default)s)")
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

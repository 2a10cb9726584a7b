"""Upscales a folder of pictures on a running ComfyUI, one after another, through its HTTP interface.

    python upscale_folder.py photos/ -o photos_x4/ [--server http://127.0.0.1:8188]

For each picture: upload it, queue `workflows/api/upscale_a_picture.json` with its name in Load Image, wait until the
history has it, download what was saved. Any other workflow in API format with one Load Image will do (--workflow).
Pictures whose result is there already are left out, so a run that was stopped goes on where it was. Needs nothing but
Python: copy the file and the workflow wherever you like.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

WORKFLOW = Path(__file__).resolve().parent.parent / "workflows" / "api" / "upscale_a_picture.json"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
UPLOADS = "upscale_folder"  # folder for the uploaded pictures in ComfyUI's input folder
POLL = 0.5  # seconds between two looks at the history
PATIENCE = 60  # seconds for one answer of the server

Prompt = dict[str, dict]  # a workflow in API format: node id → class_type and inputs


class ClientError(Exception):
    """What went wrong, in one sentence. `fatal`: it would go wrong with every other picture too."""

    def __init__(self, message: str, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


# ---- ComfyUI


class Server:
    """The few calls that are needed of ComfyUI's HTTP interface."""

    def __init__(self, address: str) -> None:
        self.address = (address if "://" in address else f"http://{address}").rstrip("/")

    def upload(self, path: Path) -> str:
        """Put a picture into ComfyUI's input folder; its name for Load Image."""
        boundary = uuid.uuid4().hex
        name = re.sub(r'[\\"\r\n]', "_", path.name)
        fields = {'"subfolder"': UPLOADS, '"overwrite"': "true", f'"image"; filename="{name}"': ""}
        head = f"--{boundary}\r\nContent-Disposition: form-data; name="
        text = "\r\n".join(f"{head}{field}\r\n\r\n{value}" for field, value in fields.items())
        body = text.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        answer = self._json("/upload/image", body, f"multipart/form-data; boundary={boundary}")
        return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else answer["name"]

    def queue(self, prompt: Prompt) -> str:
        """Queue a workflow; the id under which the history will have it."""
        try:
            return self._json("/prompt", json.dumps({"prompt": prompt}).encode())["prompt_id"]
        except urllib.error.HTTPError as error:
            raise ClientError(f"ComfyUI rejects the workflow: {_rejection(error.read())}", fatal=True) from error

    def wait(self, prompt_id: str) -> list[Mapping[str, str]]:
        """Wait for the end; the pictures that the workflow has saved."""
        missed = 0
        while not (entry := self._json(f"/history/{prompt_id}").get(prompt_id)):
            waiting = self._json("/queue")
            known = any(prompt_id in item for items in waiting.values() for item in items)
            missed = 0 if known else missed + 1
            if missed > 2:  # not only between the queue and the history
                raise ClientError("taken out of ComfyUI's queue by somebody else", fatal=True)
            time.sleep(POLL)
        messages = dict(entry.get("status", {}).get("messages", []))
        if "execution_error" in messages:
            error = messages["execution_error"]
            raise ClientError(f"{error['node_type']}: {error['exception_message'].strip()}")
        if "execution_interrupted" in messages:
            raise ClientError("stopped in ComfyUI", fatal=True)
        saved = [image for output in entry["outputs"].values() for image in output.get("images", [])]
        return [image for image in saved if image.get("type") == "output"] or saved

    def download(self, image: Mapping[str, str]) -> bytes:
        """The bytes of a picture that was saved."""
        query = urllib.parse.urlencode({key: image.get(key, "") for key in ("filename", "subfolder", "type")})
        return self._call(f"/view?{query}")

    def cancel(self, prompt_id: str) -> None:
        """Take a workflow out of the queue, or stop it if it runs."""
        self._call("/queue", json.dumps({"delete": [prompt_id]}).encode())
        self._call("/interrupt", json.dumps({"prompt_id": prompt_id}).encode())

    def _json(self, path: str, body: bytes | None = None, kind: str = "application/json") -> dict:
        answer = self._call(path, body, kind)
        try:
            return json.loads(answer)
        except ValueError as error:
            raise ClientError(f"what answers at {self.address} is no ComfyUI: give --server", fatal=True) from error

    def _call(self, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        try:
            request = urllib.request.Request(self.address + path, body, {"Content-Type": kind} if body else {})
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if path == "/prompt" and error.code == 400:
                raise
            raise ClientError(f"{self.address}{path} answers {error.code} {error.reason}", fatal=True) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            message = f"no ComfyUI answers at {self.address} ({reason}): start it, or give --server"
            raise ClientError(message, fatal=True) from error


def _rejection(answer: bytes) -> str:
    """ComfyUI's reasons for not queueing a workflow, in one line."""
    try:
        told = json.loads(answer)
    except ValueError:
        return answer.decode(errors="replace")[:200]
    reasons = [
        f"{node['class_type']}: {error['message']} ({error['details']})"
        for node in told.get("node_errors", {}).values()
        for error in node["errors"]
    ]
    return "; ".join(reasons) or str(told.get("error", {}).get("message", told))


# ---- the workflow


def read_workflow(path: Path) -> Prompt:
    """A workflow in API format, as exported by ComfyUI's File → Export (API)."""
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClientError(f"{path} cannot be read ({error}): give --workflow", fatal=True) from error
    if not isinstance(prompt, dict) or not all(isinstance(n, dict) and "class_type" in n for n in prompt.values()):
        raise ClientError(f"{path} is not in API format: export it with File → Export (API)", fatal=True)
    return prompt


def nodes_of(prompt: Prompt, kind: str) -> list[dict]:
    """Nodes of one class."""
    return [node for node in prompt.values() if node["class_type"] == kind]


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
    except ValueError:
        parsed = value
    for node in nodes:
        inputs = node["inputs"]
        if name not in inputs and name.partition(".")[0] not in inputs:  # size.width may come in for size.scale
            raise ClientError(f"{kind} has no input {name}, only {', '.join(inputs)}", fatal=True)
        inputs[name] = parsed


# ---- the folder


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, by name, without those of its subfolders."""
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.is_file())
    except OSError as error:
        raise ClientError(f"{folder} cannot be opened ({error.strerror}): give a folder", fatal=True) from error
    if not found:
        raise ClientError(f"{folder} has no pictures ({', '.join(sorted(PICTURES))})", fatal=True)
    return found


def upscale(server: Server, prompt: Prompt, picture: Path, result: Path) -> None:
    """One picture, from upload to result. A result is there whole or not at all."""
    nodes_of(prompt, "LoadImage")[0]["inputs"]["image"] = server.upload(picture)
    prompt_id = server.queue(prompt)
    try:
        images = server.wait(prompt_id)
    except KeyboardInterrupt:
        server.cancel(prompt_id)
        raise
    if not images:
        raise ClientError("the workflow saves no picture: give one with Save Image", fatal=True)
    part = result.with_name(result.name + ".part")
    part.write_bytes(server.download(images[0]))
    part.replace(result)


def result_names(pictures: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where results go: NAME.png; NAME.jpg.png where another picture is called NAME too."""
    stems = [path.stem for path in pictures]
    return {p: folder / f"{p.stem if stems.count(p.stem) == 1 else p.name}.png" for p in pictures}


def run(arguments: argparse.Namespace) -> int:
    """All pictures; the number of those that failed."""
    prompt = read_workflow(arguments.workflow)
    if len(nodes_of(prompt, "LoadImage")) != 1:
        raise ClientError(f"{arguments.workflow} must have one Load Image, for the picture", fatal=True)
    for setting in arguments.set:
        change(prompt, setting)
    results = result_names(find_pictures(arguments.folder), arguments.output)
    if arguments.output.resolve() == arguments.folder.resolve():
        raise ClientError("the output folder is the input folder: give another one", fatal=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    server, failed = Server(arguments.server), 0
    for number, (picture, result) in enumerate(results.items(), 1):
        print(f"{number} of {len(results)}  {picture.name}", end="  ", flush=True)
        if result.exists() and not arguments.force:
            print("is there already")
            continue
        began = time.monotonic()
        try:
            upscale(server, prompt, picture, result)
        except ClientError as error:
            if error.fatal:
                print()
                raise
            print(f"failed: {error}")
            failed += 1
        else:
            print(f"{time.monotonic() - began:.1f} s → {result}")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """0: all done; 1: some pictures failed; 2: it could not go on; 130: stopped by Ctrl+C."""
    parser = argparse.ArgumentParser(description="Upscale a folder of pictures on a running ComfyUI.")
    parser.add_argument("folder", type=Path, help="folder with the pictures")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results, as PNG")
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="address of ComfyUI (default: %(default)s)")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="in API format, with one Load Image")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="such as InfDiTUpscale.size.scale=2"
    )
    parser.add_argument("--force", action="store_true", help="make results anew that are there already")
    try:
        return 1 if run(parser.parse_args(argv)) else 0
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""Uses a running ComfyUI as its frontend does: HTTP for files, prompts and results, the socket for progress.

    python client.py http://HOST:PORT PACK FINDINGS.json

Run by conftest.py with ComfyUI's Python, for aiohttp. Each case gives a dictionary of what it found; the tests decide
what is right.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import struct
import sys
import time
import traceback
import uuid
from pathlib import Path

import aiohttp
from PIL import Image

ADDRESS, PACK, FINDINGS = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
PREVIEW, TEXT, PREVIEW_WITH_META = 1, 3, 4  # kinds of binary messages on the socket
PATIENCE = 120  # seconds for one prompt
NODES = (
    "InfDiTModelLoader",
    "InfDiTCLIPLoader",
    "InfDiTCLIPEncode",
    "InfDiTUpscale",
    "InfDiTMemoryPlan",
    "InfDiTUpscaleAdvanced",
    "InfDiTScheduler",
    "InfDiTToModel",
)


def picture(width: int, height: int) -> bytes:
    """A PNG of soft colours."""
    seeded = random.Random(3)
    rough = Image.frombytes("RGB", (5, 4), bytes(seeded.randrange(256) for _ in range(60)))
    out = io.BytesIO()
    rough.resize((width, height), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def _preview(data: bytes) -> dict | None:
    """A live picture's size and the node that it belongs to, from a binary message."""
    (kind,) = struct.unpack(">I", data[:4])
    if kind == PREVIEW_WITH_META:
        (length,) = struct.unpack(">I", data[4:8])
        about, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    elif kind == PREVIEW:
        about, body = {}, data[8:]
    else:
        return None
    image = Image.open(io.BytesIO(body))
    return {"node": about.get("node_id"), "format": image.format, "size": list(image.size)}


def _text(data: bytes) -> dict | None:
    """What is written on a node, and the node, from a binary message."""
    if struct.unpack(">I", data[:4])[0] != TEXT:
        return None
    (length,) = struct.unpack(">I", data[4:8])
    return {"node": data[8 : 8 + length].decode(), "text": data[8 + length :].decode()}


class Browser:
    """One page's worth of a session."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session
        self.id = uuid.uuid4().hex

    async def get(self, path: str) -> dict:
        async with self.session.get(ADDRESS + path) as reply:
            reply.raise_for_status()
            return await reply.json()

    async def upload(self, name: str, data: bytes) -> None:
        form = aiohttp.FormData({"overwrite": "true"})
        form.add_field("image", data, filename=name, content_type="image/png")
        async with self.session.post(ADDRESS + "/upload/image", data=form) as reply:
            reply.raise_for_status()

    async def queue(self, prompt: dict) -> tuple[int, dict]:
        async with self.session.post(ADDRESS + "/prompt", json={"prompt": prompt, "client_id": self.id}) as reply:
            return reply.status, await reply.json()

    async def run(self, prompt: dict, stop_at: int | None = None) -> dict:
        """Queue a prompt and follow it to its end; stop_at: press stop at that many messages of progress."""
        seen: dict = {"moves": [], "previews": [], "texts": [], "end": None, "message": ""}
        async with self.session.ws_connect(f"{ADDRESS}/ws?clientId={self.id}", max_msg_size=0) as ws:
            await ws.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            status, answer = await self.queue(prompt)
            if status != 200:
                return seen | {"end": "rejected", "status": status, "message": json.dumps(answer)}
            seen["id"] = answer["prompt_id"]
            await asyncio.wait_for(self._follow(ws, seen, stop_at), PATIENCE)
        return seen

    async def _follow(self, ws: aiohttp.ClientWebSocketResponse, seen: dict, stop_at: int | None) -> None:
        pressed = None
        while seen["end"] is None:
            self._note(await ws.receive(), seen)
            if stop_at is not None and pressed is None and len(seen["moves"]) >= stop_at:
                pressed = time.monotonic()
                await self.session.post(ADDRESS + "/interrupt", json={"prompt_id": seen["id"]})
        seen["seconds_to_stop"] = None if pressed is None else time.monotonic() - pressed

    @staticmethod
    def _note(message: aiohttp.WSMessage, seen: dict) -> None:
        if message.type == aiohttp.WSMsgType.BINARY:
            if (preview := _preview(message.data)) is not None:
                seen["previews"].append(preview)
            if (text := _text(message.data)) is not None:
                seen["texts"].append(text)
        elif message.type == aiohttp.WSMsgType.TEXT:
            event = json.loads(message.data)
            data = event.get("data", {})
            if data.get("prompt_id") != seen["id"]:
                return
            if event["type"] == "progress":
                seen["moves"].append([data["node"], data["value"], data["max"]])
            elif event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                seen["end"] = event["type"].removeprefix("execution_")
                seen["message"] = data.get("exception_message", "")
        else:
            raise ConnectionError(f"the server closed the socket: {message}")

    async def results(self, prompt_id: str) -> list[dict]:
        """Size and format of what a prompt has saved."""
        history = None
        until = time.monotonic() + 5
        while history is None and time.monotonic() < until:  # it is written just after the last message
            history = (await self.get(f"/history/{prompt_id}")).get(prompt_id)
            await asyncio.sleep(0.05)
        found = []
        for output in (history or {"outputs": {}})["outputs"].values():
            for item in output.get("images", []):
                query = {key: item[key] for key in ("filename", "subfolder", "type")}
                async with self.session.get(ADDRESS + "/view", params=query) as reply:
                    image = Image.open(io.BytesIO(await reply.read()))
                low, high = zip(*image.convert("RGB").getextrema(), strict=True)
                found.append({"size": list(image.size), "format": image.format, "range": [min(low), max(high)]})
        return found


def workflow(**changes: object) -> dict:
    """The API twin as shipped, with changes to the inputs of nodes: upscale={"steps": 2}."""
    prompt = json.loads((PACK / "workflows" / "api" / "Upscale a picture with Inf-DiT.json").read_text())
    kinds = {"upscale": "InfDiTUpscale", "loader": "InfDiTModelLoader", "image": "LoadImage"}
    for name, inputs in changes.items():
        next(n for n in prompt.values() if n["class_type"] == kinds[name])["inputs"].update(inputs)
    return prompt


async def describe(browser: Browser) -> dict:
    return {name: (await browser.get(f"/object_info/{name}")).get(name) for name in NODES}


async def templates(browser: Browser) -> dict:
    listed = await browser.get("/workflow_templates")
    (name,) = (module for module in listed if "inf-dit" in module)
    found = {"listed": sorted(listed[name]), "thumbnails": {}}
    for title in listed[name]:
        address = f"{ADDRESS}/api/workflow_templates/{name}/{title}"
        async with browser.session.get(address + ".json") as reply:
            found["status"] = reply.status
        async with browser.session.get(address + ".jpg") as reply:
            found["thumbnails"][title] = list(Image.open(io.BytesIO(await reply.read())).size) if reply.ok else None
    return found


async def as_shipped(browser: Browser) -> dict:
    await browser.upload("example.png", picture(64, 48))
    ended = await browser.run(workflow())
    return ended | {"results": await browser.results(ended["id"])}


async def stopped(browser: Browser) -> dict:
    """Stop a run of about a minute, at three moments, then run something small."""
    await browser.upload("large.png", picture(1000, 750))
    runs = [await browser.run(workflow(image={"image": "large.png"}), at) for at in (1, 9, 30)]
    after = await browser.run(workflow(upscale={"seed": 99}))
    return {"ends": [run["end"] for run in runs], "waited": [run["seconds_to_stop"] for run in runs],
            "moves": runs[-1]["moves"], "after": after["end"], "results": await browser.results(after["id"])}


async def in_chinese(browser: Browser) -> dict:
    """After a page has told its language, as web/language.js does; and what another page is told then."""
    said = {"client": browser.id, "language": "zh"}
    async with browser.session.post(ADDRESS + "/infdit/language", json=said) as reply:
        status = reply.status
    chinese = await browser.run(workflow(upscale={"seed": 98}))
    other = await Browser(browser.session).run(workflow(upscale={"seed": 97}))
    await browser.session.post(ADDRESS + "/infdit/language", json=said | {"language": "en"})
    async with browser.session.post(ADDRESS + "/infdit/language", data=b"[1") as reply:
        bad = reply.status
    return {"status": status, "bad": bad, "zh": chinese["texts"], "other": other["texts"]}


async def refused(browser: Browser) -> dict:
    return {
        "missing": await browser.run(workflow(loader={"model_name": "nowhere.safetensors"})),
        "broken": await browser.run(workflow(loader={"model_name": "broken.safetensors"})),
        "scale": await browser.run(workflow(upscale={"size.scale": 17})),
        "budget": await browser.run(workflow(upscale={"memory_budget": 0.001})),
        "again": await browser.run(workflow()),
    }


async def main() -> None:
    findings = {}
    async with aiohttp.ClientSession() as session:
        browser = Browser(session)
        for case in (describe, templates, as_shipped, stopped, in_chinese, refused):
            began = time.perf_counter()
            try:
                findings[case.__name__] = await case(browser)
            except Exception:  # noqa: BLE001 - it is handed to the test that asks for this case
                findings[case.__name__] = {"traceback": traceback.format_exc()}
            print(f"{case.__name__}: {time.perf_counter() - began:.2f} s", flush=True)
    FINDINGS.write_text(json.dumps(findings))


if __name__ == "__main__":
    asyncio.run(main())

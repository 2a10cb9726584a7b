"""Makes all pictures of the frontend: thumbnails of the workflows, pictures on help pages, the README's screenshot.

    COMFYUI_PATH=CHECKOUT python -m docs.frontend [--sdxl PICTURE X Y] [--only WORDS ...]

Run from the project's root with a Python that runs that ComfyUI and has playwright. A server of its own runs the
workflows as shipped, on the CPU, with pictures/flowers.png for their example. A picture by SDXL is not in this
repository: that workflow's thumbnail is made only if one is given, with the corner of a detail to show.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Browser

from api_client.upscale_folder import Prompt, Server
from tests.comfy.browser import AFTER_SDXL, EVERYDAY, SIXTEEN, Frontend, chromium

ROOT = Path(__file__).parents[1]
WORKFLOWS, HELP, FLOWERS = ROOT / "workflows", ROOT / "web" / "docs", ROOT / "pictures" / "flowers.png"
NAMED = ("checkpoints/sd_xl_base_1.0.safetensors", "clip_vision/open_clip_pytorch_model.bin")  # in workflows
STEPS, PLAN = "Upscale step by step with Inf-DiT", "What Inf-DiT would hold in memory"
CONTROLS, NATIVE = "What each control of Inf-DiT does", "Upscale with a KSampler and Inf-DiT"
SIDE = 512  # of a thumbnail
CROP = SIDE // 4  # of the source, enlarged by 4
DARK = "#171923"  # as the plots
MARGIN = 26  # around a node
NOTICE = 10_000  # milliseconds until the page no longer says that a job is done

log = logging.getLogger(__name__)


def write(path: Path, picture: Image.Image, most: int) -> None:
    """Save a picture in at most so many kB, a PNG with a palette or a JPEG as good as that allows; and say so."""
    picture = picture.convert("RGB")
    if path.suffix == ".png":
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    for quality in range(90, 40, -5) if path.suffix == ".jpg" else ():
        picture.save(path, quality=quality)
        if path.stat().st_size < 1000 * most:
            break
    log.info("%s: %d×%d, %.0f kB", path.relative_to(ROOT), *picture.size, path.stat().st_size / 1000)


# ---- a ComfyUI


def furnish(base: Path) -> None:
    """What the workflows need of a base directory."""
    for folder in ("custom_nodes", "input", "models/infdit", "models/checkpoints", "models/clip_vision"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / "inf-dit").symlink_to(ROOT, target_is_directory=True)
    shutil.copy(FLOWERS, base / "input" / "example.png")
    for name in NAMED:
        (base / "models" / name).touch()  # nobody reads it


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def serving(checkout: Path) -> Iterator[str]:
    """The address of a server, over a base directory of its own."""
    port = free_port()
    flags = f"--cpu --port {port} --disable-auto-launch --disable-api-nodes --database-url sqlite:///:memory:"
    with tempfile.TemporaryDirectory() as base, tempfile.TemporaryFile("w+") as out:
        furnish(Path(base))
        command = [sys.executable, "main.py", *flags.split(), "--base-directory", base]
        process = subprocess.Popen(command, cwd=checkout, stdout=out, stderr=subprocess.STDOUT)
        try:
            while not listens(port):
                if process.poll() is not None:
                    out.seek(0)
                    sys.exit(f"ComfyUI did not come up:\n{out.read()[-3000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def listens(port: int) -> bool:
    """Whether a server is up."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


# ---- thumbnails: results of the workflows' API twins


def twin(name: str, **values: Mapping[str, object]) -> Prompt:
    """A workflow in API format, with other inputs for nodes of a class: LoadImage={"image": "mine.png"}."""
    prompt = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        node["inputs"].update(values.get(node["class_type"], {}))
    return prompt


def result(server: Server, prompt: Prompt) -> list[Image.Image]:
    """Run a workflow; the pictures that it saves."""
    saved = server.wait(server.queue(prompt))
    return [Image.open(io.BytesIO(server.download(image))) for image in saved]


def upload(server: Server, picture: Image.Image) -> dict[str, object]:
    """The inputs of Load Image for a picture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "crop.png")
        picture.save(path)
        return {"image": server.upload(path)}


def crop(x: int, y: int) -> Image.Image:
    """Of the flowers, as much as fills a thumbnail."""
    with Image.open(FLOWERS) as flowers:
        return flowers.convert("RGB").crop((x, y, x + CROP, y + CROP))


def strips(pictures: list[Image.Image]) -> Image.Image:
    """The same picture in several states, a vertical strip of each, with lines between."""
    whole = pictures[0].convert("RGB")
    width, height = whole.width // len(pictures), whole.height
    for i, picture in enumerate(pictures[1:], 1):
        whole.paste(picture.crop((i * width, 0, whole.width, height)), (i * width, 0))
        whole.paste("white", (i * width - 1, 0, i * width + 1, height))
    return whole


def before_and_after(server: Server, name: str, times: int) -> Image.Image:
    """Left as bicubic enlarges it, right as a workflow does."""
    source = crop(71, 86)
    source = source.crop((0, 0, SIDE // times, SIDE // times))
    after = result(server, twin(name, LoadImage=upload(server, source)))
    return strips([source.resize((SIDE, SIDE), Image.Resampling.BICUBIC), *after])


def noise_levels(server: Server) -> Image.Image:
    """The plain enlargement, and what the model makes of it from lower and higher on in its noise levels."""
    prompt = twin(STEPS, LoadImage=upload(server, crop(128, 64)))
    scheduler = next(node["inputs"] for node in prompt.values() if node["class_type"] == "InfDiTScheduler")
    states = []
    for scheduler["denoise"] in (0, 1 / 3, 2 / 3, 1):
        states += result(server, prompt)
    return strips(states)


def controls(server: Server) -> Image.Image:
    """A picture under each control; the last, which is for the published model, is as the one in the middle."""
    source = crop(128, 64).crop((0, 0, CROP // 2, CROP // 2))
    states = result(server, twin(CONTROLS, LoadImage=upload(server, source)))
    return strips([state.resize((SIDE, SIDE), Image.Resampling.NEAREST) for state in states[:-1]])


def plans(server: Server) -> Image.Image:
    """Its two plots, as it opens."""
    whole = Image.new("RGB", (SIDE, SIDE), DARK)
    for i, plot in enumerate(result(server, twin(PLAN))):
        plot = plot.convert("RGB")
        plot.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        whole.paste(plot, (0, i * SIDE // 2 + (SIDE // 2 - plot.height) // 2))
    return whole


def detail(server: Server, path: str, x: int, y: int) -> Image.Image:
    """A picture by SDXL, and below it a detail as it is and enlarged."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    wide = picture.resize((SIDE, SIDE * picture.height // picture.width), Image.Resampling.LANCZOS)
    width, height = CROP // 2, (SIDE - wide.height) // 4
    seen = picture.crop((x, y, x + CROP, y + CROP))  # by the model; of which the corner is shown
    (after,) = result(server, twin(EVERYDAY, LoadImage=upload(server, seen)))
    before = seen.resize(after.size, Image.Resampling.NEAREST)
    whole = Image.new("RGB", (SIDE, SIDE), DARK)
    whole.paste(wide, (0, 0))
    draw, font, shrink = ImageDraw.Draw(whole), ImageFont.load_default(18), SIDE / picture.width
    draw.rectangle([round(at * shrink) for at in (x, y, x + width, y + height)], outline="white", width=2)
    for left, label, large in ((0, "SDXL", before), (SIDE // 2, "Inf-DiT 4x", after)):
        whole.paste(large.crop((0, 0, 4 * width - 2, 4 * height - 4)), (left + 1, SIDE - 4 * height + 2))
        draw.rounded_rectangle((left + 6, SIDE - 32, left + 18 + font.getlength(label), SIDE - 6), 8, fill=DARK)
        draw.text((left + 12, SIDE - 19), label, "white", font, "lm")
    return whole


# ---- the page


@dataclass(frozen=True)
class Shot:
    """A help page's picture of a node.

    Attributes:
        workflow: that the node is seen in; run: after a run.
        size: of the node, if it needs no more.
        unfolded: with its advanced inputs.
    """

    workflow: str
    size: tuple[int, int]
    run: bool = False
    unfolded: bool = False


SHOTS = {
    "InfDiTModelLoader.png": Shot(STEPS, (320, 90), unfolded=True),
    "InfDiTCLIPLoader.png": Shot(AFTER_SDXL, (340, 60)),
    "InfDiTCLIPEncode.png": Shot(AFTER_SDXL, (340, 330)),
    "InfDiTUpscale.jpg": Shot(EVERYDAY, (340, 330), run=True),
    "InfDiTMemoryPlan.png": Shot(PLAN, (400, 450), run=True),
    "InfDiTUpscaleAdvanced.jpg": Shot(STEPS, (340, 240), run=True),
    "InfDiTScheduler.png": Shot(STEPS, (320, 170), unfolded=True),
    "InfDiTToModel.png": Shot(NATIVE, (320, 230)),
}
SETTINGS = {
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.VueNodes.Enabled": True,
}
LOOK_AT = """([x, y, left, top, scale]) => {
    app.canvas.ds.scale = scale
    app.canvas.ds.offset = [left / scale - x, top / scale - y]
    app.canvas.setDirty(true, true)
}"""
ISOLATE = """kind => {
    const { graph } = app
    const node = graph.nodes.find(node => node.type === kind)
    const sources = node.inputs.map((_, i) => node.getInputNode(i))
    const targets = node.outputs.flatMap((_, i) => node.getOutputNodes(i) ?? [])
    for (const group of [...graph.groups]) graph.remove(group)
    for (const other of [...graph.nodes])
        if (sources.includes(other)) other.pos = [node.pos[0] - 700, other.pos[1]]
        else if (targets.includes(other)) other.pos = [node.pos[0] + 1000, other.pos[1]]
        else if (other !== node) graph.remove(other)
}"""
CLOSE_OTHERS = """async () => {
    const { workflow } = app.extensionManager
    for (const other of [...workflow.openWorkflows])
        if (other.path !== workflow.activeWorkflow.path) await workflow.closeWorkflow(other)
}"""


def drawn(name: str) -> dict:
    """A workflow as the page has it."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def photograph(page: Callable[[], Frontend], kind: str, shot: Shot) -> Image.Image:
    """A node and the ends of its links."""
    frontend, workflow = page(), drawn(shot.workflow)
    for node in workflow["nodes"]:
        node["mode"] = 0  # not bypassed
        if node["type"] == kind:
            node["size"] = shot.size
            node.pop("title", None)
    frontend.open(workflow, kind)
    frontend.page.evaluate(ISOLATE, kind)
    if shot.run and frontend.run() != "success":
        sys.exit(f"{shot.workflow} failed")
    left, top = 400, 120  # of the canvas, where nothing else of the page is
    (node,) = (node for node in frontend.nodes() if node["type"] == kind)
    frontend.page.evaluate(LOOK_AT, [*node["box"][:2], left, top, 1])
    if shot.unfolded:
        own = frontend.page.locator(f'[data-node-id="{node["id"]}"]')  # others have advanced inputs too
        own.get_by_text("Show advanced inputs").click()
    frontend.page.evaluate("app.canvas.deselectAll(); app.canvas.setDirty(true, true)")
    frontend.page.mouse.move(left, top - 2 * MARGIN)
    (box,) = (node["box"] for node in frontend.nodes() if node["type"] == kind)
    canvas = frontend.page.locator("#graph-canvas").bounding_box() or {"x": 0, "y": 0}
    x, y = canvas["x"] + left - MARGIN, canvas["y"] + top - MARGIN
    width, height = (side + 2 * MARGIN for side in box[2:])
    shown = frontend.page.screenshot(clip={"x": x, "y": y, "width": width, "height": height})
    return Image.open(io.BytesIO(shown))


def in_comfyui(browser: Browser, address: str) -> Image.Image:
    """The first workflow after a run, as a user sees it."""
    window = {"width": 1100, "height": 850}
    frontend = Frontend(browser, address, SETTINGS, viewport=window, device_scale_factor=1.6)
    workflow = drawn(EVERYDAY)
    frontend.open(workflow, EVERYDAY)
    frontend.page.evaluate(CLOSE_OTHERS)
    frontend.run()
    frontend.page.wait_for_timeout(NOTICE)
    boxes = [node["box"] for node in frontend.nodes()] + [group["bounding"] for group in workflow["groups"]]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right = max(box[0] + box[2] for box in boxes)
    frontend.page.evaluate(LOOK_AT, [left, top, 75, 100, (window["width"] - 90) / (right - left)])
    frontend.nodes()
    return Image.open(io.BytesIO(frontend.page.screenshot()))


def main() -> None:
    """Writes all pictures and says which."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(prog="python -m docs.frontend", description=__doc__)
    parser.add_argument("--sdxl", nargs=3, metavar=("PICTURE", "X", "Y"), help="by SDXL, and the corner of a detail")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORDS", help="of names of the pictures to make")
    asked = parser.parse_args()
    checkout, *_ = os.environ.get("COMFYUI_PATH", "").split(os.pathsep)
    if not checkout:
        sys.exit("COMFYUI_PATH must name a checkout of ComfyUI")
    with serving(Path(checkout)) as address, chromium() as browser:
        for path, (most, make) in drawings(address, browser, asked.sdxl).items():
            if any(words in path.name for words in asked.only):
                write(path, make(), most)


def drawings(address: str, browser: Browser, sdxl: list[str] | None) -> dict[Path, tuple[int, Callable]]:
    """Where each picture goes, its kB at most and what makes it."""
    server = Server(address)
    frontend = cache(lambda: Frontend(browser, address, SETTINGS, device_scale_factor=2))
    thumbnails: dict[str, Callable[[], Image.Image]] = {
        EVERYDAY: lambda: before_and_after(server, EVERYDAY, 4),
        SIXTEEN: lambda: before_and_after(server, SIXTEEN, 16),
        NATIVE: lambda: before_and_after(server, NATIVE, 4),
        STEPS: lambda: noise_levels(server),
        CONTROLS: lambda: controls(server),
        PLAN: lambda: plans(server),
    }
    if sdxl:
        thumbnails[AFTER_SDXL] = lambda: detail(server, sdxl[0], int(sdxl[1]), int(sdxl[2]))
    shots = {HELP / name: (200, partial(photograph, frontend, Path(name).stem, shot)) for name, shot in SHOTS.items()}
    page = {ROOT / "docs" / "in_comfyui.jpg": (400, lambda: in_comfyui(browser, address))}
    return {WORKFLOWS / f"{name}.jpg": (100, make) for name, make in thumbnails.items()} | shots | page


if __name__ == "__main__":
    main()

"""ComfyUI's own frontend in headless Chromium: a page, workflows opened and queued in it, and what it then shows.

    python browser.py http://HOST:PORT PACK FINDINGS.json

Run by test_browser.py with ComfyUI's Python, for playwright. Each case gives a dictionary of what it found; the tests
decide what is right. docs/frontend.py takes its pictures with the same page.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported late, so that its absence can be told
    from playwright.sync_api import Browser, ConsoleMessage

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
PATIENCE = 240_000  # milliseconds for the page to come up, or for a run
EVERYDAY, AFTER_SDXL = "Upscale a picture with Inf-DiT", "Upscale what SDXL made with Inf-DiT"
SIXTEEN, BLUEPRINT = "Upscale up to 16 times with Inf-DiT", "Upscale with Inf-DiT"
PLAN, STEPS = "What Inf-DiT would hold in memory", "Upscale step by step with Inf-DiT"
KSAMPLER, COMPARE = "Upscale with a KSampler and Inf-DiT", "ImageCompare"
PHOTO = "photo.png"  # of a usual size
LOOK_AGAIN = 500  # milliseconds after which nothing may have moved
WINDOW: dict[str, Any] = {"viewport": {"width": 1500, "height": 900}}
RENDERERS = {"canvas": False, "vue": True}

# a user who is not new; a dialog that could be switched off is on
SETTINGS = {
    "Comfy.InstalledVersion": "9.9.9",
    "Comfy.Locale": "en",
    "Comfy.Release.Status": "skipped",
    "Comfy.TutorialCompleted": True,
    "Comfy.Validation.Workflows": True,
    "Comfy.Workflow.ShowMissingModelsWarning": True,
    "Comfy.Workflow.ShowMissingNodesWarning": True,
}
DIALOGS = ".p-dialog, .p-toast-message, [data-testid=error-overlay], [role=alertdialog], .comfy-modal[style*=block]"

READY = "window.app?.vueAppReady && app.extensionManager?.workflow?.activeWorkflow && app.graph.nodes.length"
OPEN = "([drawn, name]) => app.loadGraphData(drawn, true, true, name)"
FIT = "app.extensionManager.command.execute('Comfy.Canvas.FitView')"
FOLLOW = """() => {
    window.ended = ''
    for (const end of ['success', 'error', 'interrupted'])
        app.api.addEventListener('execution_' + end, () => { window.ended = end }, { once: true })
}"""
# what stands on nodes, as it changes; the page's own listener came first
LINES = """() => {
    window.lines = []
    app.api.addEventListener('progress_text', ({ detail }) => {
        const widgets = app.graph.getNodeById(detail.nodeId)?.widgets ?? []
        window.lines.push(...widgets.filter(w => /text-preview|preview_text/.test(w.name)).map(w => w.value))
    })
}"""
EXPORT = "async () => JSON.stringify((await app.graphToPrompt()).output, null, 2)"  # as "Export (API)" writes it
SET = """([type, name, value]) => {
    app.graph.nodes.find(node => node.type === type).widgets.find(widget => widget.name === name).value = value
}"""
# as a user's typing ends: the widget rounds, and others may come with it
TYPE = """([type, name, value]) => {
    const widget = app.graph.nodes.find(node => node.type === type).widgets.find(widget => widget.name === name)
    widget.value = value
    widget.callback?.(value)
}"""
MUTE = """types => {
    for (const node of app.graph.nodes.filter(node => types.includes(node.type))) node.mode = LiteGraph.NEVER
}"""
CHOICES = """([type, name]) => {
    return app.graph.nodes.find(node => node.type === type).widgets.find(widget => widget.name === name).options.values
}"""
# a node in front of an input of another, fed by what fed that input before if it has an input for it
INSERT = """([type, values, target, name]) => {
    const node = LiteGraph.createNode(type), to = app.graph.nodes.find(node => node.type === target)
    app.graph.add(node)
    node.widgets.forEach((widget, i) => { widget.value = values[i] ?? widget.value })
    const slot = to.findInputSlot(name), link = to.getInputLink(slot)
    if (node.inputs.some(input => !input.widget)) to.getInputNode(slot).connect(link.origin_slot, node, 0)
    node.connect(0, to, slot)
}"""
# core's slider over two pictures, if there is one
COMPARED = """type => {
    if (!(type in LiteGraph.registered_node_types)) return false
    const node = LiteGraph.createNode(type)
    app.graph.add(node)
    for (const [name, of] of [['image_a', 'LoadImage'], ['image_b', 'InfDiTUpscale']])
        app.graph.nodes.find(node => node.type === of).connect(0, node, node.findInputSlot(name))
    return true
}"""
SAVED = """() => {
    const node = app.graph.nodes.find(node => node.type === 'SaveImage')
    return node ? app.nodeOutputs[node.id].images[0] : null
}"""
DROP = """async found => {
    const bytes = await (await app.api.fetchApi('/view?' + new URLSearchParams(found))).blob()
    await app.handleFile(new File([bytes], found.filename, { type: 'image/png' }))
    return found.filename
}"""
GROUPS = "app.graph.groups.map(group => [...group.pos, ...group.size].map(Math.round))"
# of Vue's nodes the elements say where they are and what they show
NODES = """() => app.graph.nodes.map(node => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`)
    const shown = element ? [...element.querySelectorAll('img')] : node.imgs ?? []
    const waits = app.nodeOutputs[node.id]?.images?.length && !shown.some(picture => picture.naturalWidth)
    const known = node.type in LiteGraph.registered_node_types && !node.has_errors
    let box = [...node.boundingRect]
    if (element) {
        const { ds, canvas } = app.canvas
        const [at, origin] = [element.getBoundingClientRect(), canvas.getBoundingClientRect()]
        const [x, y] = [at.x - origin.x, at.y - origin.y]
        box = [x / ds.scale - ds.offset[0], y / ds.scale - ds.offset[1], at.width / ds.scale, at.height / ds.scale]
    }
    return {
        id: Number(node.id), type: node.type, known, waits: Boolean(waits), drawn_by: element ? 'vue' : 'canvas',
        box: box.map(Math.round), pictures: shown.map(picture => [picture.naturalWidth, picture.naturalHeight]),
        titles: (node.widgets ?? []).map(w => w.label ?? w.name),
        values: (node.widgets ?? []).map(w => ['number', 'string'].includes(typeof w.value) ? w.value : null),
        most: (node.widgets ?? []).map(w => w.options?.max ?? null),
        texts: (node.widgets ?? []).filter(w => /text-preview|preview_text/.test(w.name)).map(w => w.value),
    }
})"""


class MissingBrowserError(Exception):
    """Nothing to open the frontend with; says what is missing."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium or the one of playwright's own, with no way to any other machine.

    Raises:
        MissingBrowserError: without playwright, or without a Chromium.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise MissingBrowserError(f"{sys.executable} has no playwright: pip install playwright") from error
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = next(filter(None, map(shutil.which, CHROMIUM)), own if Path(own).exists() else None)
        if found is None:
            raise MissingBrowserError(f"no Chromium: looked for {', '.join(CHROMIUM)} and for playwright's own")
        browser = playwright.chromium.launch(executable_path=found, args=[OFFLINE])
        yield browser
        browser.close()


class Frontend:
    """A window with ComfyUI's page.

    Attributes:
        complaints: errors on the console since a workflow was opened. What comes before is not of ours: the workflow
            that the page begins with has models that nobody has.
    """

    def __init__(self, browser: Browser, address: str, settings: dict[str, object], **window: Any) -> None:
        self.complaints: list[str] = []
        self.address = address
        self.page = browser.new_page(**(WINDOW | window))
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        for name, value in (SETTINGS | settings).items():
            self._post(f"settings/{name}", value)
        self.page.goto(address, timeout=PATIENCE)
        self.page.wait_for_function(READY, timeout=PATIENCE)
        self.nodes()

    def _listen(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(f"{message.text} ({message.location['url']})")

    def _post(self, path: str, value: object) -> None:
        self.page.request.post(f"{self.address}/api/{path}", data=json.dumps(value))

    def open(self, drawn: dict, name: str) -> None:
        """A workflow in a tab of its own, all of it in view."""
        self.complaints.clear()
        self.page.evaluate(OPEN, [drawn, name])
        self.page.evaluate(FIT)

    def run(self, afresh: bool = True) -> str:
        """Press Run and wait; how it ended. Afresh: out of ComfyUI's cache comes nothing, so there is a run to see."""
        if afresh:
            self._post("free", {"free_memory": True})
        self.page.evaluate(FOLLOW)
        self.page.get_by_test_id("queue-button").click()
        return self.page.wait_for_function("window.ended", timeout=PATIENCE).json_value()

    def nodes(self) -> list[dict]:
        """What is on the canvas, once nothing moves any more and all results are shown."""
        last = None
        while (now := self.page.evaluate(NODES)) != last or any(node["waits"] for node in now):
            last = now
            self.page.wait_for_timeout(LOOK_AGAIN)
        return now

    def dialogs(self) -> list[str]:
        """What the page says in front of the canvas."""
        return self.page.eval_on_selector_all(DIALOGS, "found => found.map(dialog => dialog.innerText)")

    def seen(self) -> dict:
        """All that the tests ask about."""
        return {
            "nodes": self.nodes(),
            "groups": self.page.evaluate(GROUPS),
            "dialogs": self.dialogs(),
            "complaints": list(self.complaints),
        }


# ---- the cases


def opened(frontend: Frontend, path: Path) -> dict:
    frontend.open(json.loads(path.read_text(encoding="utf-8")), path.stem)
    return {"exported": frontend.page.evaluate(EXPORT), **frontend.seen()}


def run(frontend: Frontend, path: Path) -> dict:
    opened(frontend, path)
    return {"end": frontend.run(), **frontend.seen(), "saved": frontend.page.evaluate(SAVED)}


def failed(frontend: Frontend, path: Path) -> dict:
    """The workflow after a run, with a budget that is too small, and as before, which finds all in ComfyUI's cache.

    Then with the budget that the page told to type.
    """
    opened(frontend, path)
    found = [{"end": frontend.run(), **frontend.seen()}]

    def again(budget: float, how: str = SET) -> None:
        frontend.page.evaluate(how, ["InfDiTUpscale", "memory_budget", budget])
        found.append({"end": frontend.run(afresh=False), **frontend.seen()})

    again(0.001)
    again(0)
    told = re.search(r"type ([\d.]+)", json.dumps([node["texts"] for node in found[1]["nodes"]]))
    again(float(told[1]) if told else 0.001, TYPE)
    return {"runs": found}


def small(frontend: Frontend, path: Path) -> dict:
    """The workflow with a result that is smaller than its picture, and then with the number that the page told."""
    opened(frontend, path)
    frontend.page.evaluate(TYPE, ["InfDiTUpscale", "size", "longest side"])
    found: list[dict] = []
    for _ in range(2):
        told = re.search(r"type (\d+)", json.dumps([node["texts"] for node in found[0]["nodes"]])) if found else None
        frontend.page.evaluate(TYPE, ["InfDiTUpscale", "size.longest_side", int(told[1]) if told else 32])
        found.append({"end": frontend.run(), **frontend.seen()})
    return {"runs": found}


def generous(frontend: Frontend, path: Path) -> dict:
    """The workflow as it was saved with more memory than the slider goes to."""
    drawn = json.loads(path.read_text(encoding="utf-8"))
    (node,) = (node for node in drawn["nodes"] if node["type"] == "InfDiTUpscale")
    frontend.open(drawn, path.stem)
    (shown,) = (node for node in frontend.nodes() if node["type"] == "InfDiTUpscale")
    node["widgets_values"][shown["titles"].index("memory GiB (0 = auto)")] = 64
    frontend.open(drawn, "generous")
    return {**frontend.seen(), "exported": frontend.page.evaluate(EXPORT)}


def sizes(frontend: Frontend, path: Path) -> dict:
    """The node at every way to say a size, with the numbers that come with it, for a usual picture.

    As quick as can be: denoise 0 computes nothing, and before and after are not saved for the page.
    """
    opened(frontend, path)
    frontend.page.evaluate(MUTE, ["PreviewImage", COMPARE])
    frontend.page.evaluate(SET, ["LoadImage", "image", PHOTO])
    frontend.page.evaluate(SET, ["InfDiTUpscale", "denoise", 0])
    found = {}
    for way in frontend.page.evaluate(CHOICES, ["InfDiTUpscale", "size"]):
        frontend.page.evaluate(TYPE, ["InfDiTUpscale", "size", way])
        found[way] = {"end": frontend.run(afresh=False), **frontend.seen()}
    return found


def lines(frontend: Frontend, path: Path) -> dict:
    """What stands on the node, line after line: in a first run, a second of five pictures, and a third that fails."""
    opened(frontend, path)
    ends, told = [], []
    frontend.page.evaluate(LINES)
    for how, asked in (
        (SET, ["InfDiTUpscale", "seed", 1]),
        (INSERT, ["RepeatImageBatch", [5], "InfDiTUpscale", "image"]),
        (SET, ["InfDiTUpscale", "memory_budget", 0.001]),
    ):
        frontend.page.evaluate(how, asked)
        ends.append(frontend.run(afresh=False))
        told.append(frontend.page.evaluate("window.lines.splice(0)"))
    return {"ends": ends, "lines": told}


def unfit(frontend: Frontend, path: Path) -> dict:
    """A KSampler with a latent that is not the picture's, and then with the picture's again."""
    drawn = json.loads(path.read_text(encoding="utf-8"))
    frontend.open(drawn, "unfit")
    frontend.page.evaluate(INSERT, ["EmptyLatentImage", [512, 512, 1], "KSampler", "latent_image"])
    found = [{"end": frontend.run(), **frontend.seen()}]
    frontend.page.evaluate("""() => {
        const [from, to] = ['InfDiTToModel', 'KSampler'].map(type => app.graph.nodes.find(node => node.type === type))
        from.connect(from.findOutputSlot('latent'), to, to.findInputSlot('latent_image'))
    }""")
    found.append({"end": frontend.run(), **frontend.seen()})
    return {"runs": found}


def unlike(frontend: Frontend, path: Path) -> dict:
    """Noise levels far from what the model was made for, and a sampler that it cannot have."""
    opened(frontend, path)
    frontend.page.evaluate(SET, ["InfDiTScheduler", "sigma_max", 40])
    found = [{"end": frontend.run(), **frontend.seen()}]
    frontend.page.evaluate(SET, ["KSamplerSelect", "sampler_name", "euler_ancestral"])
    found.append({"end": frontend.run(), **frontend.seen()})
    return {"runs": found}


def compared(frontend: Frontend, path: Path) -> dict:
    """The workflow with core's Compare Images beside it."""
    opened(frontend, path)
    known = frontend.page.evaluate(COMPARED, COMPARE)
    return {"known": known, "end": frontend.run(), **frontend.seen()}


def kept(frontend: Frontend, path: Path) -> dict:
    """The workflow, and what the page would save of it, opened again."""
    before = opened(frontend, path)
    known = frontend.page.evaluate("type => type in LiteGraph.registered_node_types", COMPARE)
    saved = json.loads(frontend.page.evaluate("JSON.stringify(app.graph.serialize())"))
    frontend.open(saved, "kept")
    return {"known": known, "before": before, "saved": saved, **frontend.seen()}


def within(frontend: Frontend, path: Path) -> dict:
    """A blueprint between Load Image and Save Image."""
    drawn = json.loads(path.read_text(encoding="utf-8"))
    around = json.loads((path.parents[1] / "workflows" / f"{EVERYDAY}.json").read_text(encoding="utf-8"))["nodes"]
    source, target = (next(node for node in around if node["type"] == kind) for kind in ("LoadImage", "SaveImage"))
    (blueprint,) = drawn["nodes"]
    source["id"], target["id"], source["pos"], target["pos"] = 101, 102, [-400, 0], [600, 0]
    drawn["nodes"] += [source, target]
    drawn["links"] = [
        [201, 101, 0, blueprint["id"], 0, "IMAGE"],
        [202, 101, 1, blueprint["id"], 1, "MASK"],
        [203, blueprint["id"], 0, 102, 0, "IMAGE"],
    ]
    drawn["last_node_id"], drawn["last_link_id"] = 102, 203
    for link, start, out, end, into, _ in drawn["links"]:
        nodes = {node["id"]: node for node in drawn["nodes"]}
        nodes[start]["outputs"][out]["links"], nodes[end]["inputs"][into]["link"] = [link], link
    frontend.open(drawn, "within")
    return {"end": frontend.run(), **frontend.seen()}


def ways(frontend: Frontend, path: Path) -> dict:
    """The plan of every way to say a size, with the numbers that come with it."""
    opened(frontend, path)
    found = {}
    for way in frontend.page.evaluate(CHOICES, ["InfDiTMemoryPlan", "size"]):
        frontend.page.evaluate(TYPE, ["InfDiTMemoryPlan", "size", way])
        found[way] = {"end": frontend.run(afresh=False), **frontend.seen()}
    return found


def dropped(frontend: Frontend, path: Path) -> dict:
    """The picture that a run saved, on another workflow: it brings its own back."""
    found = run(frontend, path)
    frontend.open(json.loads((path.parent / f"{PLAN}.json").read_text(encoding="utf-8")), "another")
    saved = frontend.page.evaluate(DROP, found["saved"])
    return {"before": found, "saved": saved, **frontend.seen()}


def core(frontend: Frontend, path: Path) -> dict:
    """Load Image and Save Image alone: what the page complains of now, it complains of without us."""
    drawn = json.loads(path.read_text(encoding="utf-8"))
    drawn["nodes"] = [node for node in drawn["nodes"] if node["type"] in ("LoadImage", "SaveImage")]
    source, target = drawn["nodes"]
    drawn["links"] = [[1, source["id"], 0, target["id"], 0, "IMAGE"]]
    source["outputs"][0]["links"], target["inputs"][0]["link"] = [1], 1
    frontend.open(drawn, "core")
    return {"end": frontend.run(), **frontend.seen()}


def broken(frontend: Frontend, path: Path) -> dict:
    """The workflow with a node that nobody knows and a position that is none: what tells must be seen to tell."""
    drawn = json.loads(path.read_text(encoding="utf-8"))
    drawn["nodes"][1]["type"] = "NoSuchNode"
    frontend.open(drawn, "unknown")
    unknown = frontend.seen()
    drawn = json.loads(path.read_text(encoding="utf-8"))
    drawn["nodes"][1]["pos"] = "somewhere"
    frontend.open(drawn, "invalid")
    return {"unknown": unknown, "invalid": frontend.seen()}


def rejected(frontend: Frontend, path: Path) -> dict:
    """The workflow with a model that nobody has, queued though the page may say so in front of its button."""
    opened(frontend, path)
    frontend.page.evaluate(SET, ["InfDiTModelLoader", "model_name", "nowhere.safetensors"])
    frontend.page.evaluate("app.queuePrompt(0)")
    return frontend.seen()


def absent(frontend: Frontend, path: Path) -> dict:
    """The workflow with files of names that nobody has: the page says which of them it misses."""
    text = re.sub(r"\b(sd_xl_base_1.0|open_clip_pytorch_model)\b", "absent", path.read_text(encoding="utf-8"))
    frontend.open(json.loads(text), "absent")
    return frontend.seen()


def cases(pack: Path) -> Iterator[tuple[Callable[[Frontend, Path], dict], Path]]:
    drawn = sorted((pack / "workflows").glob("*.json"))
    saved = pack / "tests" / "comfy" / "data" / "saved_2026_11.json"
    for path in (*drawn, saved, pack / "subgraphs" / f"{BLUEPRINT}.json"):
        yield opened, path
    yield absent, pack / "workflows" / f"{AFTER_SDXL}.json"
    for path in drawn:
        if path.stem not in (AFTER_SDXL, SIXTEEN):  # no model here; too long, and test_workflows.py runs it
            yield run, path
    yield within, pack / "subgraphs" / f"{BLUEPRINT}.json"
    yield ways, pack / "workflows" / f"{PLAN}.json"
    yield unfit, pack / "workflows" / f"{KSAMPLER}.json"
    yield unlike, pack / "workflows" / f"{STEPS}.json"
    for case in (failed, small, generous, sizes, lines, compared, kept, dropped, core, broken, rejected):
        yield case, pack / "workflows" / f"{EVERYDAY}.json"


def main(address: str, pack: Path, out: Path) -> None:
    findings = {}
    with chromium() as browser:
        for renderer, vue in RENDERERS.items():
            frontend = Frontend(browser, address, {"Comfy.VueNodes.Enabled": vue})
            for case, path in cases(pack):
                began, name = time.perf_counter(), f"{renderer} {case.__name__} {path.stem}"
                try:
                    findings[name] = case(frontend, path)
                except Exception:  # noqa: BLE001 - it is handed to the test that asks for this case
                    findings[name] = {"traceback": traceback.format_exc()}
                print(f"{name}: {time.perf_counter() - began:.2f} s", flush=True)
            frontend.page.close()
        frontend = Frontend(browser, address, {"Comfy.Locale": "zh"})
        findings["chinese"] = run(frontend, pack / "workflows" / f"{EVERYDAY}.json")
    out.write_text(json.dumps(findings))


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    except MissingBrowserError as missing:
        Path(sys.argv[3]).write_text(json.dumps({"missing": {"what": str(missing)}}))

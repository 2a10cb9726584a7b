"""The workflows in ComfyUI's own frontend, in both of its ways to draw nodes, on every ComfyUI found (browser.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

from infdit.picture import read_note

pytestmark = pytest.mark.comfy

ROOT = Path(__file__).parents[2]
SHIPPED = {path.stem: path for path in sorted((ROOT / "workflows").glob("*.json"))}
RUN = [name for name in SHIPPED if "SDXL" not in name and "16" not in name]  # as browser.py says
# named by workflows: empty files do, for nothing reads them; CLIP by the one that was saved
MODELS = ("checkpoints/sd_xl_base_1.0.safetensors", "clip_vision/open_clip_pytorch_model.bin")
PAGE_ONLY = ("ImageStitch", "PreviewImage")  # what a script has no use for
EVERYDAY, STEPS = "Upscale a picture with Inf-DiT", "Upscale step by step with Inf-DiT"
PHOTO = (512, 384)
PICTURE, RESULT, PREVIEW = [64, 48], [256, 192], [512, 384]

renderers = pytest.mark.parametrize("renderer", ["canvas", "vue"])
Box = tuple[float, float, float, float]  # left, top, right, bottom


@pytest.fixture(scope="module")
def seen(server: tuple[str, Path], run_script: Callable[..., dict]) -> dict:
    address, base = server
    models = [base / "models" / name for name in MODELS]
    for path in models:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    Image.linear_gradient("L").resize(PICTURE).convert("RGB").save(base / "input" / "example.png")
    Image.linear_gradient("L").resize(PHOTO).convert("RGB").save(base / "input" / "photo.png")
    try:
        found = run_script("browser.py", address, ROOT, base / "browser.json")
    finally:
        for path in models:
            path.unlink()
    if "missing" in found:
        pytest.skip(found["missing"]["what"])
    return found


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def box(x: float, y: float, width: float = 0, height: float = 0) -> Box:
    return x, y, x + width, y + height


def holds(outer: Box, inner: Box) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


def members(drawn: dict) -> list[list[int]]:
    """Of each group of a workflow: the nodes that begin in it, and those that may stand there instead."""
    instead = [entry["node"] for entry in drawn["extra"].values() if "replaces" in entry]
    corners = {node["id"]: box(*node["pos"]) for node in (*drawn["nodes"], *instead)}
    return [[key for key, at in corners.items() if holds(box(*group["bounding"]), at)] for group in drawn["groups"]]


def misplaced(name: str, found: dict) -> list[str]:
    """Nodes that stick out of their group, and nodes that touch each other."""
    boxes = {node["id"]: box(*node["box"]) for node in found["nodes"]}
    groups = [box(*group) for group in found["groups"]]  # some frontends spread a workflow to make room for Vue's nodes
    out = [
        f"{key} {boxes[key]} sticks out of {group}"
        for group, keys in zip(groups, members(read(SHIPPED[name])), strict=True)
        for key in keys
        if key in boxes and not holds(group, boxes[key])
    ]
    touching = [
        f"{one} {a} touches {other} {b}"
        for (one, a), (other, b) in combinations(boxes.items(), 2)
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]
    return out + touching


def complaints(seen: dict, renderer: str, found: dict) -> list[str]:
    """Dialogs, and errors on the console that a core workflow does not bring about as well.

    A frontend that is newer than its server asks it for more than it knows.
    """
    core = seen[f"{renderer} core {EVERYDAY}"]
    assert core["end"] == "success"
    return [text for text in (*found["dialogs"], *found["complaints"]) if text not in core["complaints"]]


@renderers
@pytest.mark.parametrize("name", [*SHIPPED, "saved_2026_11"])
def test_workflow_opens_without_complaint(seen: dict, renderer: str, name: str) -> None:
    found = seen[f"{renderer} opened {name}"]
    assert {node["drawn_by"] for node in found["nodes"]} == {renderer}
    assert [node["type"] for node in found["nodes"] if not node["known"]] == []
    assert complaints(seen, renderer, found) == []


@renderers
@pytest.mark.parametrize("name", SHIPPED)
def test_nodes_keep_to_their_groups(seen: dict, renderer: str, name: str) -> None:
    assert misplaced(name, seen[f"{renderer} opened {name}"]) == []


@renderers
@pytest.mark.parametrize("name", RUN)
def test_run_from_the_page(seen: dict, renderer: str, name: str) -> None:
    found = seen[f"{renderer} run {name}"]
    assert found["end"] == "success"
    assert complaints(seen, renderer, found) == []
    assert misplaced(name, found) == []


@renderers
@pytest.mark.parametrize("name", [EVERYDAY, STEPS])
def test_picture_on_each_node_after_a_run(seen: dict, renderer: str, name: str) -> None:
    shown = {node["type"]: node for node in seen[f"{renderer} run {name}"]["nodes"]}
    (upscale,) = (node for kind, node in shown.items() if kind.startswith("InfDiTUpscale"))
    assert shown["LoadImage"]["pictures"] == [PICTURE]
    assert upscale["pictures"] == [PREVIEW]
    assert shown["SaveImage"]["pictures"] == [RESULT]
    if name == EVERYDAY and "ImageCompare" in shown:
        assert sorted(shown["ImageCompare"]["pictures"]) == [PICTURE, RESULT]  # after over before, as far as one wants
    elif name == EVERYDAY:
        assert shown["PreviewImage"]["pictures"] == [[2 * RESULT[0] + 8, RESULT[1]]]  # before, a line, after
    assert re.fullmatch(r"256×192 in [\d.]+ s", *upscale["texts"])


@pytest.mark.parametrize("name", SHIPPED)
def test_api_twin_is_what_the_page_exports(seen: dict, name: str) -> None:
    """Word for word, but for what only a page shows, and what older versions of core nodes ask for beyond it."""
    path = ROOT / "workflows" / "api" / f"{name}.json"
    twin, exported = read(path), json.loads(seen[f"canvas opened {name}"]["exported"])
    exported = {key: node for key, node in exported.items() if node["class_type"] not in PAGE_ONLY}
    for key, node in exported.items():
        node["inputs"] = {name: value for name, value in node["inputs"].items() if name in twin[key]["inputs"]}
    assert json.dumps(exported, indent=2, ensure_ascii=False) + "\n" == path.read_text(encoding="utf-8")


@renderers
def test_what_the_page_complains_of_is_seen(seen: dict, renderer: str) -> None:
    """The page does check what it opens, and this test's eyes are open."""
    found = seen[f"{renderer} broken {EVERYDAY}"]
    assert [node["type"] for node in found["unknown"]["nodes"] if not node["known"]] == ["NoSuchNode"]
    assert "NoSuchNode" in "".join(found["unknown"]["dialogs"])
    assert "Invalid workflow" in "".join(found["invalid"]["dialogs"])
    assert found["invalid"]["complaints"]


@renderers
def test_blueprint_is_a_node_with_the_model_in_it(seen: dict, renderer: str) -> None:
    found = seen[f"{renderer} opened Upscale with Inf-DiT"]
    assert complaints(seen, renderer, found) == []
    assert [node["known"] for node in found["nodes"]] == [True]
    assert found["nodes"][0]["titles"] == ["model", "size", "scale (up to ×16)", "denoise", "memory GiB (0 = auto)"]
    inside = {node["class_type"]: node["inputs"] for node in json.loads(found["exported"]).values()}
    assert inside["InfDiTModelLoader"]["model_name"] == "mini (bundled)"
    assert inside["InfDiTUpscale"]["size.scale"] == 4


@renderers
def test_blueprint_runs_between_load_image_and_save_image(seen: dict, renderer: str) -> None:
    found = seen[f"{renderer} within Upscale with Inf-DiT"]
    assert found["end"] == "success"
    assert [node["pictures"] for node in found["nodes"] if node["type"] == "SaveImage"] == [[RESULT]]
    assert complaints(seen, renderer, found) == []


@renderers
def test_why_a_node_failed_does_not_stand_there_when_it_has_not(seen: dict, renderer: str) -> None:
    """Not even where the next run finds its result in the cache."""
    runs = seen[f"{renderer} failed {EVERYDAY}"]["runs"]
    lines = [text for run in runs for node in run["nodes"] if node["type"] == "InfDiTUpscale" for text in node["texts"]]
    assert [run["end"] for run in runs] == ["success", "error", "success", "success"]  # with what it said to type
    assert lines[0].startswith("256×192 in ")
    assert lines[1].startswith("memory 0.001 GiB is too little: type 0.0")
    assert "too little" not in lines[2]


@renderers
def test_the_number_that_a_refused_size_tells_to_type_works(seen: dict, renderer: str) -> None:
    refused, made = seen[f"{renderer} small {EVERYDAY}"]["runs"]
    (line,) = (text for node in refused["nodes"] if node["type"] == "InfDiTUpscale" for text in node["texts"])
    assert refused["end"] == "error"
    assert line.startswith("longest_side 32 is too small: type 64 at least, for the picture has 64×48 already")
    assert made["end"] == "success"
    assert [node["pictures"] for node in made["nodes"] if node["type"] == "SaveImage"] == [[PICTURE]]


@renderers
def test_a_saved_budget_beyond_the_slider_stays_what_it_is(seen: dict, renderer: str) -> None:
    found = seen[f"{renderer} generous {EVERYDAY}"]
    (node,) = (n for n in found["nodes"] if n["type"] == "InfDiTUpscale")
    at = node["titles"].index("memory GiB (0 = auto)")
    assert (node["values"][at], node["most"][at]) == (64, 32)
    asked = {n["class_type"]: n["inputs"] for n in json.loads(found["exported"]).values()}
    assert asked["InfDiTUpscale"]["memory_budget"] == 64
    assert complaints(seen, renderer, found) == []


@renderers
def test_every_way_to_say_a_size_works_at_the_numbers_that_come_with_it(seen: dict, renderer: str) -> None:
    found = seen[f"{renderer} ways What Inf-DiT would hold in memory"]
    assert list(found) == ["scale by", "width and height", "longest side", "megapixels"]
    for way, run in found.items():
        assert run["end"] == "success", way
        (plan, _) = (node for node in run["nodes"] if node["type"] == "InfDiTMemoryPlan")
        assert way in plan["values"]


@renderers
def test_the_node_takes_a_usual_picture_at_every_way_to_say_a_size(seen: dict, renderer: str) -> None:
    """2048 pixels and 4 megapixels are 4 and 4.6 times 512×384."""
    made = {}
    for way, run in seen[f"{renderer} sizes {EVERYDAY}"].items():
        assert run["end"] == "success", way
        ((made[way],),) = (node["pictures"] for node in run["nodes"] if node["type"] == "SaveImage")
    four = [2048, 1536]
    assert made == {"scale by": four, "width and height": four, "longest side": four, "megapixels": [2365, 1774]}


@renderers
def test_the_line_of_the_last_run_goes_when_a_run_begins(seen: dict, renderer: str) -> None:
    """Then comes the time foretold, then which picture of how many; of a run that fails nothing but why."""
    found = seen[f"{renderer} lines {EVERYDAY}"]
    assert found["ends"] == ["success", "success", "error"]
    first, second, failed = found["lines"]
    assert re.fullmatch(r"256×192 in [\d.]+ s", first[-1])
    assert second[0] == " "
    assert re.fullmatch(r"about .+", second[1])
    assert any(re.match(r"picture [2-5] of 5, \d+%", line) for line in second)
    assert re.fullmatch(r"256×192 in [\d.]+ s", second[-1])
    assert failed[0] == " "
    assert {line.partition(":")[0] for line in failed[1:]} == {"memory 0.001 GiB is too little"}


@renderers
def test_why_core_s_ksampler_failed_stands_on_it_until_it_has_not(seen: dict, renderer: str) -> None:
    failed, mended = seen[f"{renderer} unfit Upscale with a KSampler and Inf-DiT"]["runs"]
    ((line,),) = (node["texts"] for node in failed["nodes"] if node["type"] == "KSampler")
    assert (failed["end"], mended["end"]) == ("error", "success")
    assert re.match(r"latent of shape \(1, 3, \d+, \d+\) must be \(1, 3, 192, 256\): connect the one that", line)
    (gone,) = (node["texts"] for node in mended["nodes"] if node["type"] == "KSampler")
    assert not "".join(gone).strip()


@renderers
def test_what_does_not_fit_the_model_is_told(seen: dict, renderer: str) -> None:
    noisy, refused = seen[f"{renderer} unlike {STEPS}"]["runs"]
    report = "".join(text for node in noisy["nodes"] if node["type"] == "PreviewAny" for text in node["texts"])
    assert "noise begins at 40, and this model was made for 0.03: the picture is lost under it" in report
    ((line,),) = (node["texts"] for node in refused["nodes"] if node["type"] == "InfDiTUpscaleAdvanced")
    assert refused["end"] == "error"
    assert line.startswith("sampler euler_ancestral adds noise while it runs")


def test_core_s_compare_images_shows_nothing_on_the_canvas(seen: dict) -> None:
    """Which is how a page draws nodes unless told otherwise: so there the template puts pictures side by side."""
    found = seen[f"canvas compared {EVERYDAY}"]
    if not found["known"]:
        pytest.skip("this ComfyUI has no Compare Images")
    assert found["end"] == "success"
    assert [node["pictures"] for node in found["nodes"] if node["type"] == "ImageCompare"] == [[]]


@renderers
def test_before_and_after_are_core_s_compare_images_where_that_shows_them(seen: dict, renderer: str) -> None:
    """Of ComfyUI 0.8.0, which has none, and on a canvas: one picture of both. What is saved stays what it is."""
    found = seen[f"{renderer} kept {EVERYDAY}"]
    kinds, before = (sorted(node["type"] for node in one["nodes"]) for one in (found, found["before"]))
    compared = found["known"] and renderer == "vue"
    assert ("ImageCompare" in kinds, "ImageStitch" in kinds, "PreviewImage" in kinds) == (
        compared, not compared, not compared
    )  # fmt: skip
    assert kinds == before
    assert "inf-dit.compare" not in found["saved"]["extra"]
    asked = json.loads(found["before"]["exported"])
    if compared:
        ((one, other),) = ((node["inputs"]["image_a"], node["inputs"]["image_b"]) for node in asked.values()
                           if node["class_type"] == "ImageCompare")  # fmt: skip
        assert [asked[key]["class_type"] for key, _ in (one, other)] == ["LoadImage", "InfDiTUpscale"]
    assert complaints(seen, renderer, found) == []


@renderers
def test_a_budget_says_its_unit_and_that_nothing_means_automatic(seen: dict, renderer: str) -> None:
    (node,) = (n for n in seen[f"{renderer} opened {EVERYDAY}"]["nodes"] if n["type"] == "InfDiTUpscale")
    at = node["titles"].index("memory GiB (0 = auto)")
    assert (node["values"][at], node["most"][at]) == (0, 32)  # most of a slider's way is what cards have


@renderers
def test_a_scheduler_of_zeros_is_the_models_own(seen: dict, renderer: str) -> None:
    found = seen[f"{renderer} run {STEPS}"]
    assert found["end"] == "success"
    (node,) = (n for n in found["nodes"] if n["type"] == "InfDiTScheduler")
    assert node["values"][:3] == [0, 0, 0]
    report = "".join(text for n in found["nodes"] if n["type"] == "PreviewAny" for text in n["texts"])
    assert "sampling: 1 step" in report


@renderers
def test_a_saved_picture_brings_its_workflow_back_and_says_how_it_was_made(
    seen: dict, renderer: str, server: tuple[str, Path]
) -> None:
    found = seen[f"{renderer} dropped {EVERYDAY}"]
    assert found["before"]["end"] == "success"
    nodes, before = ([(node["type"], node["id"]) for node in one["nodes"]] for one in (found, found["before"]))
    assert nodes == before
    assert complaints(seen, renderer, found) == []
    receipt = json.loads(read_note(server[1] / "output" / found["saved"]))
    assert receipt["settings"]["size"] == [RESULT[1], RESULT[0]]
    assert receipt["model"]["name"] == "mini (bundled)"


@renderers
def test_why_a_prompt_was_rejected_stands_on_the_node(seen: dict, renderer: str) -> None:
    """It never ran; the page says only which input was refused."""
    nodes = seen[f"{renderer} rejected {EVERYDAY}"]["nodes"]
    (text,) = (text for node in nodes if node["type"] == "InfDiTModelLoader" for text in node["texts"])
    assert text.startswith("nowhere.safetensors is not in models/infdit: put it there and press R, or choose 'mini")


def test_a_chinese_page_is_told_in_chinese(seen: dict) -> None:
    texts = {node["type"]: node["texts"][0] for node in seen["chinese"]["nodes"] if node["texts"]}
    assert "256×192，用时 " in texts["InfDiTUpscale"]
    assert "\n采样：" in texts["PreviewAny"]


@renderers
def test_only_sdxl_is_missing_where_no_model_is(seen: dict, renderer: str) -> None:
    (said,) = seen[f"{renderer} absent Upscale what SDXL made with Inf-DiT"]["dialogs"]
    assert "absent.safetensors" in said
    assert not re.search("clip|infdit", said, re.IGNORECASE)

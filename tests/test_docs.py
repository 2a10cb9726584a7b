"""Help pages, translations, workflows and the pack's own description, as far as they can be checked without ComfyUI.

tests/comfy/test_docs.py compares locales/en with the nodes' schemas; here the rest is compared with locales/en.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

from infdit.clip.loader import KNOWN

ROOT = Path(__file__).parents[1]
HELP, WORKFLOWS = ROOT / "web" / "docs", ROOT / "workflows"
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
CHINESE = re.compile("[\u4e00-\u9fff]")
NOT_TRANSLATED = {"rho", "CLIP"}


def locale(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def shape(value: object) -> object:
    """What is there, without what it says."""
    return {key: shape(inner) for key, inner in value.items()} if isinstance(value, dict) else type(value).__name__


def texts(value: object) -> list[str]:
    return [text for inner in value.values() for text in texts(inner)] if isinstance(value, dict) else [str(value)]


# ---- translations


def test_all_nodes_are_named_and_described() -> None:
    assert tuple(locale("en")) == NODES


def test_both_languages_say_the_same_things_in_the_same_order() -> None:
    assert json.dumps(shape(locale("zh"))) == json.dumps(shape(locale("en")))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_is_empty_or_read_as_a_placeholder(language: str) -> None:
    for text in texts(locale(language)):
        assert text.strip()
        assert not set("{}@|") & set(text), f"the frontend's translator has a meaning of its own for these: {text}"


def test_chinese_is_chinese() -> None:
    missing = [text for text in texts(locale("zh")) if not CHINESE.search(text)]
    assert set(missing) <= NOT_TRANSLATED


# ---- help pages


def rows(page: str, heading: str) -> list[str]:
    """The first cells of the table after a heading."""
    _, _, rest = page.partition(f"\n## {heading}\n")
    table = rest.split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


def help_page(node: str, language: str = "en") -> str:
    """As the page finds it: its language's first, then the one without a language."""
    path = HELP / f"{node}.md" if language == "en" else HELP / node / f"{language}.md"
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize(("language", "inputs", "outputs"), [("en", "Inputs", "Outputs"), ("zh", "输入", "输出")])
def test_help_page_lists_every_input_and_output_in_order(node: str, language: str, inputs: str, outputs: str) -> None:
    entry, page = locale(language)[node], help_page(node, language)
    asked = [text["name"] for key, text in entry["inputs"].items() if key != "control_after_generate"]
    assert rows(page, inputs) == asked
    assert rows(page, outputs) == [text["name"] for text in entry["outputs"].values()]


@pytest.mark.parametrize("node", NODES)
def test_chinese_help_page_has_all_that_the_english_one_has(node: str) -> None:
    """Title, sections, lines, the picture, and what no language changes: refusals, templates, files, sizes."""
    english, chinese = help_page(node), help_page(node, "zh")
    assert chinese.startswith(f"# {locale('zh')[node]['display_name']}\n")
    for line in (r"^## ", r"^- ", r"^\| "):
        assert len(re.findall(line, chinese, re.MULTILINE)) == len(re.findall(line, english, re.MULTILINE)), line
    refusals, templates = r"(?<=\*\*)[^*\n]*…[^*\n]*(?=\*\*)", r"\*\*([^*\n]+ Inf-DiT[^*\n]*)\*\*"
    for same in (r"\]\(([^)]+)\)", refusals, templates, r"\b[\w-]+\.\w{2,}\b", r"\d+×\d+"):
        assert sorted(re.findall(same, chinese)) == sorted(re.findall(same, english)), same


@pytest.mark.parametrize("node", NODES)
def test_help_page_has_a_title_a_small_picture_a_use_and_a_way_out(node: str) -> None:
    page = help_page(node)
    assert page.startswith(f"# {locale('en')[node]['display_name']}\n")
    assert "\n## Typical use\n" in page
    assert "\n## When it refuses\n" in page
    (name,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    picture = HELP / name
    assert picture.stem == node
    assert picture.stat().st_size < 200_000
    with Image.open(picture) as image:
        assert image.width >= 600  # twice what a panel shows


def test_help_pages_are_of_nodes() -> None:
    assert {path.stem for path in HELP.iterdir()} == set(NODES)


# ---- workflows

EVERYDAY = "Upscale a picture with Inf-DiT"
SCREEN, FILLED = (1600, 900), 0.75  # pixels of a small desktop's page; how much of it a workflow fills that is opened
LEAST_ZOOM = 8 / 14  # below it the page draws no text on nodes


def workflow(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def test_everyday_template_comes_first_and_file_names_are_titles() -> None:
    names = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    assert names[0] == EVERYDAY
    assert all("_" not in name and "Inf-DiT" in name and name[0].isupper() for name in names)


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_workflow_can_be_read_at_the_zoom_at_which_it_opens(path: Path) -> None:
    drawn = json.loads(path.read_text(encoding="utf-8"))
    boxes = [box(*node["pos"], *node["size"], title=30) for node in drawn["nodes"]]
    lefts, tops, rights, bottoms = zip(*boxes, *(box(*group["bounding"]) for group in drawn["groups"]), strict=True)
    zoom = FILLED * min(SCREEN[0] / (max(rights) - min(lefts)), SCREEN[1] / (max(bottoms) - min(tops)))
    assert zoom > LEAST_ZOOM
    for node in drawn["nodes"]:
        if node["type"] == "MarkdownNote":
            (note,) = node["widgets_values"]
            assert all(text.startswith("#") for text in note.split("\n\n")), "plain text is too small to read there"
            assert re.search("[\u4e00-\u9fff]", note.split("\n\n")[-1]), "and the same in Chinese"


def test_models_named_by_workflows_have_addresses_and_digests() -> None:
    """So the page can offer them; the digests are those that the library and the world know."""
    nodes = workflow("Upscale what SDXL made with Inf-DiT")["nodes"]
    models = {node["type"]: node["properties"]["models"][0] for node in nodes if "models" in node["properties"]}
    for kind, model in models.items():
        assert [model["name"]] == next(node["widgets_values"] for node in nodes if node["type"] == kind)
        assert model["url"].startswith("https://huggingface.co/")
        assert model["url"].endswith(f"/{model['name']}")
        assert model["hash_type"] == "SHA256"
    assert models["CheckpointLoaderSimple"]["hash"].startswith("31e35c80fc")  # as Civitai and others shorten it
    assert models["InfDiTCLIPLoader"]["hash"] in KNOWN
    bypassed = {node["type"] for node in nodes if node["mode"] == 4}
    assert bypassed == {"InfDiTCLIPLoader", "InfDiTCLIPEncode"}


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_templates_that_load_a_picture_keep_its_transparency(path: Path) -> None:
    """Load Image gives colours first, then what shows of them."""
    drawn, twin = workflow(path.stem), json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
    links = {link[0]: tuple(link[1:3]) for link in drawn["links"]}
    loads = {node["id"] for node in drawn["nodes"] if node["type"] == "LoadImage"}
    for node in drawn["nodes"]:
        given = {entry["name"]: links.get(entry["link"]) for entry in node["inputs"]}
        origin, _ = given.get("image") or (None, 0)
        if "transparency" in given and origin in loads:
            assert given["transparency"] == (origin, 1)
    for inputs in (node["inputs"] for node in twin.values() if "model" in node["inputs"]):
        if "image" in inputs and twin[inputs["image"][0]]["class_type"] == "LoadImage":
            assert inputs.get("transparency") == [inputs["image"][0], 1]


def test_everyday_template_shows_before_and_after() -> None:
    drawn = workflow(EVERYDAY)
    kinds = {node["id"]: node["type"] for node in drawn["nodes"]}
    slots = {node["id"]: [entry["name"] for entry in node["inputs"]] for node in drawn["nodes"]}
    links = {(kinds[a], kinds[b], slots[b][slot]) for _, a, _, b, slot, _ in drawn["links"]}
    assert ("LoadImage", "ImageStitch", "image2") in links
    assert ("InfDiTUpscale", "ImageStitch", "image1") in links
    assert ("ImageStitch", "PreviewImage", "images") in links
    assert ("InfDiTUpscale", "PreviewAny", "source") in links


def test_blueprint_is_one_node_around_the_two() -> None:
    """Where ComfyUI looks for them: subgraphs/*.json, one node of the type of the one subgraph defined in it."""
    (path,) = (ROOT / "subgraphs").glob("*.json")
    blueprint = json.loads(path.read_text(encoding="utf-8"))
    (inside,), (outside,) = blueprint["definitions"]["subgraphs"], blueprint["nodes"]
    assert inside["name"] == path.stem == "Upscale with Inf-DiT"
    assert outside["type"] == inside["id"]
    assert [node["type"] for node in inside["nodes"]] == ["InfDiTModelLoader", "InfDiTUpscale"]
    assert [entry["name"] for entry in outside["inputs"]] == [entry["name"] for entry in inside["inputs"]]


@pytest.mark.parametrize("path", sorted((ROOT / "locales").glob("*/report.json")), ids=lambda path: path.parent.name)
def test_words_of_reports_are_patterns_and_what_they_become(path: Path) -> None:
    for pattern, words in json.loads(path.read_text(encoding="utf-8")):
        asked = [int(number) for number in re.findall(r"\\(\d)", words)]
        assert max(asked, default=0) <= re.compile(pattern).groups, pattern


def test_the_everyday_template_is_found_first() -> None:
    """ComfyUI's search puts the title of the fewest words first, where all hold what is searched for."""
    words = {path.stem: len(path.stem.split()) for path in WORKFLOWS.glob("*.json")}
    everyday = words.pop("Upscale a picture with Inf-DiT")
    assert everyday < min(words.values())
    assert max(map(len, words)) <= 35  # what is longer ends in dots there


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_workflow_has_a_twin_and_a_thumbnail(path: Path) -> None:
    assert (WORKFLOWS / "api" / path.name).is_file()
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size < 100_000
    with Image.open(thumbnail) as image:
        assert image.format == "JPEG"
        assert 400 <= min(image.size) <= max(image.size) <= 640


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_workflow_is_laid_out(path: Path) -> None:
    """No node on another, notes beside, room for a live preview below those that have one; everything in a group."""
    drawn = json.loads(path.read_text(encoding="utf-8"))
    boxes = {node["id"]: box(*node["pos"], *node["size"], title=30) for node in drawn["nodes"]}
    groups = [box(*group["bounding"]) for group in drawn["groups"]]
    for node in drawn["nodes"]:
        own = left, top, right, bottom = boxes[node["id"]]
        if node["type"] in ("InfDiTUpscale", "InfDiTUpscaleAdvanced"):
            bottom += 300
        others = [other for key, other in boxes.items() if key != node["id"]]
        assert not [o for o in others if left < o[2] and o[0] < right and top < o[3] and o[1] < bottom], node["type"]
        inside = [g for g in groups if g[0] <= own[0] and g[1] <= own[1] and own[2] <= g[2] and own[3] <= g[3]]
        assert inside or node["type"] == "MarkdownNote", node["type"]


def box(x: float, y: float, width: float, height: float, title: float = 0) -> tuple[float, float, float, float]:
    """Left, top, right, bottom; the title of a node is above its position."""
    return x, y - title, x + width, y + height


def test_templates_folder_is_the_one_that_comfyui_serves() -> None:
    """Of these ComfyUI serves the first that is there; another beside workflows/ would hide it."""
    folders = ["example_workflows", "example", "examples", "workflow", "workflows"]
    assert [name for name in folders if (ROOT / name).exists()] == ["workflows"]


# ---- docs/migrating.md


def test_as_many_templates_as_are_said_to_be_found() -> None:
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    (number,) = re.findall(r"Typing \*inf-dit\* there shows (\w+),", page)
    assert number == {6: "six", 7: "seven", 8: "eight", 9: "nine"}[len(list(WORKFLOWS.glob("*.json")))]


# ---- the pack


def test_pack_describes_itself_for_the_registry() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML by itself")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    about = project["tool"]["comfy"]
    assert about["PublisherId"]
    assert about["DisplayName"]
    assert about["requires-comfyui"] == ">=0.8.0"
    assert (ROOT / project["project"]["license"]["file"]).is_file()


@pytest.mark.parametrize(("key", "width", "height"), [("Icon", 400, 400), ("Banner", 1260, 540)])
def test_icon_and_banner_are_drawings_as_the_registry_wants_them(key: str, width: int, height: int) -> None:
    """Square and at most 400 pixels; 21:9. Both are shown from the repository."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML by itself")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    repository, name = project["project"]["urls"]["Repository"], f"{key.lower()}.svg"
    assert project["tool"]["comfy"][key] == f"{repository}/raw/main/{name}"
    drawn = ET.parse(ROOT / name).getroot()
    assert (drawn.get("width"), drawn.get("height")) == (str(width), str(height))
    assert drawn.get("viewBox") == f"0 0 {width} {height}"


def test_help_is_where_comfyui_is_told() -> None:
    assert 'WEB_DIRECTORY = "./web"' in (ROOT / "__init__.py").read_text(encoding="utf-8")


def test_requirements_are_the_packages_dependencies_and_clips() -> None:
    """What a user of ComfyUI installs is what the package says it needs, with what CLIP nodes and deep TIFF need."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML by itself")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *extras["clip"], *extras["tiff"]}
    assert set((ROOT / "requirements.txt").read_text(encoding="utf-8").split()) == wanted

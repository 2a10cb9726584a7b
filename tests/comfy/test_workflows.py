"""The workflows as shipped, one as saved in November 2026, and the API client, on a running ComfyUI with the mini.

A drawn workflow is turned into API format here by the schemas that ComfyUI hands out, as its frontend does it, and
must say what its twin says. The one that was saved stays as it is for good: files like it are out there.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from clipmath import text_shapes, tower_shapes
from PIL import Image

from api_client.upscale_folder import Prompt, Server
from infdit.clip import encoder as towers

pytestmark = pytest.mark.comfy

ROOT = Path(__file__).parents[2]
WORKFLOWS, SAVED = ROOT / "workflows", Path(__file__).parent / "data"
DRAWN = {path.stem: path for path in sorted(WORKFLOWS.glob("*.json"))}
TWINS = {name: WORKFLOWS / "api" / f"{name}.json" for name in DRAWN}
DRAWN["saved_2026_11"], TWINS["saved_2026_11"] = SAVED / "saved_2026_11.json", SAVED / "saved_2026_11_api.json"
CLIP = "open_clip_pytorch_model.bin"
PICTURE, SIZE = "small picture.png", (24, 16)
PAGE_ONLY = {"MarkdownNote", "Note", "ImageStitch", "PreviewImage"}  # what a script has no use for
BYPASSED = 4
WIDGETS = {"COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def get(address: str, path: str) -> dict:
    with urllib.request.urlopen(address + path, timeout=30) as answer:
        return json.loads(answer.read())


# ---- a drawn workflow in API format


def widget_values(schema: dict, values: list, prefix: str = "") -> dict:
    """The values of a node's widgets by the names of their inputs. Takes them out of `values`, in order.

    A file that was saved before a widget was added has no value for it, and the page takes the default: new widgets
    come last.
    """
    found = {}
    inputs = schema.get("required", {}) | schema.get("optional", {})
    for name, (kind, *rest) in inputs.items():
        if not values:
            break
        options = rest[0] if rest else {}
        if kind == "COMFY_DYNAMICCOMBO_V3":
            chosen = found[prefix + name] = values.pop(0)
            (nested,) = (option["inputs"] for option in options["options"] if option["key"] == chosen)
            found |= widget_values(nested, values, f"{prefix}{name}.")
        elif isinstance(kind, list) or kind in WIDGETS:
            found[prefix + name] = values.pop(0)
            if options.get("control_after_generate") or options.get("image_upload"):
                values.pop(0)  # of the widget that says what becomes of the seed, or of the button
    return found


def in_api_format(drawn: dict, schemas: dict) -> Prompt:
    links = {link[0]: [str(link[1]), link[2]] for link in drawn["links"]}
    prompt = {}
    kept = [node for node in drawn["nodes"] if node["type"] not in PAGE_ONLY and node["mode"] != BYPASSED]
    links = {key: link for key, link in links.items() if link[0] in {str(node["id"]) for node in kept}}
    for node in kept:
        values = list(node.get("widgets_values", []))
        inputs = widget_values(schemas[node["type"]]["input"], values)
        assert not values, f"{node['type']} has no widgets for {values}"
        inputs |= {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry.get("link") in links}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_workflow_and_its_api_twin_say_the_same(server: tuple[str, Path], name: str) -> None:
    drawn, twin = read(DRAWN[name]), read(TWINS[name])
    said = {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in twin.items()}
    assert in_api_format(drawn, get(server[0], "/object_info")) == said


# ---- running them


@pytest.fixture(scope="module")
def clip_file(server: tuple[str, Path]) -> Iterator[str]:
    """CLIP ViT-L-14 in full size, of random weights. They share one piece of the file: 80 MB instead of 1.7 GB."""
    shapes = tower_shapes(towers.VIT_L_14) | text_shapes(towers.VIT_L_14_TEXT)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    noise = torch.randn(max(sizes.values()), generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    path = server[1] / "models" / "clip_vision" / CLIP
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: noise[: sizes[name]].view(shape) for name, shape in shapes.items()}, path)
    yield CLIP
    path.unlink()


@pytest.fixture(scope="module")
def picture(server: tuple[str, Path]) -> str:
    """A small picture with a transparent half in ComfyUI's input folder."""
    image = Image.linear_gradient("L").resize(SIZE)
    alpha = Image.new("L", SIZE, 255)
    alpha.paste(0, (0, 0, SIZE[0] // 2, SIZE[1]))
    Image.merge("RGBA", (image, image.rotate(180), image, alpha)).save(server[1] / "input" / PICTURE)
    return PICTURE


def run(address: str, prompt: Prompt, picture: str) -> dict[str, dict]:
    """What each node showed or saved: texts, and sizes of pictures."""
    for node in prompt.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = picture
    comfyui = Server(address)
    prompt_id = comfyui.queue(prompt)
    comfyui.wait(prompt_id)
    outputs = get(address, f"/history/{prompt_id}")[prompt_id]["outputs"]
    return {
        key: {"text": "".join(output.get("text", [])), "sizes": [size(address, i) for i in output.get("images", [])]}
        for key, output in outputs.items()
    }


def size(address: str, image: dict) -> tuple[int, int]:
    return saved(address, image).size


def saved(address: str, image: dict) -> Image.Image:
    query = urllib.parse.urlencode({key: image[key] for key in ("filename", "subfolder", "type")})
    with urllib.request.urlopen(f"{address}/view?{query}", timeout=30) as answer:
        return Image.open(io.BytesIO(answer.read()))


def node_id(prompt: Prompt, kind: str, title: str = "") -> str:
    (found,) = (k for k, n in prompt.items() if n["class_type"] == kind and title in n["_meta"]["title"])
    return found


def without_sdxl(prompt: Prompt) -> Prompt:
    """From the decoded picture on, with Load Image in its place."""
    decode = node_id(prompt, "VAEDecode")
    kept = {k: n for k, n in prompt.items() if n["class_type"].startswith(("InfDiT", "Save", "Preview"))}
    kept[decode] = {"class_type": "LoadImage", "inputs": {"image": ""}, "_meta": {"title": ""}}
    return kept


def test_upscale_a_picture(server: tuple[str, Path], picture: str) -> None:
    prompt = read(TWINS["Upscale a picture with Inf-DiT"])
    found = run(server[0], prompt, picture)
    assert found[node_id(prompt, "SaveImage")]["sizes"] == [(96, 64)]
    assert "24×16 to 96×64" in found[node_id(prompt, "PreviewAny")]["text"]


def test_upscale_after_sdxl_from_the_decoded_picture_on(server: tuple[str, Path], picture: str) -> None:
    """The bundled model is all that it takes: nothing of CLIP is there."""
    prompt = without_sdxl(read(TWINS["Upscale what SDXL made with Inf-DiT"]))
    found = run(server[0], prompt, picture)
    assert found[node_id(prompt, "SaveImage")]["sizes"] == [(96, 64)]
    report = found[node_id(prompt, "PreviewAny")]["text"]
    assert "24×16 to 96×64" in report
    assert "conditioning" not in report


def test_upscale_sixteen_times(server: tuple[str, Path], picture: str) -> None:
    prompt = read(TWINS["Upscale up to 16 times with Inf-DiT"])
    assert run(server[0], prompt, picture)[node_id(prompt, "SaveImage")]["sizes"] == [(384, 256)]


def test_memory_plan(server: tuple[str, Path], picture: str) -> None:
    prompt = read(TWINS["What Inf-DiT would hold in memory"])
    found = run(server[0], prompt, picture)
    for plan, report in (("Plan: automatic", "Report: automatic"), ("Plan: 5 GiB", "Report: 5 GiB")):
        text = found[node_id(prompt, "PreviewAny", report)]["text"]
        assert "2048×2048 to 8192×8192" in text
        assert "\nfits\n" in text
        ((width, height),) = found[node_id(prompt, "InfDiTMemoryPlan", plan)]["sizes"]
        assert width > 500
        assert height > 200


def test_advanced_sampling(server: tuple[str, Path], picture: str) -> None:
    prompt = read(TWINS["Upscale step by step with Inf-DiT"])
    found = run(server[0], prompt, picture)
    assert found[node_id(prompt, "SaveImage")]["sizes"] == [(96, 64)]
    report = found[node_id(prompt, "PreviewAny")]["text"]
    assert "1 step of euler; starts without noise: the seed changes nothing" in report


def test_every_control_beside_the_others(server: tuple[str, Path], picture: str) -> None:
    """One picture each, in one size; the bundled model takes neither prompt nor preset, and says so."""
    prompt = read(TWINS["What each control of Inf-DiT does"])
    found = run(server[0], prompt, picture)
    assert found[node_id(prompt, "SaveImage")]["sizes"] == [(48, 32)] * 5
    assert "preset: balanced changes nothing" in found[node_id(prompt, "PreviewAny")]["text"]


def test_ksampler(server: tuple[str, Path], picture: str) -> None:
    prompt = read(TWINS["Upscale with a KSampler and Inf-DiT"])
    assert run(server[0], prompt, picture)[node_id(prompt, "SaveImage")]["sizes"] == [(96, 64)]


def test_workflow_saved_in_november_2026(server: tuple[str, Path], picture: str, clip_file: str) -> None:
    """Of all seven nodes that there were, every way to give a size, values that are not the defaults."""
    found = run(server[0], read(TWINS["saved_2026_11"]), picture)
    sizes = {key: output["sizes"] for key, output in found.items() if output["sizes"]}
    plot = sizes.pop("13")
    assert len(plot) == 1
    assert sizes == {"6": [(77, 51)], "12": [(60, 40)], "16": [(36, 24)], "18": [(77, 51)]}
    assert "1 step of dpmpp_2m; starts without noise" in found["7"]["text"]
    assert "not the 2 asked for are taken" in found["7"]["text"]
    assert "640×480 to 1870×1402" in found["14"]["text"]


# ---- the client


def test_folder_of_pictures_through_the_api(server: tuple[str, Path], tmp_path: Path) -> None:
    folder, results = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    half = Image.new("RGBA", (8, 6), "teal")
    half.paste((0, 0, 0, 0), (0, 0, 4, 6))
    half.save(folder / "half.png")
    for name, shape in (("a.png", (10, 8)), ("b ä.jpg", (7, 12)), ("b ä.webp", (32, 20))):
        Image.new("RGB", shape, "teal").save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    command = [sys.executable, ROOT / "api_client" / "upscale_folder.py", folder, "-o", results, "--server", server[0]]

    def upscale() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--set", "InfDiTUpscale.size.scale=2"], capture_output=True, encoding="utf-8", check=False
        )

    first = upscale()
    assert {p.name: Image.open(p).size for p in results.glob("*.png")} == {
        "a.png": (20, 16),
        "b ä.jpg.png": (14, 24),
        "b ä.webp.png": (64, 40),
        "half.png": (16, 12),
    }
    modes = {p.name: Image.open(p).mode for p in results.glob("*.png")}
    assert modes.pop("half.png") == "RGBA"  # what is transparent stays so
    alpha = Image.open(results / "half.png").getchannel("A")
    assert (alpha.getpixel((1, 6)), alpha.getpixel((14, 6))) == (0, 255)
    assert set(modes.values()) == {"RGB"}, "nothing is added to what is not"
    assert first.returncode == 1  # for the broken one, which does not keep the others from being done
    assert "4 of 5  broken.png  failed: LoadImage: cannot identify image file" in first.stdout
    times = {p: p.stat().st_mtime_ns for p in results.glob("*.png")}
    again = upscale()
    assert again.stdout.count("is there already") == 4
    assert {p: p.stat().st_mtime_ns for p in results.glob("*.png")} == times

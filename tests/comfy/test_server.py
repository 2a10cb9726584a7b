"""The pack in a running ComfyUI, over HTTP and the socket (client.py), on every ComfyUI found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfy

WORKFLOWS = Path(__file__).parents[2] / "workflows"
# ids, inputs in their order and outputs are a public format: saved workflows depend on them; only append
INPUTS = {
    "InfDiTModelLoader": {"model_name": "COMBO", "dtype": "COMBO"},
    "InfDiTUpscale": {
        "model": "INFDIT_MODEL",
        "image": "IMAGE",
        "scale": "FLOAT",
        "steps": "INT",
        "sampler_name": "COMBO",
        "denoise": "FLOAT",
        "seed": "INT",
    },
}
OUTPUTS = {"InfDiTModelLoader": ["INFDIT_MODEL"], "InfDiTUpscale": ["IMAGE"]}
TITLES = {"InfDiTModelLoader": "Load Inf-DiT Model", "InfDiTUpscale": "Inf-DiT Upscale"}
VIRTUAL = {"MarkdownNote", "Note"}  # nodes of the frontend only


def options(entry: list) -> list[str]:
    """The choices of a combo: in the type's place, or among its settings in newer versions."""
    return entry[0] if isinstance(entry[0], list) else entry[1]["options"]


@pytest.mark.parametrize("name", INPUTS)
def test_node_is_listed_with_its_schema(online: dict, name: str) -> None:
    node = online["describe"][name]
    required = node["input"]["required"]
    types = {key: "COMBO" if isinstance(entry[0], list) else entry[0] for key, entry in required.items()}
    assert types == INPUTS[name]
    assert node["input_order"]["required"] == list(INPUTS[name])
    assert not node["input"].get("optional")
    assert node["output"] == OUTPUTS[name]
    assert node["display_name"] == TITLES[name]
    assert node["category"] == "image/upscaling/Inf-DiT"
    assert node["description"]
    assert all(len(entry[1].get("tooltip", "")) > 10 for entry in required.values())
    assert all(len(tooltip) > 10 for tooltip in node["output_tooltips"])


def test_choices_and_limits(online: dict) -> None:
    loader = online["describe"]["InfDiTModelLoader"]["input"]["required"]
    assert options(loader["model_name"]) == ["mini (bundled)", "broken.safetensors"]
    assert options(loader["dtype"]) == ["auto", "bf16", "fp16", "fp32"]
    asked = online["describe"]["InfDiTUpscale"]["input"]["required"]
    assert options(asked["sampler_name"]) == ["auto", "heun", "euler", "dpmpp_2m"]
    limits = {key: [asked[key][1][what] for what in ("default", "min", "max")] for key in ("scale", "steps", "denoise")}
    assert limits == {"scale": [4.0, 1.01, 4.0], "steps": [0, 0, 1000], "denoise": [1.0, 0.0, 1.0]}
    assert asked["seed"][1]["max"] == 2**64 - 1
    assert asked["seed"][1]["control_after_generate"]


def test_workflow_is_a_template_with_a_thumbnail(online: dict) -> None:
    found = online["templates"]
    shipped = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    assert found["listed"] == shipped
    # of example_workflows, example, examples, workflow, workflows it serves only the first that exists in a pack
    assert found["status"] == 200
    assert all(found["thumbnails"][name] for name in shipped), "each template has a .jpg of its name"


def test_workflow_as_shipped_gives_four_times_the_size(online: dict) -> None:
    found = online["as_shipped"]
    assert (found["end"], found["message"]) == ("success", "")
    ((result),) = found["results"]
    assert (result["size"], result["format"]) == ([256, 192], "PNG")
    assert result["range"][1] - result["range"][0] > 50


def test_progress_and_live_picture_reach_the_page(online: dict) -> None:
    found = online["as_shipped"]
    moves = [(value, most) for node, value, most in found["moves"] if node == "3"]
    assert moves
    assert moves == sorted(moves)
    assert moves[-1][0] == moves[-1][1]
    previews = [preview for preview in found["previews"] if preview["node"] in ("3", None)]
    assert previews
    # ComfyUI scales a live picture to the longest side that a node asks for
    assert all((preview["format"], preview["size"]) == ("JPEG", [512, 384]) for preview in previews)


def test_stop_button_and_the_run_after_it(online: dict) -> None:
    found = online["stopped"]
    assert found["end"] == "interrupted"
    assert found["seconds_to_stop"] < 3  # of a run of a minute; a layer of a chunk takes far less than one second
    assert found["moves"][-1][1] < found["moves"][-1][2] / 2
    assert found["after"] == "success"
    assert [result["size"] for result in found["results"]] == [[256, 192]]


def test_what_is_refused(online: dict) -> None:
    found = online["refused"]
    assert [found[name]["end"] for name in ("missing", "scale")] == ["rejected", "rejected"]
    assert "nowhere.safetensors" in found["missing"]["message"]
    assert found["broken"]["end"] == "error"
    assert "broken.safetensors: is not a complete" in found["broken"]["message"]


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_workflow_and_its_api_twin_say_the_same(online: dict, path: Path) -> None:
    drawn = json.loads(path.read_text())
    twin = json.loads((WORKFLOWS / "api" / path.name).read_text())
    drawn_nodes = {str(node["id"]): node for node in drawn["nodes"] if node["type"] not in VIRTUAL}
    assert {key: node["class_type"] for key, node in twin.items()} == {k: n["type"] for k, n in drawn_nodes.items()}
    links = {link[0]: [str(link[1]), link[2]] for link in drawn["links"]}
    for key, node in drawn_nodes.items():
        linked = {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry.get("link")}
        said = twin[key]["inputs"]
        assert {name: value for name, value in said.items() if isinstance(value, list)} == linked
        schema = online["describe"].get(node["type"])
        if schema is None:
            continue
        widgets = []
        for name in schema["input_order"]["required"]:
            if name not in linked:
                widgets.append(said[name])
                if schema["input"]["required"][name][1].get("control_after_generate"):
                    widgets.append("fixed")
        assert node["widgets_values"] == widgets

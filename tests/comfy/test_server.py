"""The pack in a running ComfyUI, over HTTP and the socket (client.py), on every ComfyUI found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfy

WORKFLOWS = Path(__file__).parents[2] / "workflows"
SIZE = "COMFY_DYNAMICCOMBO_V3"
# ids, inputs in their order and outputs are a public format: saved workflows depend on them; only append
INPUTS = {
    "InfDiTModelLoader": {"model_name": "COMBO", "dtype": "COMBO", "devices": "STRING?"},
    "InfDiTCLIPLoader": {"clip_name": "COMBO"},
    "InfDiTCLIPEncode": {
        "clip": "INFDIT_CLIP",
        "image": "IMAGE",
        "positive": "STRING?",
        "negative": "STRING?",
        "strength": "FLOAT?",
        "view": "COMBO?",
    },
    "InfDiTUpscale": {
        "model": "INFDIT_MODEL",
        "image": "IMAGE",
        "size": SIZE,
        "steps": "INT",
        "sampler_name": "COMBO",
        "denoise": "FLOAT",
        "seed": "INT",
        "memory_budget": "FLOAT",
        "conditioning": "INFDIT_CONDITIONING?",
        "mask": "MASK?",
        "transparency": "MASK?",
        "fidelity": "FLOAT?",
        "colour_match": "BOOLEAN?",
        "preset": "COMBO?",
        "resume": "BOOLEAN?",
    },
    "InfDiTMemoryPlan": {
        "model": "INFDIT_MODEL",
        "width": "INT",
        "height": "INT",
        "size": SIZE,
        "memory_budget": "FLOAT",
        "image": "IMAGE?",
    },
    "InfDiTUpscaleAdvanced": {
        "model": "INFDIT_MODEL",
        "image": "IMAGE",
        "size": SIZE,
        "noise": "NOISE",
        "sampler": "SAMPLER",
        "sigmas": "SIGMAS",
        "memory_budget": "FLOAT",
        "conditioning": "INFDIT_CONDITIONING?",
        "transparency": "MASK?",
    },
    "InfDiTScheduler": {
        "steps": "INT",
        "sigma_max": "FLOAT",
        "sigma_min": "FLOAT",
        "rho": "FLOAT",
        "denoise": "FLOAT",
        "model": "INFDIT_MODEL?",
    },
    "InfDiTToModel": {
        "model": "INFDIT_MODEL",
        "image": "IMAGE",
        "size": SIZE,
        "memory_budget": "FLOAT",
        "conditioning": "INFDIT_CONDITIONING?",
        "transparency": "MASK?",
    },
}
SIZES = {
    "scale by": {"scale": "FLOAT"},
    "width and height": {"width": "INT", "height": "INT"},
    "longest side": {"longest_side": "INT"},
    "megapixels": {"megapixels": "FLOAT"},
}
OUTPUTS = {
    "InfDiTModelLoader": ["INFDIT_MODEL"],
    "InfDiTCLIPLoader": ["INFDIT_CLIP"],
    "InfDiTCLIPEncode": ["INFDIT_CONDITIONING"],
    "InfDiTUpscale": ["IMAGE", "MASK", "STRING"],
    "InfDiTMemoryPlan": ["STRING", "IMAGE"],
    "InfDiTUpscaleAdvanced": ["IMAGE", "IMAGE", "STRING"],
    "InfDiTScheduler": ["SIGMAS"],
    "InfDiTToModel": ["MODEL", "CONDITIONING", "CONDITIONING", "LATENT", "VAE"],
}
TITLES = {
    "InfDiTModelLoader": "Load Inf-DiT Model",
    "InfDiTCLIPLoader": "Load Inf-DiT CLIP",
    "InfDiTCLIPEncode": "Inf-DiT CLIP Encode",
    "InfDiTUpscale": "Inf-DiT Upscale",
    "InfDiTMemoryPlan": "Inf-DiT Memory Plan",
    "InfDiTUpscaleAdvanced": "Inf-DiT Upscale (Advanced)",
    "InfDiTScheduler": "Inf-DiT Scheduler",
    "InfDiTToModel": "Inf-DiT to Model",
}
# default, least, most
RANGES = {
    "InfDiTCLIPEncode": {"strength": [2.0, 0.0, 10.0]},
    "InfDiTUpscale": {
        "steps": [0, 0, 1000],
        "denoise": [1.0, 0.0, 1.0],
        "seed": [0, 0, 2**64 - 1],
        "memory_budget": [0.0, 0.0, 32.0],
        "fidelity": [0.0, 0.0, 1.0],
    },
    "InfDiTMemoryPlan": {
        "width": [1024, 1, 65536],
        "height": [1024, 1, 65536],
        "memory_budget": [0.0, 0.0, 32.0],
    },
    "InfDiTUpscaleAdvanced": {"memory_budget": [0.0, 0.0, 32.0]},
    "InfDiTToModel": {"memory_budget": [0.0, 0.0, 32.0]},
    "InfDiTScheduler": {
        "steps": [0, 0, 1000],
        "sigma_max": [0.0, 0.0, 5000.0],
        "sigma_min": [0.0, 0.0, 100.0],
        "rho": [7.0, 1.0, 100.0],
        "denoise": [1.0, 0.0, 1.0],
    },
}
SIZE_RANGES = {
    "scale": [4.0, 1.0, 16.0],
    "width": [2048, 0, 65536],
    "height": [0, 0, 65536],
    "longest_side": [2048, 1, 65536],
    "megapixels": [4.0, 0.01, 4096.0],
}
VIRTUAL = {"MarkdownNote", "Note"}  # nodes of the frontend only


def options(entry: list) -> list[str]:
    """The choices of a combo: in the type's place, or among its settings in newer versions."""
    return entry[0] if isinstance(entry[0], list) else entry[1]["options"]


def inputs_of(node: dict) -> dict[str, list]:
    """All inputs in their order, the optional ones last."""
    order = node["input_order"]
    return {
        name: node["input"][kind][name] for kind in ("required", "optional") for name in order.get(kind, [])
    }


def kind(entry: list) -> str:
    return "COMBO" if isinstance(entry[0], list) else entry[0]


@pytest.mark.parametrize("name", INPUTS)
def test_node_is_listed_with_its_schema(online: dict, name: str) -> None:
    node = online["describe"][name]
    optional = node["input"].get("optional", {})
    types = {key: kind(entry) + ("?" if key in optional else "") for key, entry in inputs_of(node).items()}
    assert types == INPUTS[name]
    assert list(types) == list(INPUTS[name])
    assert node["output"] == OUTPUTS[name]
    assert node["display_name"] == TITLES[name]
    assert node["category"] == "image/upscaling/Inf-DiT"
    assert node["description"]
    assert node["output_node"] == (name == "InfDiTMemoryPlan")
    assert all(len(entry[1].get("tooltip", "")) > 10 for entry in inputs_of(node).values())
    assert all(len(tooltip) > 10 for tooltip in node["output_tooltips"])


@pytest.mark.parametrize("name", ["InfDiTUpscale", "InfDiTMemoryPlan", "InfDiTUpscaleAdvanced"])
def test_size_is_said_in_four_ways(online: dict, name: str) -> None:
    offered = inputs_of(online["describe"][name])["size"][1]["options"]
    found = {option["key"]: option["inputs"]["required"] for option in offered}
    assert {key: {name: kind(entry) for name, entry in inputs.items()} for key, inputs in found.items()} == SIZES
    assert list(found) == list(SIZES)  # the first is the default
    settings = {name: entry[1] for inputs in found.values() for name, entry in inputs.items()}
    assert {name: [x[what] for what in ("default", "min", "max")] for name, x in settings.items()} == SIZE_RANGES
    assert all(len(x["tooltip"]) > 10 for x in settings.values())
    assert settings["scale"]["display"] == "slider"


@pytest.mark.parametrize("name", RANGES)
def test_ranges(online: dict, name: str) -> None:
    asked = inputs_of(online["describe"][name])
    found = {key: [asked[key][1][what] for what in ("default", "min", "max")] for key in RANGES[name]}
    assert found == RANGES[name]
    numbers = {key for key, entry in asked.items() if entry[0] in ("INT", "FLOAT")}
    assert numbers == set(RANGES[name])


def test_choices(online: dict) -> None:
    loader = inputs_of(online["describe"]["InfDiTModelLoader"])
    assert options(loader["model_name"]) == ["mini (bundled)", "broken.safetensors"]
    assert options(loader["dtype"]) == ["auto", "bf16", "fp16", "fp32"]
    upscale = inputs_of(online["describe"]["InfDiTUpscale"])
    assert options(upscale["sampler_name"]) == ["auto", "heun", "euler", "dpmpp_2m", "dpmpp_3m"]
    assert options(upscale["preset"]) == ["model's own", "paper", "balanced", "draft"]
    assert upscale["seed"][1]["control_after_generate"] in ("fixed", True)  # a bool is all that older ones take
    assert options(inputs_of(online["describe"]["InfDiTCLIPEncode"])["view"]) == ["crop", "pad"]
    assert options(inputs_of(online["describe"]["InfDiTCLIPLoader"])["clip_name"]) == ["broken.safetensors"]


def test_sliders_and_folded_inputs(online: dict) -> None:
    sliders, folded = set(), set()
    for name in INPUTS:
        for key, entry in inputs_of(online["describe"][name]).items():
            sliders |= {(name, key)} if entry[1].get("display") == "slider" else set()
            folded |= {(name, key)} if entry[1].get("advanced") else set()
    budgets = {(name, "memory_budget") for name, asked in INPUTS.items() if "memory_budget" in asked}
    others = {("InfDiTUpscale", "denoise"), ("InfDiTScheduler", "denoise"), ("InfDiTCLIPEncode", "strength")}
    others |= {("InfDiTUpscale", "fidelity")}
    assert sliders == budgets | others
    assert folded == {
        ("InfDiTModelLoader", "dtype"),
        ("InfDiTModelLoader", "devices"),
        ("InfDiTUpscale", "steps"),
        ("InfDiTUpscale", "sampler_name"),
        ("InfDiTUpscale", "fidelity"),
        ("InfDiTUpscale", "colour_match"),
        ("InfDiTUpscale", "preset"),
        ("InfDiTUpscale", "resume"),
        ("InfDiTScheduler", "sigma_min"),
        ("InfDiTScheduler", "rho"),
    }


def test_search_aliases_where_comfyui_has_them(online: dict, checkout: object) -> None:
    if tuple(map(int, checkout.version.split("."))) >= (0, 11):
        assert all("inf-dit" in " ".join(online["describe"][name]["search_aliases"]) for name in INPUTS)


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
    assert found["texts"][-1]["node"] == "3"
    assert re.fullmatch(r"256×192 in [\d.]+ s", found["texts"][-1]["text"])
    # ComfyUI scales a live picture to the longest side that a node asks for
    assert all((preview["format"], preview["size"]) == ("JPEG", [512, 384]) for preview in previews)


def test_stop_button_and_the_run_after_it(online: dict) -> None:
    found = online["stopped"]
    assert found["ends"] == ["interrupted"] * 3
    assert max(found["waited"]) < 3  # of a run of a minute; a layer of a chunk takes far less than one second
    assert found["moves"][-1][1] < found["moves"][-1][2] / 2
    assert found["after"] == "success"
    assert [result["size"] for result in found["results"]] == [[256, 192]]


def test_a_page_is_told_in_its_own_language(online: dict) -> None:
    found = online["in_chinese"]
    assert (found["status"], found["bad"]) == (200, 400)
    assert re.fullmatch(r"256×192，用时 [\d.]+ 秒", found["zh"][-1]["text"])
    assert re.fullmatch(r"256×192 in [\d.]+ s", found["other"][-1]["text"])


def test_what_is_refused(online: dict) -> None:
    found = online["refused"]
    assert [found[name]["end"] for name in ("missing", "scale")] == ["rejected", "rejected"]
    assert found["budget"]["end"] == "error"
    assert "memory 0.001 GiB is too little: type 0.0" in found["budget"]["message"]
    assert "nowhere.safetensors" in found["missing"]["message"]
    assert found["broken"]["end"] == "error"
    assert "broken.safetensors: is not a complete" in found["broken"]["message"]


def test_why_a_node_failed_is_said_on_it_until_the_next_prompt(online: dict) -> None:
    """Even if nothing has to be run then; of a file its name, for a node shows two lines."""
    found = online["refused"]
    assert found["broken"]["texts"][-1]["text"].startswith("broken.safetensors: is not a complete")
    assert "memory 0.001 GiB is too little" in found["budget"]["texts"][-1]["text"]
    assert found["again"]["end"] == "success"
    assert found["again"]["texts"][0] == {"node": found["budget"]["texts"][-1]["node"], "text": " "}

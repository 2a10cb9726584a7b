"""Model files and CLIP inside ComfyUI (cases_models.py), on every ComfyUI found."""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.comfy


def test_dtype_choices(inside: dict) -> None:
    found = inside["dtypes"]
    loaded = {name: case["dtypes"] for name, case in found.items()}
    assert loaded == {
        "auto": [found["auto"]["expected"]],
        "bf16": ["torch.bfloat16"],
        "fp16": ["torch.float16"],
        "fp32": ["torch.float32"],
    }
    for case in found.values():
        assert case["end"] == "success"
        assert case["finite"]
        assert case["dtype"] == "torch.float32"


@pytest.mark.parametrize("name", ["cut.safetensors", "noise.safetensors", "noise.pt", "empty.safetensors"])
def test_unusable_file_gives_one_sentence(inside: dict, name: str) -> None:
    found = inside["files"][name]
    message = found["message"].strip()
    assert found["end"] == "error"
    assert found["type"].endswith("CheckpointError")
    assert name in message
    assert "not a complete" in message
    assert message.endswith(".")
    assert "\n" not in message


def test_unusable_pt_leaves_nothing_beside_it(inside: dict) -> None:
    assert inside["files"]["left"] == ["noise.pt", "noise.safetensors"]  # both were there before


@pytest.mark.parametrize(
    ("name", "end"), [("vanishing.safetensors", "error"), ("unlisted", "rejected"), ("clip", "rejected")]
)
def test_missing_file_gives_folder_readme_and_command(inside: dict, name: str, end: str) -> None:
    found = inside["files"][name]
    said = {"unlisted": "nowhere.safetensors", "clip": "x.clip.safetensors"}.get(name, name)
    assert found["end"] == end
    assert f"{said} is not in " in found["message"]
    assert "/models/infdit: put it there and press R" in found["message"]
    assert "The README tells more under " in found["message"]
    assert f"`python -m infdit convert mp_rank_00_model_states.pt {said}`" in found["message"]


@pytest.mark.parametrize("name", ["''", "'.'", "'..'", "None"])
@pytest.mark.parametrize("kind", ["model", "clip"])
def test_name_that_is_none_is_refused_with_what_to_choose(inside: dict, kind: str, name: str) -> None:
    found = inside["files"][f"named {name}"][kind]
    assert found["end"] in ("rejected", "error")
    assert f"{kind}_name is {name}: choose " in found["message"]
    assert "Traceback" not in found["message"]


def test_name_may_come_by_a_link_and_stays_in_the_folder(inside: dict) -> None:
    assert (inside["files"]["linked"]["end"], inside["files"]["linked"]["message"]) == ("success", "")
    assert inside["files"]["outside"]["end"] == "error"
    assert "secret.safetensors is not in " in inside["files"]["outside"]["message"]


def test_replaced_file_is_loaded_again(inside: dict) -> None:
    assert ["loader" in ran for ran in inside["replaced"]["linked"]] == [True, False], "a name that comes by a link"
    loads = ["loader" in ran for ran in inside["replaced"]["ran"]]
    assert loads == [True, False, True, False]  # first; unchanged; newer; unchanged


def test_published_pt_is_converted_once(inside: dict) -> None:
    found = inside["conversion"]
    assert found["first"]["end"] == found["again"]["end"] == "success"
    assert found["first"]["made"]
    assert found["again"]["same"]
    assert found["again"]["bar"] == 0
    assert {"config", "converted_from", "defaults", "sha256"} <= set(found["metadata"])
    assert found["left"] == ["published.pt", "published.safetensors"]
    assert found["before"] == found["after"]  # the original is never touched


def test_conversion_moves_a_bar(inside: dict) -> None:
    moves = inside["conversion"]["first"]["bar"]
    assert len(moves) >= 2
    assert moves == sorted(moves)
    assert moves[-1][0] == moves[-1][1]


def test_changed_pt_is_converted_again(inside: dict) -> None:
    assert inside["conversion"]["changed"] == {"end": "success", "same": False}


def test_file_of_others_in_the_way_is_kept(inside: dict) -> None:
    assert inside["conversion"]["not ours"] == {"end": "success", "kept": True, "layers": 3}  # the .pt, not the mini


def test_pt_that_cannot_be_converted_is_used_as_it_is(inside: dict) -> None:
    assert inside["conversion"]["locked"] == {"end": "success", "layers": 3}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_pipe_in_a_models_place_is_not_waited_for(inside: dict) -> None:
    """One beside a .pt is not its conversion; one that is chosen is no file."""
    found = inside["pipes"]
    assert found["beside"] == {"end": "success", "message": "", "type": "", "layers": 3}
    for kind in ("model", "clip"):
        assert found[kind]["end"] in ("rejected", "error")
        assert "piped.safetensors is not in " in found[kind]["message"]
    assert (found["waited"], found["kept"]) == (False, True)


# ---- CLIP


def test_list_of_clip_files_begins_with_the_likeliest(inside: dict) -> None:
    listed = inside["clip"]["listed"]
    assert listed[:4] == ["x.clip.safetensors", "blind.safetensors", "clip.safetensors", "noise.safetensors"]
    assert "published.pt" in listed


@pytest.mark.parametrize("name", ["picture", "batch", "texts", "no strength", "whole", "alpha"])
def test_vectors_are_the_librarys(inside: dict, name: str) -> None:
    found = inside["clip"][name]
    assert (found["end"], found["message"]) == ("success", "")
    assert found["shape"] == [2 if name == "batch" else 1, 32]
    assert found["length"] == pytest.approx([1.0] * found["shape"][0], abs=1e-5)
    assert found.get("difference", 0) <= 1e-6
    assert any("is not known to be the CLIP" in text for text in found["warnings"])


def test_what_was_encoded_is_told(inside: dict) -> None:
    found = inside["clip"]
    assert found["picture"]["told"] == found["no strength"]["told"] == "the picture as clip.safetensors sees it"
    told = found["texts"]["told"]
    assert "led to 'a sharp photograph' and away from 'blur' with strength 3" in told


def test_text_that_is_too_long_is_told(inside: dict) -> None:
    assert any("CLIP reads 75 tokens and this text has 100" in text for text in inside["clip"]["long"]["warnings"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blind", "cannot read text"),
        ("noise", "is not a complete"),
        ("model", "holds no CLIP vision tower"),
        ("empty", "is empty: give at least one picture"),
    ],
)
def test_clip_that_cannot_be_used(inside: dict, name: str, words: str) -> None:
    found = inside["clip"][name]
    assert found["end"] == "error"
    assert words in found["message"]
    assert "\n" not in found["message"].strip()


def test_missing_clip_gives_the_folders(inside: dict) -> None:
    found = inside["clip"]["unlisted"]
    assert found["end"] == "rejected"
    assert "/models/clip_vision or " in found["message"]
    assert "open_clip_pytorch_model.bin" in found["message"]


def test_limits_of_clip_inputs(inside: dict) -> None:
    assert len(inside["clip"]["limits"]) == 4
    assert not any(inside["clip"]["limits"].values())


def test_conditioning_reaches_the_model(inside: dict) -> None:
    found = inside["conditioning"]
    for name in ("listens", "told nothing"):
        assert (found[name]["end"], found[name]["message"]) == ("success", "")
        assert found[name]["difference"] <= 1e-5
    assert "conditioning: the picture as clip.safetensors sees it, led to 'sharp'" in found["listens"]["report"]
    assert "conditioning: none, zeros stand for" in found["told nothing"]["report"]


def test_conditioning_of_a_model_without_clip_is_ignored(inside: dict) -> None:
    found = inside["conditioning"]["deaf"]
    assert found["end"] == "success"
    assert "conditioning: ignored, this model has no CLIP input" in found["report"]


def test_clip_works_on_the_card_if_there_is_room_and_leaves_it(inside: dict) -> None:
    found = inside["clip_and_memory"]
    load = "load ['force_full_load', 'memory_required']"
    assert found["room"] == [load, "to cuda:0", "work", "unload", "to cpu"]
    assert found["no room"] == ["work"]

"""The nodes inside ComfyUI's own validator and executor (drive.py), on every ComfyUI found."""

from __future__ import annotations

import itertools
import math

import pytest

pytestmark = pytest.mark.comfy

BAR_INTERVAL = 0.1  # seconds: what the bar may be moved at most, beside its pictures
BLOCK, LAYERS = 32, 6  # of the bundled model: pixels of a block, layers


def test_import_is_cheap_and_touches_no_network(inside: dict) -> None:
    found = inside["importing"]
    assert found["loaded"]
    assert found["network"] == []
    assert not found["open_clip"]
    assert not {"transformers", "matplotlib", "psutil", "huggingface_hub"} & set(found["modules"])
    assert found["seconds"] < 5


def test_nothing_ever_touches_the_network(inside: dict) -> None:
    assert inside["network"]["reached"] == []


def test_model_folder_of_the_user_is_kept(inside: dict) -> None:
    found = inside["importing"]
    assert found["folders"] == ["elsewhere", "models/infdit"]
    assert found["extensions"] == [".odd", ".pt", ".safetensors"]
    assert found["listed"] == ["mine.safetensors"]  # and not the note beside it


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("small", [1, 48, 40, 3]),
        ("batch", [2, 36, 48, 3]),
        ("alpha", [1, 40, 36, 4]),
        ("pixel", [1, 4, 4, 3]),
        ("wide", [1, 61, 152, 3]),  # 24 × 60 by 2.53 is 60.72 × 151.8
    ],
)
def test_node_gives_the_picture_of_the_library(inside: dict, name: str, shape: list[int]) -> None:
    found = inside["equal"][name]
    assert found["end"] == "success"
    assert found["shape"] == found["expected_shape"] == shape
    assert found["difference"] <= 1e-5
    assert found["contrast"] > 0.01  # so that two blank pictures do not count as equal
    assert found["dtype"] == "torch.float32"
    assert found["device"] == "cpu"
    assert found["finite"]
    assert 0 <= found["least"] <= found["most"] <= 1
    assert found["untouched"]


def test_picture_of_half_precision(inside: dict) -> None:
    found = inside["half_picture"]
    assert (found["end"], found["shape"], found["dtype"]) == ("success", [1, 48, 40, 3], "torch.float32")
    assert found["finite"]


def test_largest_seeds_work(inside: dict) -> None:
    found = inside["seeds"]
    assert found["other"] > 0
    assert found["again"] == 0


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


def test_weights_are_in_comfyui_memory_management(inside: dict) -> None:
    found = inside["memory"]
    assert found["loaded"] == ["InfDiTWeights"]
    assert found["left"] == []
    assert found["end"] == "success"
    assert found["difference"] == 0  # thrown out and brought back, the model is what it was


def test_bar_and_live_pictures(inside: dict) -> None:
    found = inside["bar"]
    assert found["end"] == "success"
    values = [value for _, value, _, _ in found["bar"]]
    pictures = [picture for _, _, _, picture in found["bar"] if picture]
    blocks = math.ceil(4 * 24 / BLOCK) * math.ceil(4 * 60 / BLOCK)
    assert {total for _, _, total, _ in found["bar"]} == {4 * LAYERS * blocks}  # euler: one evaluation a step
    assert values == sorted(values)
    assert values[-1] == 4 * LAYERS * blocks
    assert pictures == [["JPEG", "RGB", 240, 96, 512]] * 4  # one a step


def test_bar_is_not_moved_too_often(inside: dict) -> None:
    moves = [when for when, value, total, picture in inside["bar"]["bar"] if picture is None and value < total]
    assert all(later - earlier >= 0.9 * BAR_INTERVAL for earlier, later in itertools.pairwise(moves))


def test_interrupt_stops_at_once_and_the_next_run_is_whole(inside: dict) -> None:
    found = inside["interrupt"]
    assert found["stopped"] == "interrupted"
    assert found["looks"] == 5  # nothing looked at the button after it was pressed: nothing went on
    assert found["whole"] == "success"
    assert found["looks_in_whole"] >= 4 * LAYERS  # at least once a layer of an evaluation
    assert found["shape"] == [1, 96, 240, 3]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("vanishing.safetensors", "no longer in models/infdit"),
        ("cut.safetensors", "not a complete"),
        ("noise.safetensors", "not a complete"),
        ("noise.pt", "not a complete"),
        ("empty.safetensors", "not a complete"),
    ],
)
def test_unusable_file_gives_one_sentence(inside: dict, name: str, what: str) -> None:
    found = inside["files"][name]
    message = found["message"].strip()
    assert found["end"] == "error"
    assert found["type"].endswith("CheckpointError")
    assert name in message
    assert what in message
    assert message.endswith(".")
    assert "\n" not in message


def test_file_that_was_never_there_is_rejected(inside: dict) -> None:
    found = inside["files"]["unlisted"]
    assert found["end"] == "rejected"
    assert "nowhere.safetensors" in found["message"]


def test_clip_beside_a_model_is_no_model(inside: dict) -> None:
    assert inside["files"]["clip"]["end"] == "rejected"


def test_replaced_file_is_loaded_again(inside: dict) -> None:
    loads = ["loader" in ran for ran in inside["replaced"]["ran"]]
    assert loads == [True, False, True, False]  # first; unchanged; newer; unchanged


def test_values_beyond_the_limits_are_rejected(inside: dict) -> None:
    found = inside["limits"]["beyond"]
    assert len(found) == 13
    assert [case for case, accepted in found.items() if accepted] == []


def test_values_at_the_limits_are_accepted(inside: dict) -> None:
    found = inside["limits"]["within"]
    assert len(found) == 8
    assert [case for case, accepted in found.items() if not accepted] == []


def test_least_denoise_and_scale(inside: dict) -> None:
    found = inside["least_denoise"]
    assert (found["end"], found["shape"]) == ("success", [1, 12, 10, 3])
    assert found["finite"]

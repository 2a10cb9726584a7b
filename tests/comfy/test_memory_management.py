"""Memory inside ComfyUI (cases_memory.py), on every ComfyUI found."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.comfy

GIB, MIB = 2**30, 2**20


def test_weights_are_in_comfyui_memory_management(inside: dict) -> None:
    found = inside["memory"]
    assert found["loaded"] == ["InfDiTWeights"]
    assert found["same"]  # the second prompt found them there
    assert found["left"] == []
    assert found["end"] == "success"
    assert found["difference"] == 0  # thrown out and brought back, the model is what it was


@pytest.mark.parametrize(("name", "mib"), [("24 MiB", 24), ("40 MiB", 40)])
def test_budget_is_kept(inside: dict, name: str, mib: int) -> None:
    found = inside["budgets"][name]
    assert found["end"] == "success"
    assert found["peak"] <= mib * MIB
    (predicted,) = re.findall(r"peak: ([\d.]+) MiB predicted", found["report"])
    assert float(predicted) * MIB == pytest.approx(found["peak"], rel=0.005)  # a rounded number


def test_budgets_change_the_plan_and_not_the_picture(inside: dict) -> None:
    found = inside["budgets"]
    plans = {(found[name]["group"], found[name]["chunk"]) for name in ("automatic", "24 MiB", "40 MiB")}
    assert len(plans) > 1  # a budget between two plans changes none
    assert found["difference"] <= 1e-5


def test_budget_that_is_too_small_names_the_least(inside: dict) -> None:
    found = inside["budgets"]["2 MiB"]
    assert (found["end"], found["type"].rpartition(".")[2]) == ("error", "BudgetTooSmall")
    assert re.search(r"memory 0.00195 GiB is too little: type 0.0\d at least for 192×192, or 0", found["message"])
    assert inside["budgets"]["as it was told to type"]["end"] == "success"


@pytest.mark.parametrize("name", ["little free", "less free than asked"])
def test_no_more_is_taken_than_is_free(inside: dict, name: str) -> None:
    assert inside["budgets"][name]["end"] == "success"
    assert inside["budgets"][name]["peak"] <= 28 * MIB


def test_more_than_the_host_has_is_refused_at_once(inside: dict) -> None:
    found = inside["host_too_small"]
    assert (found["end"], found["type"].rpartition(".")[2]) == ("error", "BudgetTooSmall")
    assert "is all that can be had here now" in found["message"]
    assert found["loaded"] == 0
    assert found["after"] == "success"


def test_template_of_plans_fits_a_machine_without_a_card(inside: dict) -> None:
    """Of 24 GB, half of which the system and a browser may have; and it would say so if it did not."""
    found = inside["template_of_plans"]
    assert found["12"] == {"end": "success", "verdicts": ["fits", "fits"]}
    assert found["3"]["end"] == "success"
    assert all(verdict.startswith("does not fit: 8192×8192 takes ") for verdict in found["3"]["verdicts"])


@pytest.mark.parametrize(
    ("name", "words"),
    [("always", "out of memory on cpu, and no smaller plan works"), ("outside", "set memory GiB below ")],
)
def test_out_of_memory_is_one_clear_error(inside: dict, name: str, words: str) -> None:
    found = inside["out_of_memory"][name]
    assert (found["end"], found["type"].rpartition(".")[2]) == ("error", "OutOfMemory")
    assert words in found["message"]
    assert "\n" not in found["message"].strip()
    assert found["unloaded"] == []  # other models stay where they are
    assert found["after"] == "success"
    assert found["alive"][1] <= found["alive after"][1] + MIB


def test_auto_is_the_dtype_that_comfyui_would_choose(inside: dict) -> None:
    assert inside["chosen_dtypes"] == {
        "Ampere": "bfloat16",
        "Turing": "float16",
        "old": "float32",
        "force_fp32": "float32",
        "force_fp16": "float16",
        "bf16_unet": "bfloat16",
        "fp32_unet": "float32",
        "forced on a CPU": "float32",
    }


@pytest.mark.parametrize(("name", "gib"), [("plenty", 63), ("little", 3), ("disabled", 0)])
def test_no_more_is_pinned_than_comfyui_lets(inside: dict, name: str, gib: int) -> None:
    found = inside["pins"][name]
    assert found["pinnable"] == gib
    assert found["pinned"] == (name == "plenty")
    assert ("not pinned" in "".join(found["lines"])) == (name != "plenty")


def test_nan_is_one_clear_error(inside: dict) -> None:
    found = inside["not_finite"]
    assert (found["end"], found["type"].rpartition(".")[2]) == ("error", "WrongNumbers")
    assert "NaN or inf in step 1 in float16: choose bf16 or fp32" in found["message"]
    assert found["after"] == "success"


def test_run_goes_on_after_memory_ran_out(inside: dict) -> None:
    found = inside["resumed"]
    assert found["ends"] == ["success", "success"]
    assert found["calls"] == 6  # five evaluations, one of them twice
    assert found["difference"] <= 1e-5
    assert "note: out of memory: going on with a smaller plan" in found["report"]


def test_nothing_stays_alive_but_the_weights(inside: dict) -> None:
    found = inside["given_back"]
    assert found["alive"][1:] == found["alive"][:-1]
    assert found["stopped"] == "interrupted"
    assert found["after"] == found["alive"][-1]


# ---- a card that is not there


@pytest.mark.parametrize(
    ("name", "thrifty"),
    [
        ("half is too little", True),
        ("idle models", True),
        ("little in all", False),
        ("budget beyond", False),
    ],
)
def test_automatic_budget_is_the_thrifty_plan_or_what_can_be_had(inside: dict, name: str, thrifty: bool) -> None:
    found = inside["card"][name]
    assert found["thrifty"] is thrifty
    assert found["result"] == "done"
    if not thrifty:
        assert found["peak"] <= 0.9 * 0.75 * GIB < found["thrifty peak"]


@pytest.mark.parametrize("name", ["much free", "resident"])
def test_automatic_budget_keeps_all_in_place_where_half_of_what_is_free_is_enough(inside: dict, name: str) -> None:
    found = inside["card"][name]
    assert found["in place"]
    assert found["weights"] == "resident"
    assert found["thrifty peak"] < found["peak"] <= found["half"]
    beside = found["peak"] - inside["card"]["weights"]
    assert found["calls"][0] == ["load", {"memory_required": beside, "force_full_load": True}]


def test_what_yields_by_itself_is_not_moved_out(inside: dict) -> None:
    """Ours is moved out, then the peak is asked for as for a model that yields, then what is to be pinned."""
    found = {name: state["calls"] for name, state in inside["yielding"].items()}
    ours, room, pins = ["free", 1e30, 1, False, 0, 0], ["free", 5, 0, True, 0, 0], ["free", 0, 0, False, 9, 9]
    assert found["streamed"] == [ours, room, pins]
    assert found["unpinned"] == found["small"] == [ours, room]
    assert found["small beside plain"] == [["load"]]
    assert found["streamed in 0.8.0"] == [ours[:3], room[:3]]
    assert found["clip"] == [["free", 7 + 2**30, 0, True, 0, 0], ours]
    assert found["clip beside plain"] == [["load"], ours]


def test_what_comfyui_has_pinned_and_would_give_back_can_be_had(inside: dict) -> None:
    found = inside["yielding"]
    assert found["streamed"]["pinnable"] == 4
    assert found["small beside plain"]["pinnable"] == 1


def test_a_host_that_is_full_is_made_room_on(inside: dict) -> None:
    found = inside["host_that_is_full"]
    (asked,) = found["asked"]
    assert 2 * GIB < found["host"] <= 0.9 * asked + 1


def test_given_budget_is_a_limit(inside: dict) -> None:
    assert inside["card"]["budget"]["peak"] <= 4 * GIB
    assert inside["card"]["budget bytes"] == [None, GIB // 2]


@pytest.mark.parametrize("name", ["resident", "budget", "little in all"])
def test_a_smaller_plan_leaves_the_weights_where_they_are(inside: dict, name: str) -> None:
    found = inside["card"][name]
    assert found["smaller"]["weights"] == found["weights"]
    assert found["smaller"]["peak"] < found["peak"]


def test_what_cannot_be_had_is_refused(inside: dict) -> None:
    found = inside["card"]["too little"]
    assert "on the graphics card is all that can be had here now" in found["refused"]
    assert found["least"] > GIB // 8


@pytest.mark.parametrize("name", ["half is too little", "idle models", "little in all", "budget", "budget beyond"])
def test_streamed_plan_moves_ours_out_and_then_frees_its_peak(inside: dict, name: str) -> None:
    found = inside["card"][name]
    (first, endless, kept), (second, size, also_kept), *rest = found["calls"]
    assert found["weights"] == "streamed"
    assert (first, second) == ("free", "free")
    assert endless > 1e20  # all of ours
    assert kept == [False] + [True] * (len(kept) - 1)  # and of nobody else
    assert size == found["peak"]  # never more than the plan holds
    assert not any(also_kept)
    assert rest == [["to", "cpu"], ["work"], ["empty cache"]]


def test_resident_plan_is_loaded_whole_with_room_beside_it(inside: dict) -> None:
    found = inside["card"]["resident"]
    beside = found["peak"] - inside["card"]["weights"]
    load = ["load", {"memory_required": beside, "force_full_load": True}]
    assert found["calls"] == [load, ["to", "cuda:0"], ["work"], ["empty cache"]]


def test_comfyui_moves_models_for_ours_and_ours_for_others(inside: dict) -> None:
    """Through ComfyUI's own load_models_gpu and free_memory."""
    found = inside["management"]
    weights = 1_506_861_536 / GIB
    ours = {name: state["ours"] for name, state in found.items()}
    others = {name: state["other"] for name, state in found.items()}
    assert others["other loaded"] == others["other loaded again"] == 10
    assert others["streamed"] == 10  # there was room
    for name, state in found.items():
        if state["kept"] == "streamed":
            assert state["ours"] == 0, name
        if state["kept"] == "resident":
            assert state["ours"] == pytest.approx(weights, rel=1e-3), name
        if state["peak"] is not None:
            assert state["free"] + state["ours"] >= state["peak"], name
    needed = found["streamed with 6 GiB"]["peak"] - 2  # GiB beyond what was free
    assert needed <= 10 - others["streamed with 6 GiB"] <= needed + 2  # whole parts of a GiB, and one in flight
    assert 0 < ours["ours evicted in part"] < weights
    assert ours["resident after that"] == ours["resident"]
    assert ours["all unloaded"] == others["all unloaded"] == 0


def test_peak_on_a_card_is_ours_alone(inside: dict) -> None:
    found = inside["measured_on_a_card"]
    assert found["streamed"] == {"peak": 5000, "reserved": 6976, "reset": ["cuda:0"]}
    weights = found["weights"]  # they are there before and are part of the run
    assert found["resident"] == {"peak": weights + 5000, "reserved": weights + 6976, "reset": ["cuda:0"]}

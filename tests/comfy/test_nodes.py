"""The nodes inside ComfyUI's own validator and executor (drive.py), on every ComfyUI found."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest

from nodes.words import in_language

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
    assert found["listed"] == ["mine.safetensors", "noisy.safetensors"]  # and not the note beside it


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("small", [1, 48, 40, 3]),
        ("batch", [2, 36, 48, 3]),
        ("alpha", [1, 40, 36, 4]),
        ("pixel", [1, 4, 4, 3]),
        ("wide", [1, 61, 153, 3]),  # 24 × 60 to a height of 61: 152.5 wide
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
    assert found.get("wanted", ["torch.float16"] * 2) == ["torch.float16"] * 2
    assert found["finite"]


def test_largest_seeds_work(inside: dict) -> None:
    found = inside["seeds"]
    assert found["other"] > 0
    assert found["again"] == 0


@pytest.mark.parametrize(
    ("asked", "outcome"),
    [
        ("scale by {'scale': 4.0} of 9x12", [36, 48]),
        ("scale by {'scale': 1.5} of 3x5", [5, 8]),  # halves up
        ("width and height {'width': 100, 'height': 0} of 30x40", [75, 100]),
        ("width and height {'width': 0, 'height': 100} of 30x40", [100, 133]),
        ("width and height {'width': 41, 'height': 120} of 30x40", [120, 41]),
        ("longest side {'longest_side': 100} of 40x30", [100, 75]),
        ("longest side {'longest_side': 160} of 40x1", [160, 4]),
        ("megapixels {'megapixels': 1.0} of 512x512", [1024, 1024]),
        ("megapixels {'megapixels': 0.25} of 200x300", [418, 627]),  # by √(2^18 / 60000) = 2.0902
        ("scale by {'scale': 1.01} of 10x10", [10, 10]),
        ("scale by {'scale': 8.0} of 10x10", [80, 80]),
        ("scale by {'scale': 18.0} of 10x10", "scale 18 is too large: type 16 at most, 16 times the picture's 10×10"),
        ("longest side {'longest_side': 8192} of 400x300", "longest_side 8192 is too large: type 6400 at most"),
        ("megapixels {'megapixels': 1.0} of 1x1", "megapixels cannot say what a picture of 1×1 becomes"),
        ("width and height {'width': 0, 'height': 0} of 30x40", "are both 0: give at least one"),
        ("width and height {'width': 641, 'height': 0} of 30x40", "width 641 is too large: type 640 at most"),
        ("width and height {'width': 80, 'height': 29} of 30x40", "height 29 is too small: type 30 at least"),
        ("longest side {'longest_side': 40} of 30x40", [30, 40]),
        ("longest side {'longest_side': 39} of 30x40", "longest_side 39 is too small: type 40 at least"),
        ("megapixels {'megapixels': 250.0} of 1000x1000", "megapixels 250 is too large: type 244.14 at most"),
        ("twice {} of 30x40", "as one of scale by, width and height, longest side, megapixels"),
    ],
)
def test_ways_to_say_a_size(inside: dict, asked: str, outcome: list[int] | str) -> None:
    found = inside["sizes"]["asked"][asked]
    if isinstance(outcome, str):
        assert outcome in found
        assert "\n" not in found
    else:
        assert found == outcome


def test_every_way_works_at_its_default_for_pictures_of_sdxl(inside: dict) -> None:
    found = inside["size_defaults"]
    assert len(found) == 4 * 9
    for asked, outcome in found.items():
        height, width = map(int, asked.split(" of ")[1].split("x"))
        assert not isinstance(outcome, str), f"{asked}: {outcome}"
        assert 1 < outcome[0] / height <= 4
        assert outcome[1] / outcome[0] == pytest.approx(width / height, rel=2e-3)


def test_number_that_a_refusal_says_to_type_works(inside: dict) -> None:
    tried = inside["size_numbers"]["tried"]
    told = [case for case in tried if case["told"]]
    assert len(told) > 500
    for case in told:
        height, width = case["of"]
        most = 2 if case["said"]["size"] == "width and height" else 1  # one for each side
        assert len(case["told"]) <= most, case
        if not isinstance(case["outcome"], str):  # else another way is needed
            assert height <= case["outcome"][0] <= 16 * height, case
            assert width <= case["outcome"][1] <= 16 * width, case
    worked = sum(not isinstance(case["outcome"], str) for case in told)
    assert worked > 0.9 * len(told)


def test_sizes_through_the_node(inside: dict) -> None:
    # 24 × 60 with a longest side of 100; with 10486 pixels, by √(10485.76 / 1440) = 2.6985
    assert inside["sizes"]["through the node"] == [[1, 40, 100, 3], [1, 65, 162, 3]]


@pytest.mark.parametrize("name", ["given", "several", "flat", "half", "beside alpha", "alpha", "none"])
def test_mask_is_of_the_results_size(inside: dict, name: str) -> None:
    found = inside["masks"][name]
    assert (found["end"], found["message"]) == ("success", "")
    assert found["shape"][1:] == found["image"][1:3]
    assert found["shape"][0] == {"several": 2, "none": 2}.get(name, 1)
    assert found["difference"] <= 1e-6
    assert found["dtype"] == "torch.float32"
    if name == "none":
        assert found["most"] == 0
    else:
        assert found["most"] - found["least"] > 0.3


def test_mask_beside_alpha_leaves_the_alpha(inside: dict) -> None:
    assert inside["masks"]["beside alpha"]["image"][-1] == 4
    assert inside["masks"]["beside alpha"]["least"] != inside["masks"]["alpha"]["least"]


def test_empty_mask_is_refused(inside: dict) -> None:
    assert inside["masks"]["empty"]["end"] == "error"
    assert "of at least one pixel" in inside["masks"]["empty"]["message"]


def amount(text: str) -> float:
    """MiB out of "15.2 MiB" or "0.3 GiB"."""
    number, unit = text.split()
    return float(number) * {"MiB": 1, "GiB": 1024}[unit]


def test_report_says_what_ran(inside: dict) -> None:
    found = inside["reports"]["plain"]
    *lines, receipt = found["report"].splitlines()
    assert found["end"] == "success"
    said = json.loads(receipt.removeprefix("receipt: "))
    assert (said["settings"]["size"], said["settings"]["seed"], said["evaluations"]) == ([48, 40], 5, 3)
    assert re.fullmatch(r"10×12 to 40×48 in [\d.]+ s \([\d.]+ s a step\)", lines[0])
    assert lines[1] == "sampling: 3 steps of euler, noise 0.1 to 0.01, seed 5"
    assert lines[2] == "model: noisy.safetensors, float32 on cpu"
    assert re.fullmatch(r"made small again, against the input: [\d.]+ dB, ΔE2000 [\d.]+(; .+)?", lines[3])
    assert lines[4].startswith("plan: ")
    measured = r"peak: [\d.]+ MiB predicted, [\d.]+ MiB measured; more memory would save less than 10% of the time"
    assert re.fullmatch(measured, lines[5])
    assert len(lines) == 6
    assert max(map(len, lines)) < 100


@pytest.mark.parametrize(
    ("preset", "words", "steps"),
    [
        ("paper", "39 evaluations", "20 steps of heun"),
        ("balanced", "noise levels tuned to this model, 13 evaluations", "13 steps of dpmpp_3m"),
        ("draft", "noise levels tuned to this model, 8 evaluations", "8 steps of dpmpp_3m"),
    ],
)
def test_preset_of_a_model_of_many_steps(inside: dict, preset: str, words: str, steps: str) -> None:
    found = inside["presets"][preset]
    assert found["message"] == ""
    assert found["difference"] < 1e-5
    assert f"sampling: {steps}, noise 0.1 to " in found["report"]
    assert re.search(rf"\npreset: {preset}, {words}, about \d+ \w+ foretold\n", found["report"])


def test_report_of_the_bundled_model(inside: dict) -> None:
    """It starts without noise and gains nothing from a second step: both are said."""
    lines = inside["reports"]["bundled"]["report"].splitlines()
    assert lines[1] == "sampling: 1 step of euler; starts without noise: the seed changes nothing"
    assert lines[2].startswith("model: mini (bundled)")
    assert lines[3] == "note: one step is all that this model gains from, so not the 4 asked for are taken"


def test_report_says_what_helps_where_the_result_is_not_like_the_picture(inside: dict) -> None:
    """The bundled model takes away the blur of ×4: what is sharp, at ×1, it makes too sharp."""
    for name, differs in (("bundled", False), ("bundled, sharp", True)):
        (line,) = (line for line in inside["reports"][name]["report"].splitlines() if line.startswith("made small"))
        assert (float(re.search(r"ΔE2000 ([\d.]+)", line)[1]) > 2) == differs
        assert line.endswith("; more fidelity or less denoise helps") == differs


def test_all_that_reports_say_has_chinese_words(inside: dict) -> None:
    cards = [[plan["verdict"], *plan["words"], *plan["alternatives"]] for plan in inside["plans_of_a_card"].values()]
    found = [*inside["reports"].values(), *inside["plans"].values()]
    texts = [run["report"].splitlines() for run in found if isinstance(run, dict)]
    lines = {line for text in (*texts, *inside["noise_notes"].values(), *cards) for line in text}
    assert len(lines) > 50
    for line in lines:
        if not line.startswith("receipt: ") and "host memory" not in line:
            said = in_language(line, "zh").replace("mini (bundled)", "mini")
            assert not re.search(r"[A-Za-z]{3,} [A-Za-z]{2,}", said), (line, said)


def test_report_of_several_pictures_within_a_budget(inside: dict) -> None:
    lines = inside["reports"]["budget"]["report"].splitlines()
    assert lines[0].startswith("12×9 to 48×36, 2 pictures in ")
    assert "(made for 0.1 to 0.01)" in lines[1]  # denoise is 0.5


def test_report_of_one_step_names_its_one_noise_level(inside: dict) -> None:
    assert "sampling: 1 step of euler, noise 0.1, seed 5" in inside["reports"]["one step"]["report"].splitlines()


def test_report_without_steps(inside: dict) -> None:
    assert "sampling: none, this is the plain enlargement" in inside["reports"]["none"]["report"]
    assert "a step" not in inside["reports"]["none"]["report"]


def test_bar_and_live_pictures(inside: dict) -> None:
    found = inside["bar"]
    assert found["end"] == "success"
    values = [value for _, value, _, _ in found["bar"]]
    pictures = [picture for _, _, _, picture in found["bar"] if picture]
    blocks = math.ceil(4 * 24 / BLOCK) * math.ceil(4 * 60 / BLOCK)
    total = 96 + 4 * LAYERS * blocks  # rows that are prepared; euler: one evaluation a step
    assert {whole for _, _, whole, _ in found["bar"]} == {total}
    assert values == sorted(values)
    assert values[-1] == total
    assert len(pictures) >= 4  # one a step, and some within steps if those take long
    assert all(picture == ["JPEG", "RGB", 240, 96, 512] for picture in pictures)


def test_bar_is_not_moved_too_often(inside: dict) -> None:
    moves = [when for when, value, total, picture in inside["bar"]["bar"] if picture is None and value < total]
    assert all(later - earlier >= 0.9 * BAR_INTERVAL for earlier, later in itertools.pairwise(moves))


def test_time_left_is_told_on_the_node(inside: dict) -> None:
    assert {node for _, node in inside["bar"]["told"]} == {"upscale"}
    told = [text for text, _ in inside["bar"]["told"] if text.strip()]
    assert len(told) >= 2
    assert re.fullmatch(r"about [\d.]+ s", told[0])  # before the first block is done
    assert all(re.fullmatch(r"preparing|\d+%(, .+ left)?", text) for text in told[1:-1])
    assert re.fullmatch(r"240×96 in [\d.]+ s", told[-1])


def test_picture_of_a_batch_is_told_on_the_node(inside: dict) -> None:
    told = [text for text, _ in inside["several_told"]["told"] if text.strip()]
    numbers = [int(text.split()[1]) for text in told[1:-1]]
    assert re.fullmatch(r"picture 2 of 3, \d+%, .+ left", told[len(told) // 2])
    assert numbers == sorted(numbers)
    assert set(numbers) == {1, 2, 3}


def test_reason_is_told_on_the_node_that_fails(inside: dict) -> None:
    before, failed, after = ([text for text, _ in told] for told in inside["failed_after_success"]["told"])
    assert before[-1].startswith("100×40 in ")
    assert failed[0] == " "  # the line of the last run goes when a run begins; pages ignore empty ones
    assert failed[1].startswith("longest_side 9000 is too large: type 960 at most, 16 times the picture's 60×24")
    assert len(failed) == 2
    assert after[0] == " "
    assert after[-1].startswith("100×40 in ")


def test_reason_is_told_on_a_loader(inside: dict) -> None:
    found = inside["failed_after_success"]
    ((said, node),) = found["loader"]
    assert node == "loader"
    assert said.startswith("damaged.safetensors: is not a complete")
    assert found["message"].strip().endswith(said)


@pytest.mark.parametrize(
    ("name", "node", "words"),
    [
        ("model", "loader", "nowhere.safetensors is not in models/infdit: put it there and press R, or choose 'mini"),
        ("clip", "c", "nowhere.bin is not in models/clip_vision or models/infdit: put "),
        ("budget", "upscale", "memory_budget is -1.0 and must be a number from 0 to 1024"),
        ("plan", "plan", "memory_budget is 2000.0 and must be a number from 0 to 1024"),
    ],
)
def test_reason_is_told_on_a_node_that_comfyui_rejects(inside: dict, name: str, node: str, words: str) -> None:
    """The page says only which input: why is behind a click. The way out is in the two lines that a node shows."""
    found = inside["rejected"][name]
    assert found["end"] == "rejected"
    assert [where for _, where in found["told"]] == [node]
    assert found["told"][0][0].startswith(words)


def test_no_time_is_told_of_the_first_blocks(inside: dict) -> None:
    """Of one of 9500, which is slow, hours would follow."""
    preparing, first, later = inside["pace"]["told"]
    assert (preparing, first) == ("preparing", "5%")
    assert re.fullmatch(r"7%, [\d.]+ s left", later)


@pytest.mark.parametrize(("name", "shown"), [("none", False), ("auto", True), ("page", False)])
def test_preview_method_none_is_obeyed(inside: dict, name: str, shown: bool) -> None:
    assert inside["no_live_picture"][name] == [shown, [shown]]


def test_several_devices_make_the_picture_of_one(inside: dict) -> None:
    found = inside["several_devices"]
    assert found["end"] == "success"
    assert found["difference"] == 0
    shares = re.search(
        r"^at the same time: layers 1 to 3 on cpu, (\S+ MiB); layers 4 to 6 on cpu, (\S+ MiB)$", found["report"], re.M
    )
    assert shares is not None
    done = [value for value, _ in found["bar"]]
    assert done == sorted(done)
    assert done[-1] == found["bar"][-1][1]
    assert found["stopped"] == "interrupted"
    assert found["out of memory"] == "success"
    assert len(found["replanned"]) == 1
    assert all(found["refused"].values())


def test_interrupt_stops_at_once_and_the_next_run_is_whole(inside: dict) -> None:
    found = inside["interrupt"]
    assert found["stopped"] == "interrupted"
    assert found["told"] == [["stopped", "upscale"]]
    assert found["looks"] == 5  # nothing looked at the button after it was pressed: nothing went on
    assert found["whole"] == "success"
    assert found["looks_in_whole"] >= 4 * LAYERS  # at least once a layer of an evaluation
    assert found["shape"] == [1, 96, 240, 3]


def test_values_beyond_the_limits_are_rejected(inside: dict) -> None:
    found = inside["limits"]["beyond"]
    assert len(found) == 25
    assert [case for case, accepted in found.items() if accepted] == []


def test_values_at_the_limits_are_accepted(inside: dict) -> None:
    found = inside["limits"]["within"]
    assert len(found) == 16
    assert [case for case, accepted in found.items() if not accepted] == []


def test_least_denoise_and_scale(inside: dict) -> None:
    found = inside["least_denoise"]
    assert (found["end"], found["shape"]) == ("success", [1, 24, 61, 3])  # 24.24 × 60.6
    assert found["finite"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty batch", "is empty: give at least one picture"),
        ("not finite", "not finite"),
        ("bytes", "torch.uint8 must be of floating point in 0..1: divide values of 0..255 by 255"),
        ("two channels", "must be (batch, height, width, 3 or 4): make it RGB or RGBA"),
        ("to 255", "and must be of 0..1: divide values of 0..255 by 255"),
        ("nothing", "image is of type NoneType: connect a node that gives an IMAGE"),
        ("list", "image is of type list: connect a node that gives an IMAGE"),
        ("mask: nan mask", "mask holds values that are not finite"),
        ("mask: mask to 255", "mask holds values from 255 to 255 and must be of 0..1"),
        ("mask: list", "mask of list must be of floating point in 0..1: connect a node that gives a MASK"),
        ("too small", "longest_side 5 is too small: type 12 at least"),
        ("too large", "longest_side 4096 is too large: type 192 at most, 16 times the picture's 10×12"),
        ("no size", "size must be chosen on the node, as one of scale by,"),
        ("size unsaid", 'its keys are flat, as "size": "scale by", "size.scale": 4'),
        ("size nested", 'its keys are flat, as "size": "scale by", "size.scale": 4'),
        ("link into size", "links can give only its numbers"),
        ("nothing into size", "links can give only its numbers"),
        ("scale none", "size.scale is None and must be a number"),
        ("scale text", "size.scale is '4' and must be a number"),
        ("budget below", "memory_budget is -1.0 and must be a number from 0 to 1024"),
        ("budget none", "memory_budget is None and must be a number from 0 to 1024"),
        ("half steps", "steps is 2.5 and must be a whole number from 0 to 1000"),
        ("denoise below", "denoise is -1.0 and must be a number from 0 to 1"),
        ("seed list", "seed is [1] and must be a whole number from 0 to 18446744073709551615"),
        ("no sampler", "sampler_name is '4' and must be one of auto, heun"),
    ],
)
def test_what_only_the_run_can_refuse(inside: dict, name: str, words: str) -> None:
    found = inside["refusals"][name]
    assert (found["end"], found["type"]) == ("error", "ValueError")
    assert words in found["message"]
    assert "\n" not in found["message"].strip()
    assert found["loaded"] == 0  # refused before weights are moved


def test_a_picture_that_no_memory_holds_is_refused_in_words(inside: dict) -> None:
    """Not in the allocator's, and with a way out that the node's two lines show."""
    found = inside["refusals"]["endless"]
    assert (found["end"], found["loaded"]) == ("error", 0)
    assert found["message"].startswith("out of memory: close other programs, or make a smaller picture")
    assert found["type"].endswith("OutOfMemory")


def test_a_thousand_made_up_prompts_end_in_a_picture_or_in_words(inside: dict) -> None:
    found = inside["made_up"]
    assert found["found"] == []
    assert found["ends"]["success"] > 100
    assert found["ends"]["error"] > 50
    assert found["after"] == "success"


def test_no_mask_by_a_link_is_no_mask(inside: dict) -> None:
    assert inside["refusals"]["mask: nothing"]["end"] == "success"


@pytest.mark.parametrize("name", ["grey", "over", "linked"])
def test_what_is_odd_but_plain_is_taken_as_it_is_meant(inside: dict, name: str) -> None:
    found = inside["taken_as_they_are_meant"][name]
    assert found["ends"] == ["success", "success"]
    assert found["difference"] == 0
    noted = [line for line in found["reports"][0].splitlines() if "clipped to 0..1" in line]
    assert len(noted) == (name == "over")
    assert "clipped" not in found["reports"][1]

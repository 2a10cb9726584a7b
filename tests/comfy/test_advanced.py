"""Upscale (Advanced), its scheduler and the memory plan inside ComfyUI (cases_advanced.py), on every ComfyUI found."""

from __future__ import annotations

import re

import pytest
from coresamplers import ADDING, OTHERS, WORKING

pytestmark = pytest.mark.comfy

GIB = 2**30


@pytest.mark.parametrize("name", ["small", "batch"])
def test_advanced_with_defaults_equals_upscale(inside: dict, name: str) -> None:
    found = inside["advanced_equals"][name]
    assert found["ends"] == ["success", "success"]
    assert found["difference"] <= 1e-4  # two ways to write Heun's method: rounding, over 39 evaluations
    assert found["contrast"] > 0.1
    assert found["denoised"] <= 1e-6  # the last noise level is 0
    assert "20 steps of heun, noise 40 to 0.002" in found["report"]


@pytest.mark.parametrize(("name", "pictures"), [("small", 1), ("batch", 2)])
def test_advanced_has_a_bar_and_live_pictures(inside: dict, name: str, pictures: int) -> None:
    found = inside["advanced_equals"][name]
    assert found["bar"] == sorted(found["bar"])
    assert found["bar"][-1][0] == found["bar"][-1][1]
    assert found["pictures"] >= 20 * pictures


@pytest.mark.parametrize("name", [*WORKING, *ADDING, "dpmpp_2m_sde_gpu"])
def test_core_sampler_works(inside: dict, name: str) -> None:
    found = inside["core_samplers"]["samplers"][name]
    assert (found["end"], found["message"]) == ("success", "")
    assert found["finite"]
    assert found["shape"] == [1, 48, 40, 3]
    assert found["difference"] < inside["core_samplers"]["bicubic"]  # all of them solve the same equation
    assert found["bar"][0] == found["bar"][1]
    assert f"8 steps of {name}, " in found["report"]


def test_options_of_a_sampler_are_passed_on(inside: dict) -> None:
    found = inside["options"]
    assert found["order 1"] <= 1e-5
    assert found["order 4"] > 1e-3


@pytest.mark.parametrize("name", OTHERS)
def test_sampler_that_needs_more_is_refused_by_name(inside: dict, name: str) -> None:
    found = inside["refused_samplers"][name]
    assert (found["end"], found["type"]) == ("error", "ValueError")
    assert f"sampler {name.replace('uni_pc', 'unipc')} " in found["message"]
    assert "choose one of " + ", ".join(WORKING) in found["message"]


def test_sampler_that_adds_noise_is_refused_where_there_is_none(inside: dict) -> None:
    found = inside["refused_samplers"]["without noise"]
    assert (found["end"], found["type"]) == ("error", "ValueError")
    assert "sampler euler_ancestral adds noise while it runs, and this model starts without any" in found["message"]
    assert "choose one of euler, " in found["message"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("noise none", "noise is None and must come from a node that gives NOISE"),
        ("sampler text", "sampler is '4' and must come from a node that gives SAMPLER"),
        ("sigmas none", "sigmas is None and must come from a node that gives SIGMAS"),
        ("sigmas text", "sigmas is '4' and must come from a node that gives SIGMAS"),
    ],
)
def test_what_no_node_of_core_gives_is_refused(inside: dict, name: str, words: str) -> None:
    found = inside["refused_samplers"][name]
    assert (found["end"], found["type"]) == ("error", "ValueError")
    assert words in found["message"]


@pytest.mark.parametrize("name", [*WORKING, *ADDING])
def test_sampler_samples_from_the_distribution(inside: dict, name: str) -> None:
    """A deviation of 0.5, up to the error of 60 steps; and noise of its own for each picture of a batch."""
    deviation, apart = inside["gaussian"][name]
    assert deviation == pytest.approx(0.5, abs=0.03)
    assert (apart > 0.01) == (name in ADDING)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("as made for", ""),
        ("too much", "noise begins at 0.25, and this model was made for 0.1: the picture is lost under it"),
        ("too little", "noise begins at 0.04, and this model was made for 0.1: little is invented"),
        ("none", "is given none, which leaves a pattern: use RandomNoise"),
        ("bundled", ""),
        ("bundled, some", "starts without noise, and what is given stays in the picture: use DisableNoise"),
    ],
)
def test_noise_that_does_not_fit_is_said(inside: dict, name: str, words: str) -> None:
    notes = [line for line in inside["noise_notes"][name] if line.startswith("note: ")]
    assert len(notes) == bool(words)
    assert words in "".join(notes)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("as made for", "1 step of euler, noise 0.1, seed 7"),
        ("none", "1 step of euler; is given no noise"),
        ("bundled", "1 step of euler; starts without noise: the seed changes nothing"),
        ("bundled, some", "1 step of euler, noise 0.03, seed 7"),
    ],
)
def test_noise_is_said_where_there_is_any(inside: dict, name: str, words: str) -> None:
    report = inside["noise_notes"][name]
    assert report[1] == f"sampling: {words}"
    assert report[-1].startswith("receipt: {")


@pytest.mark.parametrize("name", [*WORKING, *ADDING])
def test_memory_of_a_core_sampler_is_foretold(inside: dict, name: str) -> None:
    """In pictures: never less than is counted, and of all samplers the same beside euler's."""
    found = inside["core_memory"]
    assert 0 <= found[f"{name} between"] < 0.6
    assert found[f"{name} during"] == pytest.approx(found["euler during"], abs=0.02)
    assert found["euler during"] > 0


def karras(steps: int, high: float, low: float, rho: float) -> list[float]:
    """Karras et al. 2022, equation 5, and 0."""
    ends = high ** (1 / rho), low ** (1 / rho)
    return [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** rho for i in range(steps)] + [0.0]


def test_scheduler(inside: dict) -> None:
    found = inside["levels"]
    assert found["default"] == pytest.approx(karras(20, 40, 0.002, 7), rel=1e-5)
    assert found["rho"] == pytest.approx(karras(4, 40, 0.002, 3), rel=1e-5)
    half = ((40 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert found["half"] == pytest.approx(karras(4, half, 0.002, 7), rel=1e-5)
    assert found["none"] == [0]
    assert found["published"] == found["default"]
    assert found["of the model"] == pytest.approx([0.1, 0])
    assert found["three of the model's"] == pytest.approx(karras(3, 0.1, 0.01, 7), rel=1e-5)
    assert found["of the bundled model"] == pytest.approx([0.03, 0]), "it gains nothing from more than one step"
    assert "sigma_min 1 must be above 0 and at most sigma_max 0.01" in found["crossed"]


def test_denoised_is_the_picture_without_the_noise_that_is_left(inside: dict) -> None:
    found = inside["denoised"]
    assert found["end"] == "success"
    assert found["shape"] == [2, 36, 48, 3]
    assert found["denoised"] < 1e-5, "what the network said in the last step that was taken"
    assert found["noise left"] > 0.001
    assert found["apart"] > 0.1  # a picture each, in their order


def test_no_step_gives_the_plain_enlargement_twice(inside: dict) -> None:
    found = inside["denoised"]["no step"]
    assert found["end"] == "success"
    assert found["shapes"] == [[1, 40, 36, 4], [1, 40, 36, 3]]
    assert found["difference"] == 0


def test_levels_that_rise_are_refused(inside: dict) -> None:
    assert "must be a list of falling noise levels" in inside["denoised"]["rising"]


@pytest.mark.parametrize(
    ("mask", "outcome"),
    [
        ("unseen", [1, 40, 36, 4]),
        ("opaque", [1, 40, 36, 3]),  # 64×64 zeros, as Load Image has them for what is not transparent
        ("two unseen", "transparency is a batch of 2 and image one of 1: it must be as many, or one"),
        ("nan", "transparency holds values that are not finite"),
    ],
)
def test_transparency_by_a_mask(inside: dict, mask: str, outcome: list[int] | str) -> None:
    """The same as with a fourth channel; nothing at all where all is opaque."""
    found = inside["transparencies"]
    for node in ("upscale", "advanced"):
        told = found[f"{node} {mask}"]
        assert told == outcome if isinstance(outcome, list) else outcome in told
    if isinstance(outcome, list):
        assert found[f"{mask}, difference"] <= 1e-6


# ---- the memory plan


@pytest.mark.parametrize("name", ["size", "pictures", "budget", "too little", "too large"])
def test_plan_is_told_and_drawn(inside: dict, name: str) -> None:
    found = inside["plans"][name]
    assert (found["end"], found["message"]) == ("success", "")
    assert ("does not fit" in found["report"]) == name.startswith("too")
    assert found["shape"][0] == 1
    assert found["shape"][2:] == [1024, 3]
    assert 0 <= found["least"] < found["most"] <= 1
    assert [image["type"] for image in found["shown"][0]["images"]] == ["temp"]  # on the node itself


def test_plan_shows_what_fills_the_memory(inside: dict) -> None:
    colours = {tuple(colour) for colour in inside["plans"]["size"]["colours"]}
    weights, ring, hidden = (86, 180, 233), (230, 159, 0), (0, 158, 115)
    pictures, workspace, red = (204, 121, 167), (240, 228, 66), (255, 122, 107)
    assert {weights, ring, hidden, pictures, workspace} <= colours
    assert red not in colours
    assert red in {tuple(colour) for colour in inside["plans"]["too little"]["colours"]}


def test_plan_of_pictures_is_that_of_the_run(inside: dict) -> None:
    planned, ran = inside["plans"]["pictures"]["report"], inside["plans"]["as it ran"]
    (takes,) = re.findall(r"main memory: ([\d.]+ MiB) of ", planned)
    assert f"peak: {takes} predicted" in ran
    assert re.match(r"64×48 to 256×192, 2 pictures in about [\d.]+ s \(1 step of euler\)\nmodel: ", planned)
    assert ran.startswith("64×48 to 256×192, 2 pictures in ")
    for text in planned, ran:
        assert text.count(takes) == 1  # nothing is said twice


def test_plan_names_the_least_and_the_limit(inside: dict) -> None:
    assert "of the budget of 30.7 MiB" in inside["plans"]["budget"]["report"]
    refused = inside["plans"]["too little"]["report"]
    assert re.search(r"memory 0.01 GiB is too little: type [\d.]+ at least for 256×192", refused)
    assert "is all that can be had here now" in inside["plans"]["too large"]["report"]


def test_plan_of_a_size_that_cannot_be(inside: dict) -> None:
    found = inside["plans"]["smaller"]
    assert found["end"] == "error"
    assert "longest_side 63 is too small: type 64 at least, for the picture has 64×48 already" in found["message"]


def test_plan_for_a_card_tells_of_both_memories(inside: dict) -> None:
    found = inside["plans_of_a_card"]
    assert [found[name]["fits"] for name in ("automatic", "little", "too little", "host too small")] == [
        True,
        True,
        False,
        False,
    ]
    for case in found.values():
        assert [words.partition(":")[0] for words in case["words"]] == ["graphics card", "main memory"]
    assert found["little"]["totals"][0] <= GIB // 2 == found["little"]["limits"][0]
    assert found["too little"]["totals"][0] > found["too little"]["limits"][0]
    assert found["host too small"]["totals"][1] > found["host too small"]["limits"][1] == 2 * GIB
    assert "of host memory" in found["host too small"]["verdict"]
    for name in ("both too small", "nothing free"):  # red, with the least that would work, and not an error
        assert not found[name]["fits"]
        assert found[name]["verdict"].startswith("does not fit: ")
        assert found[name]["totals"][0] > 0
    assert any(line.startswith("least possible: ") for line in found["automatic"]["alternatives"])

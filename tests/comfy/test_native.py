"""Inf-DiT to Model inside ComfyUI (cases_native.py), on every ComfyUI found."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.comfy

SAME = 1e-4  # a fortieth of a grey level


@pytest.mark.parametrize(
    ("picture", "shape"), [("small", [1, 48, 40, 3]), ("batch", [2, 36, 48, 3]), ("alpha", [1, 40, 36, 4])]
)
def test_core_samplers_make_the_picture_of_upscale_advanced(inside: dict, picture: str, shape: list[int]) -> None:
    """Of the same noise and noise levels; sizes that are no whole blocks, two pictures, transparency, any cfg."""
    found = inside["native_equals"][picture]
    assert (found["ends"], found["message"]) == (["success", "success"], "")
    assert found["shape"] == shape
    assert max(found["custom"], found["ksampler"]) < SAME
    assert found["bar"][0] == found["bar"][1]


@pytest.mark.parametrize("name", ["whole", "two fifths", "defaults", "in two"])
def test_bundled_model_makes_its_picture(inside: dict, name: str) -> None:
    """By KSampler as it comes, too, of whose noise it takes none and of whose steps one."""
    found = inside["native_bundled"]
    assert found[name]["message"] == ""
    assert found[name]["apart"] < SAME
    assert found["evaluations"] == 1


def test_default_dtype_that_another_pack_left_behind_does_not_matter(inside: dict) -> None:
    for dtype, found in inside["native_defaults"].items():
        assert found == {"message": "", "apart": 0}, dtype


@pytest.mark.parametrize("name", ["uni_pc", "lcm", "dpm_adaptive", "euler_cfg_pp", "euler_ancestral", "dpmpp_2m_sde"])
def test_samplers_that_need_more_than_a_denoiser_work(inside: dict, name: str) -> None:
    found = inside["native_samplers"][name]
    assert (found["message"], found["finite"], found["shape"]) == ("", True, [1, 48, 40, 3])


def test_guidance_between_what_is_the_same_costs_nothing(inside: dict) -> None:
    assert inside["native_samplers"]["evaluations"] == 6


def test_empty_latent_stands_for_the_picture(inside: dict) -> None:
    assert inside["native_samplers"]["empty"] == 0


def test_model_is_told_what_clip_says(inside: dict) -> None:
    found = inside["native_prompt"]
    assert found["message"] == ""
    assert found["apart"] < SAME
    assert found["evaluations of two"] == 2 * found["evaluations of one"]
    assert found["finite"]
    assert found["guided"] > SAME


def test_run_survives_a_full_memory_and_stops_when_told(inside: dict) -> None:
    found = inside["native_runs"]
    assert found["full"] == {"message": "", "apart": 0}
    assert found["stop"] == "interrupted"


def test_weights_are_not_counted_twice(inside: dict) -> None:
    """What core knows of this MODEL are its noise levels."""
    assert inside["native_runs"]["bytes"] < 10_000


def test_lazy_cache_saves_evaluations_and_easy_cache_is_refused(inside: dict) -> None:
    """EasyCache works inside a network, where it would silently do nothing."""
    found = inside["native_around"]
    assert found["plain"] == 20
    assert found["never"] == {"message": "", "evaluations": 20, "apart": 0}
    assert found["lazy"]["message"] == ""
    assert found["lazy"]["evaluations"] < 20
    assert 0 < found["lazy"]["apart"] < 0.2, "the same picture, roughly"
    words = "EasyCache, or what else works inside a network (LazyCache works around it) cannot change an Inf-DiT model"
    assert words in found["easy"]["message"]
    assert found["easy"]["evaluations"] == 0


def test_select_model_device_changes_no_picture(inside: dict) -> None:
    """The loader says what computes; a card that is not there is passed over."""
    found = inside["native_around"]
    if "default" not in found:
        pytest.skip("this version has no Select Model Device")
    for name in ("default", "cpu", "gpu"):
        assert found[name] == {"message": "", "evaluations": 20, "apart": 0}, name


@pytest.mark.parametrize(
    ("name", "node", "words"),
    [
        ("lora", "lora", "LoRA cannot change an Inf-DiT model: leave it out"),
        ("control", "sampler", "ControlNet cannot change an Inf-DiT model: leave it out"),
        ("text", "sampler", "this conditioning is none of Inf-DiT's: connect positive and negative of Inf-DiT to"),
        ("latent", "sampler", "must be (1, 3, 64, 64): connect the one that Inf-DiT to Model gives"),
        ("vae", "decode", "must be (1, 3, 64, 64): connect the one that Inf-DiT to Model gives"),
        ("passes", "native", "a KSampler enlarges by 4 at most, and this takes 2 passes, by way of 40×48"),
        ("budget", "native", "memory 0.001 GiB is too little: type 0.0"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence_on_the_node_that_fails(
    inside: dict, name: str, node: str, words: str
) -> None:
    """Also where that is one of core's: the page hides what an error says."""
    found = inside["native_refusals"][name]
    assert words in found["message"]
    (text,) = (text for text, where in found["told"] if where == node and text.strip())
    assert text in found["message"]
    assert words in text
    assert "\n" not in text

"""python -m infdit upscale --clip --positive --negative --strength, as a person types it."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from clipmath import (
    SMALL,
    SMALL_TEXT,
    Weights,
    needs_open_clip,
    preprocess_by_hand,
    save,
    text_by_hand,
    text_weights,
    tower_by_hand,
    tower_weights,
    unit,
)
from PIL import Image
from shell import PUBLISHED, make_picture, one_line, run

from infdit.cli import recipe
from infdit.cli import upscale as shell
from infdit.clip import load_clip

MODEL = ("--model", PUBLISHED, "--steps", 1, "--dtype", "fp32", "--scale", 2)
VISION, TEXT = replace(SMALL, output_dim=32), replace(SMALL_TEXT, output_dim=32)  # as wide as that model's input
CLEAR, NOISY = [3143], [33495]  # tokens of "clear" and "noisy"


class Encoder:
    """In place of CLIP: a picture is (1, 0, …), "towards" (0, 1, 0, …), any other text (0, 0, 1, 0, …)."""

    made: list[weakref.ref[Encoder]]
    read: list[tuple[str, ...]]

    def __init__(self, path: Path, **_: object) -> None:
        self.made.append(weakref.ref(self))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return torch.eye(32)[:1]

    def text(self, texts: list[str]) -> torch.Tensor:
        self.read.append(tuple(texts))
        return torch.stack([torch.eye(32)[1 if text == "towards" else 2] for text in texts])


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> type[Encoder]:
    Encoder.made, Encoder.read = [], []
    monkeypatch.setattr(recipe, "load_clip", Encoder)
    return Encoder


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor | None]:
    """What upscale() is given, call by call."""
    given: list[torch.Tensor | None] = []
    upscale = shell.upscale

    def spy(*arguments: object, **options: object) -> torch.Tensor:
        given.append(options["clip_embedding"])
        assert all(made() is None for made in Encoder.made), "CLIP is still there while the picture is upscaled"
        return upscale(*arguments, **options)

    Encoder.made = []
    monkeypatch.setattr(shell, "upscale", spy)
    return given


def test_the_texts_lead_every_picture_and_are_read_once(
    tmp_path: Path, encoder: type[Encoder], vectors: list[torch.Tensor | None]
) -> None:
    sources = [make_picture(tmp_path / f"{name}.png") for name in "abc"]
    options = ("--clip", "x", "--positive", "towards", "--negative", "away", "--strength", 3)
    assert run("upscale", *sources, "-o", tmp_path / "out", *MODEL, *options) == 0
    expected = torch.zeros(1, 32)
    expected[0, :3] = torch.tensor([1.0, 3.0, -3.0]) / 19**0.5
    assert len(vectors) == 3
    for vector in vectors:
        torch.testing.assert_close(vector, expected)
    assert encoder.read == [("towards", "away")]
    assert len(encoder.made) == 1


@pytest.mark.parametrize(
    ("options", "expected", "read"),
    [
        ((), [1.0, 0.0, 0.0], []),
        (("--strength", 5), [1.0, 0.0, 0.0], []),
        (("--positive", "", "--negative", " "), [1.0, 0.0, 0.0], []),
        (("--positive", "towards", "--strength", 0), [1.0, 0.0, 0.0], []),
        (("--positive", "towards"), [1 / 3, 2 / 3, -2 / 3], [("towards", "")]),  # 2 unless it is said
        (("--negative", "towards"), [1 / 3, -2 / 3, 2 / 3], [("", "towards")]),
    ],
)
def test_defaults(
    tmp_path: Path,
    encoder: type[Encoder],
    vectors: list[torch.Tensor | None],
    options: tuple[object, ...],
    expected: list[float],
    read: list[tuple[str, ...]],
) -> None:
    source = make_picture(tmp_path / "in.png")
    assert run("upscale", source, "-o", tmp_path / "out.png", *MODEL, "--clip", "x", *options) == 0
    (vector,) = vectors
    assert vector is not None
    torch.testing.assert_close(vector[0, :3], torch.tensor(expected))
    assert encoder.read == read


def test_a_broken_picture_among_others_is_told_and_the_others_are_led(
    tmp_path: Path, encoder: type[Encoder], vectors: list[torch.Tensor | None], capsys: pytest.CaptureFixture[str]
) -> None:
    make_picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"none")
    make_picture(tmp_path / "c.png")
    assert run("upscale", tmp_path, "-o", tmp_path / "out", *MODEL, "--clip", "x") == 1
    assert "b.png" in capsys.readouterr().err
    assert [vector is not None for vector in vectors] == [True, True]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_texts_without_a_clip_model_are_refused_with_the_file_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = make_picture(tmp_path / "in.png"), tmp_path / "out.png"
    for text in ("--positive", "--negative"):
        assert run("upscale", source, "-o", target, *MODEL, text, "clear") == 2
        message = one_line(capsys)
        assert "give --clip FILE, open_clip_pytorch_model.bin of laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K" in message
    assert not target.exists()


@pytest.mark.parametrize("strength", ["-1", "11", "nan", "much"])
def test_strengths_that_are_none_are_refused(
    tmp_path: Path, encoder: type[Encoder], capsys: pytest.CaptureFixture[str], strength: str
) -> None:
    source, target = make_picture(tmp_path / "in.png"), tmp_path / "out.png"
    options = ("--clip", "x", "--positive", "towards", "--strength", strength)
    assert run("upscale", source, "-o", target, *MODEL, *options) == 2
    assert "strength" in one_line(capsys)
    assert not target.exists()


def test_a_model_that_does_not_listen_says_so(
    tmp_path: Path, encoder: type[Encoder], vectors: list[torch.Tensor | None], caplog: pytest.LogCaptureFixture
) -> None:
    source = make_picture(tmp_path / "in.png")
    assert run("upscale", source, "-o", tmp_path / "out.png", "--steps", 1, "--positive", "towards") == 0
    assert [r.getMessage() for r in caplog.records] == [
        "this model has no CLIP input: --clip, --positive and --negative are ignored"
    ]
    assert (vectors, encoder.made) == ([None], [])


# ---- with open_clip


def clip_file(tmp_path: Path, weights: Weights) -> Path:
    return save(tmp_path, {name: tensor.float() for name, tensor in weights.items()})


@needs_open_clip
def test_real_towers_from_a_file_to_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vectors: list[torch.Tensor | None]
) -> None:
    weights = tower_weights(VISION) | text_weights(TEXT)
    load = partial(load_clip, dtype=torch.float64, config=VISION, text_config=TEXT)
    monkeypatch.setattr(recipe, "load_clip", load)
    source, out = make_picture(tmp_path / "in.png", size=(40, 30)), tmp_path / "out.png"
    options = ("--positive", "clear", "--negative", "noisy", "--strength", "1.5")
    assert run("upscale", source, "-o", out, *MODEL, "--clip", clip_file(tmp_path, weights), *options) == 0
    (vector,) = vectors
    assert vector is not None
    with Image.open(source) as image:
        pixels = torch.from_numpy(np.array(image)).double()[None].movedim(-1, 1) / 127.5 - 1
    weights = {name: tensor.float().double() for name, tensor in weights.items()}
    picture = tower_by_hand(preprocess_by_hand(pixels, VISION.image_size), weights, config=VISION)
    towards, away = (text_by_hand(tokens, weights, config=TEXT) for tokens in (CLEAR, NOISY))
    torch.testing.assert_close(vector.double(), unit(picture + 1.5 * (towards - away)), rtol=0, atol=1e-5)
    assert out.exists()


@needs_open_clip
def test_texts_for_a_file_that_has_no_text_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "load_clip", partial(load_clip, config=VISION, text_config=TEXT))
    source, out = make_picture(tmp_path / "in.png"), tmp_path / "out.png"
    path = clip_file(tmp_path, tower_weights(VISION))
    assert run("upscale", source, "-o", out, *MODEL, "--clip", path, "--positive", "clear") == 2
    assert "holds only the half of CLIP that sees pictures" in one_line(capsys)
    assert not out.exists()
    assert run("upscale", source, "-o", out, *MODEL, "--clip", path) == 0

"""What made a picture, from which it is made again; a folder goes on with what is missing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from filebytes import damaged
from PIL import Image
from shell import make_picture, one_line, pixels_of, run

import infdit
from infdit.picture import Picture, read_note, read_picture, write_picture
from infdit.receipt import ReceiptError, parse_receipt, version

FAST = ("--device", "cpu", "--dtype", "fp32")


@pytest.fixture
def noisy(noisy_file: Path) -> tuple[object, ...]:
    return "--model", noisy_file, *FAST


@pytest.fixture
def receipt(tmp_path: Path, noisy: tuple) -> dict:
    """Of in.png → out.png, with settings that are nobody's default; also in receipt.json."""
    source = make_picture(tmp_path / "in.png", (8, 6))
    options = ("--scale", 3, "--steps", 3, "--sampler", "heun", "--seed", 5, "--denoise", 0.9, "--budget", "64MiB")
    written = tmp_path / "receipt.json"
    assert run("upscale", source, "-o", tmp_path / "out.png", *noisy, *options, "--receipt", written) == 0
    return json.loads(written.read_text())


def test_a_receipt_says_what_was_done(tmp_path: Path, receipt: dict, noisy_file: Path) -> None:
    assert json.loads(read_note(tmp_path / "out.png")) == receipt
    with Image.open(tmp_path / "out.png") as image:  # as any program reads it
        assert json.loads(image.text["inf-dit"]) == receipt
    assert receipt["version"] == version() == "0.1.0"
    assert receipt["model"]["name"] == "noisy.safetensors"
    assert receipt["picture"]["size"] == [6, 8]
    settings = receipt["settings"]
    assert [settings[name] for name in ("size", "sampler", "seed", "dtype")] == [[18, 24], "heun", 5, "float32"]
    assert len(settings["sigmas"]) == 4
    assert receipt["evaluations"] == 5
    assert 0 < receipt["seconds"] < 100
    assert 0 < receipt["bytes"]["foretold"] <= 64 * 2**20
    assert 0 < receipt["bytes"]["measured"] < 2**30
    assert receipt["bits"] == 8
    assert (receipt["replanned"], receipt["resumed"]) == ([], [])
    assert receipt["faithful"][0].keys() == {"dB", "deltaE2000"}
    assert 0 < receipt["seams"][0]["patch"] < 10
    assert receipt["seams"][0]["block"] is None, "one block has no lines"
    assert str(tmp_path) not in json.dumps(receipt), "it names no path"


@pytest.mark.parametrize("name", ["receipt.json", "out.png"])
def test_the_same_pixels_from_a_receipt(tmp_path: Path, receipt: dict, noisy: tuple, name: str) -> None:
    again = tmp_path / "again.png"
    assert run("upscale", tmp_path / "in.png", "-o", again, *noisy[:4], "--from-receipt", tmp_path / name) == 0
    assert pixels_of(again) == pixels_of(tmp_path / "out.png")
    said = json.loads(read_note(again))
    differ = {key for key in receipt if receipt[key] != said[key]}
    assert differ <= {"seconds", "bytes", "sha256"}


def test_strengths_of_passes_are_foretold_told_and_made_again(
    tmp_path: Path, noisy: tuple, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, again = make_picture(tmp_path / "in.png", (8, 6)), tmp_path / "out.png", tmp_path / "again.png"
    strengths = ("--scale", 8, "--denoise", "1,0.25")
    assert run("upscale", source, "-o", out, *noisy, *strengths) == 0
    assert re.search(r"; denoise 1, 0\.25 of its passes, about \d+ \w+ foretold; peak", capsys.readouterr().out)
    model = infdit.load_model(noisy[1], torch.float32, "cpu")
    made = infdit.upscale(model, read_picture(source).pixels[None], 8, denoise=[1, 0.25])[0]
    assert np.array_equal((made * 255 + 0.5).byte().numpy(), np.asarray(Image.open(out)))
    assert len(json.loads(read_note(out))["settings"]["sigmas"]) == 2
    assert run("upscale", source, "-o", again, *noisy[:4], "--from-receipt", out) == 0
    assert pixels_of(again) == pixels_of(out)
    capsys.readouterr()
    assert run("upscale", source, "-o", tmp_path / "four.png", *noisy, "--denoise", "1,0.25") != 0
    assert "denoise has 2 values, and this size takes 1 pass: give one, or one a pass" in one_line(capsys)
    assert run("plan", "8192x8192", "--scale", 16, "--device", "cuda", "--denoise", "1,0") == 0
    told = capsys.readouterr().out
    assert "39 + 0 evaluations (heun)\ndenoise 1, 0 of its passes\n" in told
    assert run("plan", "2048x2048", "--device", "cuda") == 0
    times = [re.findall(r"80 GiB .* (\d+ \w+)   ", text) for text in (told, capsys.readouterr().out)]
    assert times[0] == times[1] != [], "as long as the first pass alone"


def test_with_another_picture_and_options(
    tmp_path: Path, receipt: dict, noisy: tuple, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    taken = ("--from-receipt", tmp_path / "receipt.json")
    out = tmp_path / "again.png"
    assert run("upscale", tmp_path / "in.png", "-o", out, *taken) == 2
    assert "it is of the model noisy.safetensors (" in one_line(capsys)
    assert run("upscale", tmp_path / "in.png", "-o", out, *noisy[:4], *taken, "--seed", 6) == 2
    assert "--from-receipt says itself what --seed would" in one_line(capsys)
    assert not out.exists()
    other = make_picture(tmp_path / "other.png", (9, 6))
    assert run("upscale", other, "-o", out, *noisy[:4], *taken) == 0
    assert "another picture than the receipt's" in caplog.text
    capsys.readouterr()
    larger = make_picture(tmp_path / "larger.png", (90, 60))
    assert run("upscale", larger, "-o", tmp_path / "no.png", *noisy[:4], *taken) == 2
    assert "height 18 must be between" in one_line(capsys)


def changed(receipt: dict, *path: str, to: object) -> str:
    copy = json.loads(json.dumps(receipt))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return stamped(copy)


def stamped(receipt: dict) -> str:
    """As somebody writes it who knows how."""
    body = json.dumps({name: value for name, value in receipt.items() if name != "sha256"}, sort_keys=True)
    return json.dumps(receipt | {"sha256": hashlib.sha256(body.encode()).hexdigest()})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("out.png", ("--bits", 16, "--fidelity", 0.5, "--colour-match")),
        ("out.png", ("--scale", 6)),
        ("out.tif", ("--bits", 32, "--scale", 1)),
    ],
)
def test_the_same_from_a_receipt_in_depth_and_all(
    tmp_path: Path, noisy: tuple, name: str, options: tuple[object, ...]
) -> None:
    source, receipt = tmp_path / "in.png", tmp_path / "receipt.json"
    Image.effect_noise((9, 7), 99).convert("RGBA").save(source)
    out, again = tmp_path / name, tmp_path / f"again{name[3:]}"
    asked = ("--steps", 2, "--seed", 7, *options, "--receipt", receipt)
    assert run("upscale", source, "-o", out, *noisy, *asked) == 0
    assert run("upscale", source, "-o", again, *noisy[:4], "--from-receipt", receipt) == 0
    first, second = (read_picture(path) for path in (out, again))
    assert first.bits == second.bits == (options[1] if options[0] == "--bits" else 8)
    assert np.array_equal(first.pixels, second.pixels)


SENSELESS = [
    (("receipt",), [2, None, "1", [1], {}]),
    (("model",), [None, [], "x", {"name": 1, "sha256": "x"}]),
    (("settings",), [None, [], 1, {}]),
    (("settings", "size"), [None, [1], [0, 5], [1.5, 2], ["1", "2"], [10**30, 1], [True, True]]),
    (("settings", "sigmas"), [None, [], [1, 2], ["1"], [float("nan"), 0], [1e999, 0], [1, -1], [*range(20000, 0, -1)]]),
    (("settings", "sigmas"), [[[1, 0], []], [[1, 2]], [[1, 0], 1]]),
    (("settings", "seed"), [-1, 2**64, 1.5, "5", True]),
    (("settings", "sampler"), [None, "ddim", [], {}]),
    (("settings", "noise"), ["given"]),
    (("settings", "dtype"), [None, "int8", "nn", [], "float"]),
    (("settings", "clip"), [1, []]),
    (("plan",), [None, [], {}]),
    (("plan", "group"), [0, -1, "1", None, 1.5]),
    (("plan", "weights"), ["elsewhere", None, []]),
    (("plan", "pinned"), [2, None]),
    (("text",), [[1], "x", {"positive": 1}, {"strength": "x"}, {"strength": float("inf")}]),
    (("device",), [None, 1]),
]


def test_made_up_receipts_are_refused_in_words(receipt: dict) -> None:
    parse_receipt(json.dumps(receipt))
    for path, values in SENSELESS:
        for value in values:
            with pytest.raises(ReceiptError) as error:
                parse_receipt(changed(receipt, *path, to=value))
            assert str(error.value).isprintable(), (path, value)
    with pytest.raises(ReceiptError, match="changed since"):
        parse_receipt(json.dumps(receipt | {"seconds": 0}))
    for text in ("", "null", "[]", "{}", "1", "[" * 10**5, '{"receipt": 1}', "\0" * 9, json.dumps([receipt, receipt])):
        with pytest.raises(ReceiptError):
            parse_receipt(text)


def test_damaged_receipts_are_refused_in_words(
    tmp_path: Path, receipt: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, refused = random.Random(0), 0
    for name in ("receipt.json", "out.png"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(300):
            (tmp_path / "bad").write_bytes(damaged(whole, rng))
            try:
                found = infdit.cli.jobs.read_receipt(tmp_path / "bad")
            except ReceiptError as error:
                refused += 1
                assert str(error).startswith(f"{tmp_path / 'bad'}: ")
                assert str(error).isprintable()
            else:  # what was changed says nothing, or is beside it in the picture
                assert found == parse_receipt(json.dumps(receipt))
    assert refused > 250
    capsys.readouterr()
    for name, word in ((".", "no such file"), ("in.png", "no receipt"), ("no", "no such file")):
        path = tmp_path / name
        assert run("upscale", tmp_path / "in.png", "-o", tmp_path / "x.png", "--from-receipt", path) == 2
        assert word in one_line(capsys)
    assert not (tmp_path / "x.png").exists()


def test_nothing_is_written_where_a_receipt_says(tmp_path: Path, receipt: dict, noisy: tuple) -> None:
    """Paths in it go nowhere."""
    evil = changed(receipt, "model", to=receipt["model"] | {"name": "../../evil", "path": str(tmp_path / "evil")})
    evil = stamped(json.loads(evil) | {"output": str(tmp_path / "evil.png"), "target": "../evil.png"})
    (tmp_path / "evil.json").write_text(evil)
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "new"
    options = (*noisy[:4], "--from-receipt", tmp_path / "evil.json")
    assert run("upscale", tmp_path / "in.png", "-o", f"{out}/", *options) == 0
    assert set(tmp_path.rglob("*")) - before == {out, out / "in.png"}


def test_a_receipts_file_is_found_to_be_possible_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_picture(tmp_path / "in.png", (8, 6))
    (tmp_path / "old.json").write_text("precious")
    shutil.copy(source, tmp_path / "picture.json")
    for name, more, word in [
        ("old.json", (), "--force"),
        ("in.png", (source, "--force"), ".json"),
        ("picture.json", (tmp_path / "picture.json", "--force"), "exists"),
        ("no/such.json", (), "cannot be written"),
    ]:
        before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        assert run("upscale", source, *more[:1], "-o", tmp_path / "out/", "--receipt", tmp_path / name, *more[1:]) == 2
        assert word in one_line(capsys)
        assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_note_that_is_too_long_or_damaged_is_none(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "x.png"
    write_picture(path, Picture(torch.zeros(2, 2, 3), None, False, "said"))
    assert read_note(path) == "said"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"said", b"sayd"))
    assert read_note(path) == ""
    path.write_bytes(content[:45])
    assert read_note(path) == ""
    write_picture(tmp_path / "x.jpg", Picture(torch.zeros(2, 2, 3), None, False, "said"))
    assert read_note(tmp_path / "x.jpg") == ""


# ---- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.jpg", "c.webp"):
        (tmp_path / "in").mkdir(exist_ok=True)
        make_picture(tmp_path / "in" / name, (8, 6))
    return tmp_path / "in"


def test_a_second_call_goes_on_with_what_is_missing(
    tmp_path: Path, folder: Path, noisy: tuple, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("upscale", folder, "-o", out, *noisy, "--scale", 2)
    assert run(*command) == 0
    assert "3 made, 0 there already, 0 left out, 0 failed" in capsys.readouterr().out
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "b.png").unlink()
    assert run(*command) == 0
    assert "1 made, 2 there already, 0 left out, 0 failed" in capsys.readouterr().out
    assert [path.name for path in sorted(out.iterdir()) if path.stat().st_mtime_ns != times[path.name]] == ["b.png"]
    # other settings, another picture, no receipt, damage: kept, and told
    make_picture(folder / "a.png", (8, 6), "RGBA")
    (out / "b.png").write_bytes((out / "b.png").read_bytes()[:-40])
    make_picture(out / "c.png", (16, 12))
    before = {path: path.read_bytes() for path in out.iterdir()}
    make_picture(folder / "d.png", (8, 6))
    assert run(*command) == 1
    said = capsys.readouterr()
    assert "1 made, 0 there already, 3 left out, 0 failed" in said.out
    for name, reason in {
        "a": "it has another picture",
        "b": "it is damaged: ",
        "c": "it says nothing of how it was made",
    }.items():
        (line,) = (line for line in said.err.splitlines() if f"{out / name}.png exists" in line)
        assert reason in line
        assert line.endswith(": --force replaces it")
    assert {path: path.read_bytes() for path in before} == before
    assert run(*command, "--seed", 1) == 1
    assert "(its seed is 0, not 1)" in capsys.readouterr().err
    assert run(*command, "--force") == 0
    assert "4 made" in capsys.readouterr().out


def test_folders_in_folders(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "deep" / "deeper").mkdir(parents=True)
    make_picture(folder / "deep" / "deeper" / "a.png", (8, 6))
    (folder / "empty").mkdir()
    (folder / ".hidden").mkdir()
    make_picture(folder / ".hidden" / "x.png", (8, 6))
    if os.name == "posix":
        (folder / "round").symlink_to(folder)
    out = folder / "out"
    for _ in range(2):  # the second call does not take its results for pictures
        assert run("upscale", folder, "-o", out, "--scale", 2, *FAST, "--recursive") == 0
        made = sorted(str(path.relative_to(out)) for path in out.rglob("*.*"))
        assert made == ["a.png", "b.png", "c.png", "deep/deeper/a.png"]
    assert "0 made, 4 there already" in capsys.readouterr().out
    assert f"{folder}: left out: 3 folders" in caplog.text


@pytest.mark.parametrize(
    ("option", "value", "size"),
    [("longest", 20, (20, 15)), ("shortest", 15, (20, 15)), ("megapixels", 300 / 2**20, (20, 15))],
)
def test_sizes_that_keep_the_shape(tmp_path: Path, option: str, value: float, size: tuple[int, int]) -> None:
    wide, high = make_picture(tmp_path / "wide.png", (8, 6)), make_picture(tmp_path / "high.png", (6, 8))
    assert run("upscale", wide, high, "-o", tmp_path / "out", f"--{option}", value, *FAST) == 0
    for name, expected in (("wide", size), ("high", size[::-1])):
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert image.size == expected


def test_sizes_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = make_picture(tmp_path / "in.png", (8, 6))
    sides, area = ("8 to 128", "6 to 96"), "4.6e-05 to 0.011718"  # 48 pixels and 256 times as many, of 1024×1024
    for option, value, limits in [
        ("longest", 200, sides[0]), ("longest", 0, sides[0]), ("shortest", 5, sides[1]),
        ("megapixels", -1, area), ("megapixels", "nan", area),
    ]:  # fmt: skip
        assert run("upscale", source, "-o", tmp_path / "out.png", f"--{option}", value) == 2
        assert f"--{option} {value} must be from {limits}: a picture of 8×6 grows by 1 to 16" in one_line(capsys)
    assert run("upscale", source, "-o", tmp_path / "out.png", "--longest", 20, "--scale", 2) == 2
    capsys.readouterr()
    assert not (tmp_path / "out.png").exists()
    assert run("upscale", source, "-o", tmp_path / "a.png", "--size", "16x12", *FAST) == 0
    assert "stretched" not in caplog.text
    assert run("upscale", source, "-o", tmp_path / "b.png", "--size", "16x20", *FAST) == 0
    assert "8×6 is stretched to 16×20: --longest" in caplog.text
    with Image.open(tmp_path / "b.png") as image:
        assert np.asarray(image).shape == (20, 16, 3)

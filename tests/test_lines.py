"""Scores of drawn lines, on drawings whose stairs and beads are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

import infdit
from benchmarks import lines
from benchmarks.__main__ import main


def stepped(angle: float, step: int) -> np.ndarray:
    """An edge that goes on straight down for `step` rows, then jumps: stairs."""
    d = lines.distance(angle)
    rows = (np.arange(len(d)) // (step * lines.FINE) + 0.5) * step * lines.FINE
    held = d + ((rows - np.arange(len(d)) - 0.5) / lines.FINE)[:, None] * math.sin(angle)
    return lines.drawn(held < 0)


@pytest.mark.parametrize("degrees", [0, 9, 27, 45])
def test_stairs_are_how_far_an_edge_is_from_its_course(degrees: float) -> None:
    angle = math.radians(degrees)
    assert lines.edge_stairs(lines.drawn(lines.distance(angle) < 0), angle) < 0.12, "antialiased: nearly none"
    # within a step the rows are off by up to half of it, evenly: a deviation of 4/√12 rows, less along the normal
    expected = 4 / math.sqrt(12) * math.sin(angle)
    assert lines.edge_stairs(stepped(angle, 4), angle) == pytest.approx(expected, abs=0.12)


def test_stairs_of_a_circle() -> None:
    assert lines.circle_stairs(lines.drawn(lines.radius() < lines.RADIUS)) < 0.12
    coarse = np.asarray(
        Image.fromarray(lines.drawn(lines.radius() < lines.RADIUS)).resize((32, 32), Image.Resampling.BOX)
    )
    assert lines.circle_stairs(coarse.repeat(4, 0).repeat(4, 1)) > 0.5


def test_beads_are_the_ink_that_comes_and_goes() -> None:
    line = lines.drawn(np.abs(lines.distance(0.3)) < lines.LINE_WIDTH / 2)
    assert lines.line_beads(line) < 0.01
    beaded = line.astype(np.float64)
    wave = 1 + 0.2 * np.sin(2 * np.pi * np.arange(lines.SIDE) / 4)[:, None, None]
    beaded = lines.PAPER - (lines.PAPER - beaded) * wave
    assert lines.line_beads(np.rint(beaded).astype(np.uint8)) == pytest.approx(0.2 / math.sqrt(2), rel=0.05)


def test_nearest_neighbours_are_worse_than_bicubic() -> None:
    bicubic, nearest = lines.measure(lines.bicubic), lines.measure(lambda low: low.repeat(4, 0).repeat(4, 1))
    assert bicubic["stairs"] < 0.2 < 0.5 < nearest["stairs"]
    assert bicubic["circle"] < 0.2 < nearest["circle"]


def test_the_bundled_model_draws_in_one_stroke() -> None:
    """Straighter than bicubic by far, with lines of even weight; the models before this one had 0.10 px and 3.1 %."""
    found = lines.measure(lines.by_model(infdit.load_model("mini", device="cpu")))
    bicubic = lines.measure(lines.bicubic)
    assert found["stairs"] < 0.6 * bicubic["stairs"]
    assert found["circle"] < 0.6 * bicubic["circle"]
    assert found["beads"] < 0.02


def test_bench_prints_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "ANGLES", lines.ANGLES[:1])
    assert main(["--lines"]) == 0
    out = capsys.readouterr().out
    assert "stairs px" in out
    assert out.index("bicubic") < out.index("model  ")

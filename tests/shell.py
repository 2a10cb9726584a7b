"""The shell called within this process, and pictures for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import DATA
from PIL import Image

from infdit.__main__ import main

PUBLISHED = DATA / "tiny.mp_rank_00_model_states.pt"


def make_picture(path: Path, size: tuple[int, int] = (12, 9), mode: str = "RGB", **options: object) -> Path:
    rng = np.random.default_rng(0)
    channels = len(mode)
    pixels = rng.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(), mode).save(path, **options)
    return path


def pixels_of(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def run(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        return exit_.code


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr, which must be one line (the bar apart, which overwrites itself)."""
    captured = capsys.readouterr().err.split("\r")[-1].strip("\n")
    assert captured
    assert "\n" not in captured, captured
    assert "Traceback" not in captured
    return captured

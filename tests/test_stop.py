"""A stop at any moment of a large run without a card: 2000×1143, four times as large, the bundled model."""

from __future__ import annotations

import itertools
import random
import time

import pytest
import torch

import infdit

pytestmark = pytest.mark.slow
MOST = 1.5  # seconds until a stop is obeyed
PRESSES, FIRST = 20, 40  # within so many seconds, in which are preparing, the first blocks and live pictures
IMAGE = torch.rand(1, 1143, 2000, 3, generator=torch.Generator().manual_seed(0))


class StopError(Exception):
    pass


@pytest.fixture(scope="module")
def mini() -> infdit.InfDiT:
    return infdit.load_model("mini", device="cpu")


def test_twenty_stops_at_random_moments(mini: infdit.InfDiT) -> None:
    waited = []
    for moment in sorted(random.Random(0).uniform(0, FIRST) for _ in range(PRESSES)):
        pressed = time.monotonic() + moment

        def look(*_: object, pressed: float = pressed) -> None:
            if time.monotonic() >= pressed:
                raise StopError

        with pytest.raises(StopError):
            infdit.upscale(mini, IMAGE, scale=4, progress=look)
        waited.append(time.monotonic() - pressed)
    assert max(waited) < MOST, waited


def test_no_moment_of_a_whole_run_waits_longer(mini: infdit.InfDiT) -> None:
    """A stop is obeyed at the next look: between two looks, and after the last, is never more time than that."""
    looks = [time.monotonic()]
    infdit.upscale(mini, IMAGE, scale=4, progress=lambda *_: looks.append(time.monotonic()))
    looks.append(time.monotonic())
    gaps = [after - before for before, after in itertools.pairwise(looks)]
    assert max(gaps) < MOST, f"{max(gaps):.1f} s, {gaps.index(max(gaps))} of {len(gaps)}"

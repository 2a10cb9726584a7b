"""A stop at any moment of a large run without a card: 2000×1143, four times as large, the bundled model."""

from __future__ import annotations

import random
import time

import pytest
import torch

import infdit

pytestmark = pytest.mark.slow
MOST = 1.5  # seconds until a stop is obeyed
PRESSES, FIRST = 20, 20  # within so many seconds, in which are preparing, the first blocks and live pictures
IMAGE = torch.rand(1, 1143, 2000, 3, generator=torch.Generator().manual_seed(0))


class StopError(Exception):
    pass


def clocks() -> tuple[float, float]:
    """Of the wall and of this process, which has less time where others compute too."""
    return time.monotonic(), time.process_time()


def since(then: tuple[float, float]) -> float:
    """Seconds that it took, without those that others had."""
    return min(now - before for now, before in zip(clocks(), then, strict=True))


@pytest.fixture(scope="module")
def mini() -> infdit.InfDiT:
    return infdit.load_model("mini", device="cpu")


def test_twenty_stops_at_random_moments(mini: infdit.InfDiT) -> None:
    waited = []
    for moment in sorted(random.Random(0).uniform(0, FIRST) for _ in range(PRESSES)):
        started, last = time.monotonic(), [clocks()]

        def look(*_: object, started: float = started, moment: float = moment, last: list = last) -> None:
            if time.monotonic() - started >= moment:
                raise StopError
            last[0] = clocks()  # the press came after this

        with pytest.raises(StopError):
            infdit.upscale(mini, IMAGE, scale=4, progress=look)
        waited.append(since(last[0]))
    assert max(waited) < MOST, waited


@pytest.mark.parametrize("denoise", [0, 1])
def test_no_moment_of_a_whole_run_waits_longer(mini: infdit.InfDiT, denoise: float) -> None:
    """A stop is obeyed at the next look; between two looks, and after the last, is never more time than that."""
    last, longest = clocks(), (0.0, 0)

    def look(done: int, *_: object) -> None:  # keeps no list of all looks: hundreds of thousands are slow to collect
        nonlocal last, longest
        longest, last = max(longest, (since(last), done)), clocks()

    infdit.upscale(mini, IMAGE, scale=4, denoise=denoise, progress=look)
    look(-1)
    assert longest[0] < MOST, longest

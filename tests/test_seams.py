"""How much a grid shows: the bench's own score, of pictures with and without lines."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks import scores
from infdit.seams import seams


def told(done: int) -> None:
    assert done == 0


@pytest.mark.parametrize("size", [(3, 5), (64, 40), (65, 33), (200, 130)], ids=str)
def test_it_is_the_score_of_the_bench(size: tuple[int, int]) -> None:
    picture = torch.rand((3, *size), generator=torch.Generator().manual_seed(0))
    y = scores.luma(picture.movedim(0, -1).double().numpy() * 255)
    for found, period in zip(seams(picture, (2, 32), told), (2, 32), strict=True):
        assert found == pytest.approx(scores.seam(y, period), rel=1e-5, nan_ok=True)


def test_lines_are_found_where_they_are() -> None:
    rows = torch.linspace(0, 0.5, 96) + 0.1 * (torch.arange(96) // 32 % 2)
    picture = rows[:, None].expand(3, 96, 96)
    patch, block = seams(picture, (4, 32), told)
    assert block > 10 > patch > 1
    assert seams(torch.zeros(3, 96, 96), (4,), told) == [1.0]
    assert math.isnan(seams(torch.zeros(3, 4, 4), (4,), told)[0])
    assert np.isinf(seams((torch.arange(8) // 4).float().expand(3, 8, 8), (4,), told)[0])

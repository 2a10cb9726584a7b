"""Blocks that are cut and pasted by lines, against one at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from infdit.blocks import Canvas, cut, cut_windows
from infdit.grid import SLOTS, BlockGrid, Geometry

SIZE = 4


@pytest.mark.parametrize("seed", range(20))
def test_any_chunk_of_any_grid(seed: int) -> None:
    rng = random.Random(seed)
    grid = BlockGrid(rng.randint(1, 4), rng.randint(1, 4), SIZE, rng.choice(["rows", "columns", "auto"]))
    image = torch.randn(2, 3, grid.height, grid.width, generator=torch.Generator().manual_seed(seed))
    padded = F.pad(image, (SIZE,) * 4)
    canvas = Canvas(grid, image)
    for blocks in grid.chunks(rng.randint(1, grid.blocks)):
        at = [grid.coordinates(i) for i in blocks]
        corners = [(r * SIZE, c * SIZE) for r, c in at]
        expected = [image[..., y : y + SIZE, x : x + SIZE] for y, x in corners]
        areas = grid.areas(blocks)
        assert len(areas) <= 3
        assert torch.equal(cut(image, areas, SIZE), torch.stack(expected, 1))
        windows = [padded[..., y : y + 3 * SIZE, x : x + 3 * SIZE] for y, x in corners]
        assert torch.equal(cut_windows(image, areas, SIZE), torch.stack(windows, 1))
        canvas.paste(areas, torch.stack(expected, 1))
        inside = [[[0 <= r + i < grid.rows and 0 <= c + j < grid.columns for j in (-1, 0, 1)] for i in (-1, 0, 1)]
                  for r, c in at]  # fmt: skip
        indices = np.arange(blocks.start, blocks.stop)
        assert grid.around(indices).tolist() == inside
        there = [[grid.index((max(r - up, 0), max(c - left, 0))) for r, c in at] for up, left in SLOTS]
        assert [found.tolist() for found in grid.neighbours(indices)] == there
    assert canvas.whole
    assert torch.equal(canvas.image, image)


def test_keys_are_moved_at_a_seam_only() -> None:
    """Of blocks of two patches and a period of four, rows 2, 4 … read keys of the row above in another frame."""
    grid = BlockGrid(5, 1, SIZE)
    shifts = Geometry(grid, 2, 4).frame_shifts(np.arange(5))
    assert shifts[..., 1].any() == 0
    assert shifts[..., 0].tolist() == [[0, -4 * seam, 0, -4 * seam] for seam in (0, 0, 1, 0, 1)]

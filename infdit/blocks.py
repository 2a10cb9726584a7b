"""Pictures to blocks and back: pixels of the blocks at hand, windows of the low-resolution picture, the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .disk import like
from .grid import BlockGrid, BlockIndex


def cut(image: Tensor, coordinates: Sequence[BlockIndex], size: int) -> Tensor:
    """Blocks of an image (B, c, h, w) → (B, n, c, size, size)."""
    areas = (_area(image, where, size) for _, where in _stretches(coordinates))
    return torch.cat([rearrange(area, "b k r h c w -> b (r c) k h w") for area in areas], 1)


def _stretches(coordinates: Sequence[BlockIndex]) -> Iterator[tuple[slice, tuple[int, int, int, int]]]:
    """Blocks that lie in one line: where they stand, and their first row and column, and how many there are of both."""
    begin, step = 0, (0, 1)
    for end in range(1, len(coordinates) + 1):
        (row, column), (first, left) = coordinates[end - 1], coordinates[begin]
        if end == begin + 1 and end < len(coordinates):
            step = (1, 0) if coordinates[end] == (row + 1, column) else (0, 1)
        if end == len(coordinates) or coordinates[end] != (row + step[0], column + step[1]):
            yield slice(begin, end), (first, left, row + 1 - first, column + 1 - left)
            begin = end


def _area(image: Tensor, where: tuple[int, int, int, int], size: int) -> Tensor:
    """So many rows and columns of blocks from one on, a view: (B, c, rows, size, columns, size)."""
    row, column, rows, columns = where
    area = image[..., row * size : (row + rows) * size, column * size : (column + columns) * size]
    return area.unflatten(-1, (columns, size)).unflatten(-3, (rows, size))


class Canvas:
    """An image that is put together from chunks of blocks, in the order of the grid.

    Attributes:
        blocks: how many are there; the rest of `image` may hold anything.
    """

    def __init__(self, grid: BlockGrid, like: Tensor) -> None:
        self._grid, self._like = grid, like
        self._image: Tensor | None = None
        self.blocks = 0

    @property
    def whole(self) -> bool:
        """Whether all blocks are there."""
        return self.blocks == self._grid.blocks

    @property
    def image(self) -> Tensor:
        assert self._image is not None, "a sweep writes every block"
        return self._image

    def take(self) -> None:
        """Take memory for the image, unless that is there."""
        if self._image is None:
            self._image = like(self._like)

    def paste(self, coordinates: Sequence[BlockIndex], pixels: Tensor) -> None:
        """Put a chunk of blocks (B, n, 3, size, size) where it belongs."""
        self.blocks += len(coordinates)
        grid, size = self._grid, self._grid.block
        if pixels.requires_grad:  # all at once, and not written in place: it is to be differentiated
            order = "(r c)" if grid.by_rows else "(c r)"
            self._image = rearrange(pixels, f"b {order} k h w -> b k (r h) (c w)", r=grid.rows)
            return
        self.take()
        for here, where in _stretches(coordinates):
            new = pixels[:, here].unflatten(1, where[2:])
            _area(self.image, where, size)[:] = rearrange(new, "b r c k h w -> b k r h c w")

    def there(self, stride: int) -> Tensor:
        """Of every `stride`-th pixel both ways: whether its block is there."""
        grid = self._grid
        rows = torch.arange(0, grid.height, stride, device="cpu")[:, None] // grid.block
        columns = torch.arange(0, grid.width, stride, device="cpu") // grid.block
        return (rows * grid.line + columns if grid.by_rows else columns * grid.line + rows) < self.blocks


def cut_windows(lr: Tensor, coordinates: Sequence[BlockIndex], size: int) -> Tensor:
    """The 3×3 blocks of `size` pixels of `lr` around each block, (B, n, 3, w, w); zeros outside."""
    windows: list[Tensor] = []
    for _, (row, column, rows, columns) in _stretches(coordinates):
        above, before = (1 - min(row, 1)) * size, (1 - min(column, 1)) * size  # pixels that lie outside
        top, left = (row - 1) * size + above, (column - 1) * size + before
        strip = lr[..., top : (row + rows + 1) * size, left : (column + columns + 1) * size]
        below, behind = (rows + 2) * size - above - strip.shape[-2], (columns + 2) * size - before - strip.shape[-1]
        strip = F.pad(strip, (before, behind, above, below))
        cut = strip.unfold(-2, 3 * size, size).unfold(-2, 3 * size, size)
        windows.append(rearrange(cut, "b k r c h w -> b (r c) k h w"))
    return torch.cat(windows, 1)

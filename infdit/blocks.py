"""Pictures to blocks and back: pixels of the blocks at hand, windows of the low-resolution picture, the result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .disk import like
from .grid import Area, BlockGrid


def cut(image: Tensor, areas: Sequence[Area], size: int) -> Tensor:
    """Blocks of an image (B, c, h, w) → (B, n, c, size, size)."""
    return torch.cat([_in_order(_blocks(image, area, size), area) for area in areas], 1)


def _blocks(image: Tensor, area: Area, size: int) -> Tensor:
    """Those of an area, a view: (B, c, rows, size, columns, size)."""
    top, left = area.row * size, area.column * size
    pixels = image[..., top : top + area.rows * size, left : left + area.columns * size]
    return pixels.unflatten(-1, (area.columns, size)).unflatten(-3, (area.rows, size))


def _in_order(blocks: Tensor, area: Area) -> Tensor:
    """(B, k, rows, h, columns, w) → (B, n, k, h, w)."""
    return rearrange(blocks, f"b k r h c w -> b {area.order} k h w")


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

    def paste(self, areas: Sequence[Area], pixels: Tensor) -> None:
        """Put a chunk of blocks (B, n, 3, size, size) where it belongs."""
        self.blocks += pixels.shape[1]
        grid, size = self._grid, self._grid.block
        if pixels.requires_grad:  # all at once, and not written in place: it is to be differentiated
            self._image = rearrange(pixels, f"b {grid.order} k h w -> b k (r h) (c w)", r=grid.rows)
            return
        self.take()
        for area in areas:
            new = rearrange(pixels[:, area.where], f"b {area.order} k h w -> b k r h c w", r=area.rows)
            _blocks(self.image, area, size)[:] = new

    def there(self, stride: int) -> Tensor:
        """Of every `stride`-th pixel both ways: whether its block is there."""
        grid = self._grid
        rows = torch.arange(0, grid.height, stride, dtype=torch.int64, device="cpu")[:, None] // grid.block
        columns = torch.arange(0, grid.width, stride, dtype=torch.int64, device="cpu") // grid.block
        return (rows * grid.line + columns if grid.by_rows else columns * grid.line + rows) < self.blocks


def cut_windows(lr: Tensor, areas: Sequence[Area], size: int) -> Tensor:
    """The 3×3 blocks of `size` pixels of `lr` around each block, (B, n, 3, w, w); zeros outside."""
    windows: list[Tensor] = []
    for area in areas:
        row, column, rows, columns = area.row, area.column, area.rows, area.columns
        above, before = (1 - min(row, 1)) * size, (1 - min(column, 1)) * size  # pixels that lie outside
        top, left = (row - 1) * size + above, (column - 1) * size + before
        strip = lr[..., top : (row + rows + 1) * size, left : (column + columns + 1) * size]
        below, behind = (rows + 2) * size - above - strip.shape[-2], (columns + 2) * size - before - strip.shape[-1]
        strip = F.pad(strip, (before, behind, above, below))
        found = strip.unfold(-2, 3 * size, size).unfold(-2, 3 * size, size)  # (B, 3, rows, columns, w, w)
        windows.append(_in_order(found.transpose(-2, -3), area))
    return torch.cat(windows, 1)

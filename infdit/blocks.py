"""Pictures to blocks and back: pixels of the blocks at hand, windows of the low-resolution picture, the result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .disk import like
from .grid import BlockGrid, BlockIndex


def cut(image: Tensor, coordinates: Sequence[BlockIndex], size: int) -> Tensor:
    """Blocks of an image (B, c, h, w) → (B, n, c, size, size)."""
    return torch.stack([image[..., r * size : (r + 1) * size, c * size : (c + 1) * size] for r, c in coordinates], 1)


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
        for (r, c), block in zip(coordinates, pixels.unbind(1), strict=True):
            self.image[..., r * size : (r + 1) * size, c * size : (c + 1) * size] = block

    def there(self, stride: int) -> Tensor:
        """Of every `stride`-th pixel both ways: whether its block is there."""
        grid = self._grid
        rows = torch.arange(0, grid.height, stride, device="cpu")[:, None] // grid.block
        columns = torch.arange(0, grid.width, stride, device="cpu") // grid.block
        return (rows * grid.line + columns if grid.by_rows else columns * grid.line + rows) < self.blocks


def cut_windows(lr: Tensor, coordinates: Sequence[BlockIndex], size: int) -> Tensor:
    """The 3×3 blocks of `size` pixels of `lr` around each block, (B, n, 3, w, w); zeros outside."""
    windows: list[Tensor] = []
    for row, column in coordinates:
        above, before = (1 - min(row, 1)) * size, (1 - min(column, 1)) * size  # pixels that lie outside
        top, left = (row - 1) * size + above, (column - 1) * size + before
        cut = lr[..., top : (row + 2) * size, left : (column + 2) * size]
        padding = (before, 3 * size - before - cut.shape[-1], above, 3 * size - above - cut.shape[-2])
        windows.append(F.pad(cut, padding))
    return torch.stack(windows, 1)

"""A picture as a grid of blocks, the order in which a sweep visits them, and where their tokens lie. Integers only.

Lines run along the short side, so that C, the blocks of a line, is small. A block's neighbours (upper-left, left,
upper) then lie at most C + 1 coordinates before it: that is all a sweep must remember.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np

Sweep = Literal["auto", "rows", "columns"]
Positions = Literal["continuous", "wrapped"]
BlockIndex = tuple[int, int]  # row, column of a block
Whole = TypeVar("Whole", int, np.ndarray)  # a number, or one for each of n blocks

# The blocks whose keys and values a block attends to, in the published order of the four slots: (up, left) steps.
SLOTS: tuple[BlockIndex, ...] = ((0, 0), (1, 1), (0, 1), (1, 0))


@dataclass(frozen=True)
class Area:
    """A rectangle of a grid's blocks that follow each other in a chunk: part of a line, or whole lines.

    Attributes:
        where: they stand in the chunk.
        row, column: of the first; rows, columns: how many there are of both.
        order: in which they follow each other, "(r c)" where lines are rows, else "(c r)".
    """

    where: slice
    row: int
    column: int
    rows: int
    columns: int
    order: str


@dataclass(frozen=True)
class BlockGrid:
    """`rows` × `columns` blocks of `block` pixels, visited line by line; `sweep` says whether lines are rows."""

    rows: int
    columns: int
    block: int
    sweep: Sweep = "auto"

    @classmethod
    def covering(cls, height: int, width: int, block: int, sweep: Sweep = "auto") -> BlockGrid:
        """The smallest grid of whole blocks that covers `height` × `width` pixels."""
        if min(height, width) < 1:
            raise ValueError(f"a picture of {width}×{height} has no pixels: both sides must be at least 1")
        return cls(-(-height // block), -(-width // block), block, sweep)

    @property
    def height(self) -> int:
        """Pixels, whole blocks."""
        return self.rows * self.block

    @property
    def width(self) -> int:
        """Pixels, whole blocks."""
        return self.columns * self.block

    @property
    def blocks(self) -> int:
        """N, all blocks of the grid."""
        return self.rows * self.columns

    @property
    def by_rows(self) -> bool:
        """Whether lines run across (rows) or down (columns)."""
        return self.columns <= self.rows if self.sweep == "auto" else self.sweep == "rows"

    @property
    def line(self) -> int:
        """C, the blocks of a line."""
        return self.columns if self.by_rows else self.rows

    def coordinates(self, index: Whole) -> tuple[Whole, Whole]:
        """Row and column of the block that is visited at `index`."""
        line, along = index // self.line, index % self.line
        return (line, along) if self.by_rows else (along, line)

    @property
    def order(self) -> str:
        """Of rows and columns, as blocks are visited."""
        return "(r c)" if self.by_rows else "(c r)"

    def areas(self, blocks: range) -> list[Area]:
        """These blocks as rectangles, three at most: the rest of a line, whole lines, and part of one."""
        found, start = list[Area](), blocks.start
        while start < blocks.stop:
            line, along = start // self.line, start % self.line
            lines = 1 if along else max(1, (blocks.stop - start) // self.line)
            length = min(self.line - along, blocks.stop - start)
            where = slice(start - blocks.start, start - blocks.start + lines * length)
            corner, sides = ((line, along), (lines, length)) if self.by_rows else ((along, line), (length, lines))
            found.append(Area(where, *corner, *sides, self.order))
            start += lines * length
        return found

    def index(self, coordinates: tuple[Whole, Whole]) -> Whole:
        """When the block at (row, column) is visited: the inverse of `coordinates`."""
        row, column = coordinates
        return row * self.line + column if self.by_rows else column * self.line + row

    def neighbours(self, indices: np.ndarray) -> list[np.ndarray]:
        """Indices of the four blocks that each of `indices` attends to, in slot order.

        An index outside the picture is clamped to 0 on its axis, so a missing neighbour is a copy of the nearest
        block. Slots are chosen by geometry: where lines run down, upper and left lie the other way around in time.
        """
        rows, columns = self.coordinates(indices)
        return [self.index((np.maximum(rows - up, 0), np.maximum(columns - left, 0))) for up, left in SLOTS]

    def around(self, indices: np.ndarray) -> np.ndarray:
        """(n, 3, 3): which of the 3×3 blocks around each lie in the picture."""
        steps = np.arange(-1, 2)
        rows, columns = (at[:, None] + steps for at in self.coordinates(indices))
        rows, columns = (rows >= 0) & (rows < self.rows), (columns >= 0) & (columns < self.columns)
        return rows[:, :, None] & columns[:, None]

    def chunks(self, size: int) -> Iterator[range]:
        """All block indices in order, `size` at a time; the last chunk may be shorter."""
        for start in range(0, self.blocks, size):
            yield range(start, min(start + size, self.blocks))


@dataclass(frozen=True)
class Geometry:
    """Where blocks lie and which rotary positions their tokens have.

    Attributes:
        grid: the blocks.
        side: patches along one side of a block.
        period: patches after which the published positions start anew.
        origin: (row, column) in patches of the grid's first patch: a crop of a larger picture has another than (0, 0).
        positions: "wrapped" starts anew after every period as the published code does, so that at the seam a block
            sees its neighbour at distance 1 − period instead of 1. "continuous" turns a key into the frame of the
            block that reads it: the same up to the first seam, and no seam after it.
    """

    grid: BlockGrid
    side: int
    period: int
    positions: Positions = "continuous"
    origin: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions {self.positions!r} must be one of {get_args(Positions)}")

    def starts(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and column in patches of each block's first patch."""
        rows, columns = self.grid.coordinates(indices)
        return self.origin[0] + rows * self.side, self.origin[1] + columns * self.side

    def token_positions(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns, each (n, side), at which the tokens of blocks are turned."""

        def axis(starts: np.ndarray) -> np.ndarray:
            if self.positions == "wrapped":
                return (starts[:, None] + np.arange(self.side)) % self.period  # published: the seam
            return (starts % self.period)[:, None] + np.arange(self.side)

        rows, columns = self.starts(indices)
        return axis(rows), axis(columns)

    def frame_shifts(self, indices: np.ndarray) -> np.ndarray:
        """By how many patches the keys of each slot must still be moved for blocks to read them: (n, slots, 2).

        Zero or one period back, down and across: a block just behind the seam reads keys that were turned just before.
        """
        if self.positions == "wrapped":
            return np.zeros((len(indices), len(SLOTS), 2), int)
        own = np.stack(self.starts(indices), -1)[:, None]
        theirs = np.stack([np.stack(self.starts(there), -1) for there in self.grid.neighbours(indices)], 1)
        return (own % self.period - (own - theirs)) - theirs % self.period

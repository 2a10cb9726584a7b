"""A picture as a grid of blocks, the order in which a sweep visits them, and where their tokens lie. Integers only.

Lines run along the short side, so that C, the blocks of a line, is small. A block's neighbours (upper-left, left,
upper) then lie at most C + 1 coordinates before it: that is all a sweep must remember.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Sweep = Literal["auto", "rows", "columns"]
Positions = Literal["continuous", "wrapped"]
BlockIndex = tuple[int, int]  # row, column of a block

# The blocks whose keys and values a block attends to, in the published order of the four slots: (up, left) steps.
SLOTS: tuple[BlockIndex, ...] = ((0, 0), (1, 1), (0, 1), (1, 0))


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

    def coordinates(self, index: int) -> BlockIndex:
        """Row and column of the block that is visited at `index`."""
        line, along = divmod(index, self.line)
        return (line, along) if self.by_rows else (along, line)

    def index(self, coordinates: BlockIndex) -> int:
        """When the block at (row, column) is visited: the inverse of `coordinates`."""
        row, column = coordinates
        return row * self.line + column if self.by_rows else column * self.line + row

    def neighbours(self, index: int) -> tuple[int, ...]:
        """Indices of the four blocks that block `index` attends to, in slot order.

        An index outside the picture is clamped to 0 on its axis, so a missing neighbour is a copy of the nearest
        block. Slots are chosen by geometry: where lines run down, upper and left lie the other way around in time.
        """
        row, column = self.coordinates(index)
        return tuple(self.index((max(row - up, 0), max(column - left, 0))) for up, left in SLOTS)

    def around(self, at: BlockIndex) -> list[list[bool]]:
        """(3, 3): which of the 3×3 blocks around one lie in the picture."""
        row, column = at
        return [[0 <= row + r < self.rows and 0 <= column + c < self.columns for c in (-1, 0, 1)] for r in (-1, 0, 1)]

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

    def starts(self, at: BlockIndex) -> tuple[int, int]:
        """(row, column) in patches of a block's first patch."""
        return self.origin[0] + at[0] * self.side, self.origin[1] + at[1] * self.side

    def token_positions(self, coordinates: Sequence[BlockIndex]) -> tuple[list[list[int]], list[list[int]]]:
        """Rows and columns, each (n, side), at which the tokens of blocks are turned."""

        def axis(start: int) -> list[int]:
            if self.positions == "wrapped":
                return [(start + i) % self.period for i in range(self.side)]  # published: the seam
            return [start % self.period + i for i in range(self.side)]

        starts = [self.starts(at) for at in coordinates]
        return [axis(row) for row, _ in starts], [axis(column) for _, column in starts]

    def frame_shifts(self, index: int) -> list[tuple[int, int]]:
        """By how many patches (row, column) the keys of each slot must still be moved for block `index` to read them.

        Zero or one period back: a block just behind the seam reads keys that were turned just before it.
        """
        if self.positions == "wrapped":
            return [(0, 0)] * 4
        own = self.starts(self.grid.coordinates(index))
        shifts: list[tuple[int, int]] = []
        for neighbour in self.grid.neighbours(index):
            theirs = self.starts(self.grid.coordinates(neighbour))
            row, column = ((q % self.period - (q - k)) - k % self.period for q, k in zip(own, theirs, strict=True))
            shifts.append((row, column))
        return shifts

"""A picture as a grid of blocks, and the order in which a sweep visits them. Integers only.

Lines run along the short side, so that C, the blocks of a line, is small. A block's neighbours (upper-left, left,
upper) then lie at most C + 1 places before it: that is all a sweep must remember (INFDIT.md section 7).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Sweep = Literal["auto", "rows", "columns"]
Place = tuple[int, int]  # row, column of a block

# The blocks whose keys and values a block attends to, in the published order of the four slots: (up, left) steps.
SLOTS: tuple[Place, ...] = ((0, 0), (1, 1), (0, 1), (1, 0))


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

    def place(self, index: int) -> Place:
        """Row and column of the block that is visited at `index`."""
        line, along = divmod(index, self.line)
        return (line, along) if self.by_rows else (along, line)

    def index(self, place: Place) -> int:
        """When the block at (row, column) is visited: the inverse of `place`."""
        row, column = place
        return row * self.line + column if self.by_rows else column * self.line + row

    def neighbours(self, index: int) -> tuple[int, ...]:
        """Indices of the four blocks that block `index` attends to, in slot order.

        An index outside the picture is clamped to 0 on its axis, so a missing neighbour is a copy of the nearest
        block. Slots are chosen by geometry: where lines run down, upper and left lie the other way around in time.
        """
        row, column = self.place(index)
        return tuple(self.index((max(row - up, 0), max(column - left, 0))) for up, left in SLOTS)

    def chunks(self, size: int) -> Iterator[range]:
        """All block indices in order, `size` at a time; the last chunk may be shorter."""
        for start in range(0, self.blocks, size):
            yield range(start, min(start + size, self.blocks))

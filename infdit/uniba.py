"""Unidirectional Block Attention (Inf-DiT, section 3.2): the one loop over layers and blocks.

Within a layer a block needs only its neighbours' *inputs* of that layer, and its neighbours come before it in raster
order. So the loops over layers and over blocks may be exchanged freely:

    for each group of layers:  for each chunk of blocks:  for each layer of the group

and all that a layer keeps from chunk to chunk is a ring of keys and values of the last C + 1 blocks. Between groups
the hidden states of all blocks are kept. The result is the same for every group and chunk, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import InfDiTConfig
from .grid import BlockGrid, Place
from .memory import MemoryPlan
from .model import InfDiT, rotary_angles, rotate

Positions = Literal["continuous", "wrapped"]
Read = Callable[[Sequence[Place]], Tensor]  # blocks at (row, column) → their pixels (B, n, 6, h, w)
Write = Callable[[Sequence[Place], Tensor], None]  # blocks at (row, column) and their pixels (B, n, 3, h, w)


@dataclass(frozen=True)
class Geometry:
    """Where blocks lie and which rotary positions their tokens have (INFDIT.md section 5).

    Attributes:
        origin: (row, column) in patches of the grid's first patch: a crop of a larger picture has another than (0, 0).
        positions: "wrapped" starts anew after every period as the published code does, so that at the seam a block
            sees its neighbour at distance 1 − period instead of 1. "continuous" turns a key into the frame of the
            block that reads it: the same up to the first seam, and no seam after it.
    """

    config: InfDiTConfig
    grid: BlockGrid
    positions: Positions = "continuous"
    origin: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions {self.positions!r} must be one of {get_args(Positions)}")

    def starts(self, place: Place) -> tuple[int, int]:
        """(row, column) in patches of a block's first patch."""
        side = self.config.block_side
        return self.origin[0] + place[0] * side, self.origin[1] + place[1] * side

    def token_positions(self, places: Sequence[Place]) -> tuple[list[list[int]], list[list[int]]]:
        """Rows and columns, each (n, side), at which the tokens of blocks are turned."""
        period, side = self.config.position_period, self.config.block_side

        def axis(start: int) -> list[int]:
            if self.positions == "wrapped":
                return [(start + i) % period for i in range(side)]  # published
            return [start % period + i for i in range(side)]

        starts = [self.starts(place) for place in places]
        return [axis(row) for row, _ in starts], [axis(column) for _, column in starts]

    def frame_shifts(self, index: int) -> list[tuple[int, int]]:
        """By how many patches (row, column) the keys of each slot must still be moved for block `index` to read them.

        Zero or one period back: a block just behind the seam reads keys that were turned just before it.
        """
        if self.positions == "wrapped":
            return [(0, 0)] * 4
        period = self.config.position_period
        own = self.starts(self.grid.place(index))
        shifts: list[tuple[int, int]] = []
        for neighbour in self.grid.neighbours(index):
            theirs = self.starts(self.grid.place(neighbour))
            row, column = ((q % period - (q - k)) - k % period for q, k in zip(own, theirs, strict=True))
            shifts.append((row, column))
        return shifts


class Visit:
    """A chunk of blocks at hand: what every layer needs to know of it, on the device, computed once.

    Attributes:
        blocks: indices in the order of the sweep.
        places: their rows and columns.
        angles: (n, T, d/2) rotary angles of their tokens.
        own: (n,) the indices as a tensor; neighbours: (n·4,) those of the blocks that they attend to.
        turns: for slots whose keys lie in another frame than their reader's, (n, 1, d/2) angles that move them there.
    """

    def __init__(self, geometry: Geometry, blocks: range, device: torch.device, dtype: torch.dtype) -> None:
        grid, head_dim = geometry.grid, geometry.config.head_dim
        integers = partial(torch.tensor, device=device)
        self.blocks = blocks
        self.places = [grid.place(i) for i in blocks]
        rows, columns = geometry.token_positions(self.places)
        self.angles = rotary_angles(integers(rows), integers(columns), head_dim, dtype)
        self.own = integers(list(blocks))
        self.neighbours = integers([n for i in blocks for n in grid.neighbours(i)])
        self.turns: dict[int, Tensor] = {}
        for slot, shifts in enumerate(zip(*(geometry.frame_shifts(i) for i in blocks), strict=True)):
            if any(shift != (0, 0) for shift in shifts):
                shift_rows, shift_columns = integers(shifts)[..., None].unbind(1)  # (n, 1) each
                self.turns[slot] = rotary_angles(shift_rows, shift_columns, head_dim, dtype)


class KVRing:
    """Keys and values of one layer for the last C + 1 blocks and the chunk at hand: block i lies at i modulo size."""

    def __init__(self, grid: BlockGrid, chunk: int) -> None:
        self.size = min(grid.line + 1 + chunk, grid.blocks)
        self.kept: tuple[Tensor, Tensor] | None = None

    def share(self, visit: Visit, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values (B, n, T, H, d) of a chunk; give those that it attends to, (B, n, 4, T, H, d)."""
        if len(visit.blocks) == self.size:  # the whole grid at once: nothing to remember, and differentiable
            keys, values = k, v
        else:
            if self.kept is None:
                shape = (k.shape[0], self.size, *k.shape[2:])
                self.kept = k.new_empty(shape), v.new_empty(shape)
            keys, values = self.kept
            slots = visit.own % self.size
            keys.index_copy_(1, slots, k)
            values.index_copy_(1, slots, v)
        slots = visit.neighbours % self.size
        keys, values = (x.index_select(1, slots).unflatten(1, (-1, 4)) for x in (keys, values))
        for slot, turn in visit.turns.items():
            keys[:, :, slot] = rotate(keys[:, :, slot], turn)
        return keys, values


def sweep(
    model: InfDiT,
    geometry: Geometry,
    plan: MemoryPlan,
    modulations: tuple[Sequence[Tensor], Tensor],
    lr: Tensor,
    read: Read,
    write: Write,
    progress: Callable[[int], None] | None = None,
) -> None:
    """One evaluation of the network over a whole grid of blocks.

    Args:
        model: the weights.
        geometry: grid and positions.
        plan: layers in groups, blocks in chunks.
        modulations: of the layers and of the head, see `InfDiT.modulations_for`.
        lr: (B, 3, H/4, W/4) the low-resolution picture in the network's dtype.
        read: gives the input of the blocks at hand; write: takes their result.
        progress: told the number of blocks after each layer; an exception that it raises ends the sweep.
    """
    layer_modulations, head_modulation = modulations
    grid, depth = geometry.grid, len(model.layers)
    angle_dtype = torch.promote_types(model.dtype, torch.float32)
    states: dict[range, Tensor] = {}  # hidden states between groups
    for first in range(0, depth, plan.group):
        group = range(first, min(first + plan.group, depth))
        rings = [KVRing(grid, plan.chunk) for _ in group]
        for blocks in grid.chunks(plan.chunk):
            visit = Visit(geometry, blocks, model.device, angle_dtype)
            if first == 0:
                h, window = model.embed(read(visit.places)), model.embed_lr(*_windows(lr, geometry, visit.places))
            else:
                h, window = states.pop(blocks), None
            for i, ring in zip(group, rings, strict=True):
                h = model.layers[i](h, layer_modulations[i], visit.angles, partial(ring.share, visit), window)
                if progress is not None:
                    progress(len(blocks))
            if group.stop == depth:
                write(visit.places, model.unembed(h, head_modulation))
            else:
                states[blocks] = h


def _windows(lr: Tensor, geometry: Geometry, places: Sequence[Place]) -> tuple[Tensor, Tensor]:
    """The 3×3 blocks of `lr` around each place, (B, n, 3, w, w), and which of them lie in the picture, (n, 3, 3)."""
    size, grid = geometry.config.lr_block_size, geometry.grid
    windows: list[Tensor] = []
    inside: list[list[list[bool]]] = []
    for row, column in places:
        rows, columns = range(row - 1, row + 2), range(column - 1, column + 2)
        top, left = max(rows[0], 0) * size, max(columns[0], 0) * size
        cut = lr[..., top : (row + 2) * size, left : (column + 2) * size]
        above, before = -min(rows[0], 0) * size, -min(columns[0], 0) * size
        padding = (before, 3 * size - before - cut.shape[-1], above, 3 * size - above - cut.shape[-2])
        windows.append(F.pad(cut, padding))
        inside.append([[0 <= r < grid.rows and 0 <= c < grid.columns for c in columns] for r in rows])
    return torch.stack(windows, 1), torch.tensor(inside, device=lr.device)

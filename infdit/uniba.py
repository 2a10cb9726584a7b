"""Unidirectional Block Attention (Inf-DiT, section 3.2): the one loop over layers and blocks.

Within a layer a block needs only its neighbours' *inputs* of that layer, and its neighbours come before it in raster
order. So the loops over layers and over blocks may be exchanged freely:

    for each group of layers:  for each chunk of blocks:  for each layer of the group

and all that a layer keeps from chunk to chunk is a ring of keys and values of the last C + 1 blocks. Between groups
the hidden states of all blocks are kept. The result is the same for every group and chunk, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .grid import BlockGrid, BlockIndex, Geometry
from .rotary import rotary_angles, rotate

if TYPE_CHECKING:
    from .memory.offload import Offloader
    from .model import InfDiT

# blocks at (row, column) → their pixels (B, n, 6, h, w) and windows of the low-resolution picture (B, n, 3, w, w)
Read = Callable[[Sequence[BlockIndex]], tuple[Tensor, Tensor]]
Write = Callable[[Sequence[BlockIndex], Tensor], None]  # blocks at (row, column) and their pixels (B, n, 3, h, w)


class Chunk:
    """A chunk of blocks at hand: what every layer needs to know of it, on the device, computed once.

    Attributes:
        blocks: indices in the order of the sweep; coordinates: their rows and columns.
        angles: (n, T, d/2) rotary angles of their tokens.
        inside: (n, 3, 3), which of the blocks around each lie in the picture.
        own: (n,) the indices as a tensor; neighbours: (n·4,) those of the blocks that they attend to.
        turns: for slots whose keys lie in another frame than their reader's, (n, 1, d/2) angles that move them there.
    """

    def __init__(self, geometry: Geometry, blocks: range, offload: Offloader, model: InfDiT) -> None:
        grid, transfer = geometry.grid, offload.transfer
        head_dim, dtype = model.config.head_dim, torch.promote_types(model.dtype, torch.float32)
        self.blocks = blocks
        self.coordinates = [grid.coordinates(i) for i in blocks]
        rows, columns = geometry.token_positions(self.coordinates)
        self.angles = rotary_angles(transfer.to_device(rows), transfer.to_device(columns), head_dim, dtype)
        self.inside = transfer.to_device([grid.around(at) for at in self.coordinates])
        self.own = transfer.to_device(list(blocks))
        self.neighbours = transfer.to_device([n for i in blocks for n in grid.neighbours(i)])
        self.turns: dict[int, Tensor] = {}
        for slot, shifts in enumerate(zip(*(geometry.frame_shifts(i) for i in blocks), strict=True)):
            if any(shift != (0, 0) for shift in shifts):
                shift_rows, shift_columns = transfer.to_device(shifts)[..., None].unbind(1)  # (n, 1) each
                self.turns[slot] = rotary_angles(shift_rows, shift_columns, head_dim, dtype)


class KVRing:
    """Keys and values of one layer for the last C + 1 blocks and the chunk at hand: block i lies at i modulo size."""

    def __init__(self, grid: BlockGrid, chunk: int) -> None:
        self.size = min(grid.line + 1 + chunk, grid.blocks)
        self.kept: tuple[Tensor, Tensor] | None = None

    def gather_neighbours(self, chunk: Chunk, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values (B, n, T, H, d) of a chunk; give those that it attends to, (B, n, 4, T, H, d)."""
        if len(chunk.blocks) == self.size:  # the whole grid at once: nothing to remember, and differentiable
            keys, values = k, v
        else:
            if self.kept is None:
                shape = (k.shape[0], self.size, *k.shape[2:])
                self.kept = k.new_empty(shape), v.new_empty(shape)
            keys, values = self.kept
            keys.index_copy_(1, chunk.own % self.size, k)
            values.index_copy_(1, chunk.own % self.size, v)
        slots = chunk.neighbours % self.size
        keys = keys.index_select(1, slots).unflatten(1, (-1, 4))
        for slot, turn in chunk.turns.items():  # before the values are there: turning takes room of its own
            keys[:, :, slot] = rotate(keys[:, :, slot], turn)
        return keys, values.index_select(1, slots).unflatten(1, (-1, 4))


def sweep(
    model: InfDiT, geometry: Geometry, offload: Offloader, modulations: tuple[Sequence[Tensor], Tensor], read: Read,
    write: Write, progress: Callable[[int], None] | None = None,
) -> None:
    """One evaluation of the network over a whole grid of blocks.

    Args:
        model: the weights; those of `layers` on the host if the plan streams them, all others on the device.
        geometry: grid and positions.
        offload: layers in groups, blocks in chunks, what is kept where.
        modulations: of the layers and of the head, see `InfDiT.modulations_for`.
        read: gives the input of the blocks at hand, write: takes their result, both on the device.
        progress: is told the number of blocks after each layer; an exception that it raises ends the sweep.
    """
    layer_modulations, head_modulation = modulations
    grid, depth, plan = geometry.grid, len(model.layers), offload.plan
    states = offload.hidden_states()
    chunks = list(grid.chunks(plan.chunk))
    groups = [range(first, min(first + plan.group, depth)) for first in range(0, depth, plan.group)]
    ready = offload.ready([model.layers[i] for i in group] for group in groups)
    for group in groups:
        steps = [
            (layer, layer_modulations[i], KVRing(grid, plan.chunk)) for i, layer in zip(group, next(ready), strict=True)
        ]
        for blocks, following in zip(chunks, [*chunks[1:], None], strict=True):
            chunk = Chunk(geometry, blocks, offload, model)
            window = None
            if group.start == 0:
                pixels, lr = read(chunk.coordinates)
                h, window = model.embed(pixels), model.embed_lr(lr, chunk.inside)
                del pixels, lr
            else:
                h = states.load(blocks, following)
            for number in range(len(steps)):
                layer, modulation, ring = steps[number]
                h = layer(h, modulation, chunk.angles, partial(ring.gather_neighbours, chunk), window)
                del layer, modulation, ring  # no variable may outlive the group and keep a layer
                offload.transfer.throttle()
                if progress is not None:
                    progress(len(blocks))
            if group.stop == depth:
                write(chunk.coordinates, model.unembed(h, head_modulation))
            else:
                states.store(blocks, h)
        del steps  # weights and rings of this group make room before those of another are fetched
        offload.transfer.synchronize()

"""Unidirectional Block Attention (Inf-DiT, section 3.2): the one loop over layers and blocks.

Within a layer a block needs only its neighbours' *inputs* of that layer, and its neighbours come before it in raster
order. So the loops over layers and over blocks may be exchanged freely:

    for each group of layers:  for each chunk of blocks:  for each layer of the group

and all that a layer keeps from chunk to chunk is a ring of keys and values of the last C + 1 blocks. Between groups
the hidden states of all blocks are kept. The result is the same for every group and chunk, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .grid import SLOTS, BlockGrid, Geometry
from .rotary import rotary_turns, rotate

if TYPE_CHECKING:
    from .memory.offload import Offloader
    from .model import InfDiT



class Chunk:
    """A chunk of blocks at hand: what every layer needs to know of it, computed once.

    Attributes:
        blocks: indices in the order of the sweep; coordinates: their rows and columns.
        turns: (n, T, d/2) rotary positions of their tokens, on the device.
        inside: (n, 3, 3), which of the blocks around each lie in the picture, on the device.
        neighbours: for each slot the indices of the blocks that they attend to.
        shifted: (block of the chunk, slot) of keys that lie in another frame than their reader's, and (1, d/2), on
            the device, what moves them there.
    """

    def __init__(self, geometry: Geometry, blocks: range, offload: Offloader, model: InfDiT) -> None:
        grid, transfer = geometry.grid, offload.transfer
        head_dim, dtype = model.config.head_dim, torch.promote_types(model.dtype, torch.float32)
        self.blocks = blocks
        self.coordinates = [grid.coordinates(i) for i in blocks]
        rows, columns = geometry.token_positions(self.coordinates)
        self.turns = rotary_turns(transfer.to_device(rows), transfer.to_device(columns), head_dim, dtype)
        self.inside = transfer.to_device([grid.around(at) for at in self.coordinates])
        self.neighbours = list(zip(*(grid.neighbours(i) for i in blocks), strict=True))
        frames = enumerate(geometry.frame_shifts(i) for i in blocks)
        shifts = [(n, slot, by) for n, shifts in frames for slot, by in enumerate(shifts) if any(by)]
        self.shifted: list[tuple[int, int, Tensor]] = []
        if shifts:
            rows, columns = transfer.to_device([by for *_, by in shifts])[..., None].unbind(1)  # (m, 1) each
            turns = rotary_turns(rows, columns, head_dim, dtype)
            self.shifted = [(n, slot, turn) for (n, slot, _), turn in zip(shifts, turns.unbind(), strict=True)]


# tokens (B, n, T, D) of a chunk, and (B, n, W, D) of the low-resolution picture where a layer looks at them
Take = Callable[[Chunk], tuple[Tensor, Tensor | None]]
Give = Callable[[Chunk, Tensor], None]


class KVRing:
    """Keys and values of one layer for the last C + 1 blocks and the chunk at hand: block i lies at i modulo size.

    Blocks of a chunk follow each other, and so mostly do their neighbours: the ring is written and read by slices.
    """

    def __init__(self, grid: BlockGrid, chunk: int, like: Tensor, shape: tuple[int, int, int, int]) -> None:
        """like: a tensor of the dtype and on the device of keys and values; shape: (B, T, H, d) of a block of them."""
        self.size = min(grid.line + 1 + chunk, grid.blocks)
        self.kept: Tensor | None = None  # (2, B, size, T, H, d), keys and values
        if chunk < grid.blocks:
            self.kept = like.new_empty((2, shape[0], self.size, *shape[1:]))

    def gather_neighbours(self, chunk: Chunk, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values (B, n, T, H, d) of a chunk; give those that it attends to, (B, n, 4, T, H, d)."""
        if self.kept is None:  # the whole grid at once: nothing to remember, and differentiable
            keys, values = (self._of_the_grid(x, chunk) for x in (k, v))
        else:
            keys, values = self._of_the_ring(self.kept, k, v, chunk)
        for block, slot, turn in chunk.shifted:
            keys[:, block, slot] = rotate(keys[:, block, slot], turn)
        return keys, values

    def _of_the_grid(self, x: Tensor, chunk: Chunk) -> Tensor:
        if not x.requires_grad:
            found = x.new_empty((*x.shape[:2], len(SLOTS), *x.shape[2:]))
            for slot, here, there in self._slices(chunk):
                found[:, here, slot] = x[:, there]
            return found
        return torch.stack([x[:, list(indices)] for indices in chunk.neighbours], 2)

    def _of_the_ring(self, kept: Tensor, k: Tensor, v: Tensor, chunk: Chunk) -> Tensor:
        for here, there in _runs(chunk.blocks, self.size):
            for ring, new in zip(kept, (k, v), strict=True):
                ring[:, there] = new[:, here]
        found = k.new_empty((2, *k.shape[:2], len(SLOTS), *k.shape[2:]))
        for slot, here, there in self._slices(chunk):
            found[:, :, here, slot] = kept[:, :, there]
        return found

    def _slices(self, chunk: Chunk) -> Iterator[tuple[int, slice, slice]]:
        """Slots, blocks of the chunk, and where those that they attend to in that slot are kept."""
        for slot, indices in enumerate(chunk.neighbours):
            for here, there in _runs(indices, self.size):
                yield slot, here, there


def _runs(indices: Sequence[int], size: int) -> Iterator[tuple[slice, slice]]:
    """Indices by runs that follow each other modulo size: where they stand, and their slice of what has that size."""
    begin = 0
    for end in range(1, len(indices) + 1):
        if end == len(indices) or indices[end] != indices[end - 1] + 1 or indices[end] % size == 0:
            there = indices[begin] % size
            yield slice(begin, end), slice(there, there + end - begin)
            begin = end


def sweep(
    model: InfDiT, layers: range, geometry: Geometry, offload: Offloader, modulations: Sequence[Tensor], take: Take,
    give: Give, progress: Callable[[int], None],
) -> None:
    """Consecutive layers over a whole grid of blocks.

    Args:
        model: the weights; those of `layers` on the host if the plan streams them, all others on the device.
        layers: which of its layers.
        geometry: grid and positions.
        offload: layers in groups, blocks in chunks, what is kept where.
        modulations: of these layers, see `InfDiT.modulations_for`.
        take: gives the tokens of the chunk at hand before the first of these layers, give: takes them after the last,
            both on the device.
        progress: is told the number of blocks after each layer; an exception that it raises ends the sweep.
    """
    grid, config, plan = geometry.grid, model.config, offload.plan
    chunks = list(grid.chunks(plan.chunk))
    groups = [layers[first : first + plan.group] for first in range(0, len(layers), plan.group)]
    kept = (modulations[0].shape[1], config.block_tokens, config.num_heads, config.head_dim)
    rings = [KVRing(grid, plan.chunk, modulations[0], kept) for _ in groups[0]]
    streamed = offload.ready([model.layers[i] for i in group] for group in groups)
    with offload.hidden_states(grid.blocks) as states, closing(streamed) as ready:
        for group in groups:
            own = [modulations[i - layers.start] for i in group]
            steps = list(zip(next(ready), own, rings[: len(group)], strict=True))
            for blocks, following in zip(chunks, [*chunks[1:], None], strict=True):
                chunk = Chunk(geometry, blocks, offload, model)
                h, window = take(chunk) if group.start == layers.start else (states.load(blocks, following), None)
                for number in range(len(steps)):
                    layer, modulation, ring = steps[number]
                    h = layer(h, modulation, chunk.turns, partial(ring.gather_neighbours, chunk), window)
                    del layer, modulation  # no variable may outlive the group and keep a layer
                    offload.transfer.throttle()
                    progress(len(blocks))
                if group.stop == layers.stop:
                    give(chunk, h)
                else:
                    states.store(blocks, h)
            del steps  # weights of this group make room before those of another are fetched

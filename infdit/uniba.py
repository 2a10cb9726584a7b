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
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import BlockGrid, Geometry
from .rotary import rotary_turns, rotate

if TYPE_CHECKING:
    from .config import InfDiTConfig
    from .memory.offload import Offloader
    from .model import InfDiT, MakeWindow

LANDINGS = 3
READ = [1, 3, 2, 0]  # slots in the order in which their blocks are read: as they came, the oldest first


class Chunk:
    """A chunk of blocks at hand: what every layer needs to know of it, computed once.

    Attributes:
        blocks: indices in the order of the sweep; areas: where they lie.
        turns: (n, T, d/2) rotary positions of their tokens, on the device.
        inside: (n, 3, 3), which of the blocks around each lie in the picture, on the device.
        neighbours: for each place in READ the indices of the blocks that they attend to; pairs: places of two blocks
            that follow each other in a line; own, slices: see `KVRing`.
        shifted: (block of the chunk, place in READ) of keys that lie in another frame than their reader's, and
            (1, d/2), on the device, what moves them there.
    """

    def __init__(self, geometry: Geometry, blocks: range, offload: Offloader, model: InfDiT) -> None:
        grid, transfer = geometry.grid, offload.transfer
        head_dim, dtype = model.config.head_dim, torch.promote_types(model.dtype, torch.float32)
        self.blocks, indices = blocks, np.arange(blocks.start, blocks.stop)
        self.areas = grid.areas(blocks)
        rows, columns = geometry.token_positions(indices)
        self.turns = rotary_turns(transfer.to_device(rows), transfer.to_device(columns), head_dim, dtype)
        self.inside = transfer.to_device(grid.around(indices))
        neighbours = grid.neighbours(indices)
        self.neighbours = [neighbours[slot] for slot in READ]
        self.pairs = ((0, 1), (2, 3)) if grid.by_rows else ((0, 2), (1, 3))
        self.own: list[tuple[slice, slice]] = []
        self.slices: list[tuple[slice, slice, slice]] = []
        self.shifted: list[tuple[int, int, Tensor]] = []
        shifts = geometry.frame_shifts(indices)[:, READ]
        which = np.argwhere(shifts.any(-1)).tolist()
        if which:
            rows, columns = transfer.to_device(shifts[shifts.any(-1)])[..., None].unbind(1)  # (m, 1) each
            turns = rotary_turns(rows, columns, head_dim, dtype)
            self.shifted = [(n, place, turn) for (n, place), turn in zip(which, turns.unbind(), strict=True)]


# tokens (B, n, T, D) of a chunk, and for the first layer what makes those of the low-resolution picture
Take = Callable[[Chunk], "tuple[Tensor, MakeWindow | None]"]
Give = Callable[[Chunk, Tensor], None]


class KVRing:
    """Keys and values of one layer for the last C + 1 blocks and the chunk at hand: block i lies at i modulo size.

    Blocks of a chunk follow each other, and so mostly do their neighbours: the ring is written and read by slices, two
    neighbours at a time where one comes after the other.
    """

    def __init__(self, size: int) -> None:
        """size: blocks that it holds: a line of them, one more, and a chunk."""
        self._size = size
        self.kept: Tensor | None = None  # (2, B, size, T, H, d), keys and values

    def take(self, like: Tensor, shape: tuple[int, ...]) -> None:
        """Take memory for (B, T, H, d) of each block, of the dtype and on the device of a tensor."""
        if self.kept is None:
            self.kept = like.new_empty((2, shape[0], self._size, *shape[1:]))

    def keep(
        self, chunk: Chunk, k: Tensor, x: Tensor, weight: Tensor, bias: Tensor
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Keep the keys and values of a chunk; what is given finds those that it attends to, see `KeepNeighbours`.

        Values are computed where they are kept, unless that is around the end of the ring: there each chunk is parted
        at another place, and for each length of a product a library may keep a kernel of megabytes.
        """
        if k.requires_grad:  # of the whole grid at once, which is differentiable
            return partial(self._find, chunk, k, F.linear(x, weight, bias).view(k.shape))
        self.take(x, (len(k), *k.shape[2:]))
        assert self.kept is not None, "taken"
        (keys, values), own = self.kept, self._own(chunk)
        for here, there in own:
            keys[:, there] = k[:, here]
        if own[1:]:
            v = F.linear(x, weight, bias).view(k.shape)
            for here, there in own:
                values[:, there] = v[:, here]
        else:
            for tokens, room in zip(x, values[:, own[0][1]], strict=True):
                torch.addmm(bias, tokens.flatten(0, 1), weight.t(), out=room.flatten(0, 1).flatten(1))
        return partial(self._find, chunk, keys, values)

    def _find(self, chunk: Chunk, k: Tensor, v: Tensor, slot_embed: Tensor) -> tuple[Tensor, Tensor]:
        added = torch.stack([slot_embed[slot] for slot in READ])
        keys, values = self._gather(chunk, k, added), self._gather(chunk, v)
        for block, place, turn in chunk.shifted:
            there = int(chunk.neighbours[place][block]) % self._size
            keys[:, block, place] = rotate(k[:, there], turn).to(k.dtype).add_(added[place])
        return keys, values

    def _gather(self, chunk: Chunk, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Of blocks (B, size or all, T, H, d) those that the chunk's attend to, (B, n, 4, T, H, d), and what is added.

        added: (4, H, d), to all tokens of each of the four.
        """
        if x.requires_grad:
            found = torch.stack([x[:, indices.tolist()] for indices in chunk.neighbours], 2)
            return found if added is None else found.add_(added[:, None])
        found = x.new_empty((len(x), len(chunk.blocks), len(READ), *x.shape[2:]))
        for places, here, there in self._slices(chunk):
            width = there.stop - there.start - (here.stop - here.start) + 1  # of a window: two blocks, or one for both
            read = x[:, there].unfold(1, width, 1).movedim(-1, 2)
            if added is None:
                found[:, here, places] = read
            else:
                torch.add(read, added[places][:, None], out=found[:, here, places])
        return found

    def _own(self, chunk: Chunk) -> list[tuple[slice, slice]]:
        """Blocks of the chunk, and where they are kept: the same for all layers, whose rings are of one size."""
        chunk.own = chunk.own or list(_runs(chunk.neighbours[-1] % self._size))
        return chunk.own

    def _slices(self, chunk: Chunk) -> list[tuple[slice, slice, slice]]:
        """Places in READ, one or two, blocks of the chunk, and where those are kept that they attend to there.

        Those of two places are one block more, of which each block attends to two that follow each other, or as many,
        of which it attends to one in both.
        """
        if not chunk.slices:
            at = [indices % self._size for indices in chunk.neighbours]
            chunk.slices = [found for a, b in chunk.pairs for found in _in_pairs((a, b), at[a], at[b])]
        return chunk.slices


def _runs(*numbers: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Stretches in which numbers go up by one, of several those in which all do: where they stand, and the first's."""
    ends = np.flatnonzero(np.any([np.diff(given) != 1 for given in numbers], 0)) + 1
    for begin, end in pairwise((0, *ends.tolist(), len(numbers[0]))):
        there = int(numbers[0][begin])
        yield slice(begin, end), slice(there, there + end - begin)


def _in_pairs(pair: tuple[int, int], before: np.ndarray, after: np.ndarray) -> Iterator[tuple[slice, slice, slice]]:
    """What `KVRing` reads by slices for two places, from where the blocks are kept that each attends to there."""
    first, second = pair
    for here, there in _runs(before, after):
        step = int(after[here.start]) - there.start
        if step in (0, 1):
            yield slice(first, second + 1, second - first), here, slice(there.start, there.stop + step)
        else:  # one was kept at the end of the ring, the other at its beginning
            yield slice(first, first + 1), here, there
            yield slice(second, second + 1), here, slice(there.start + step, there.stop + step)


class Workbench:
    """What one device works with from chunk to chunk and from evaluation to evaluation: taken once.

    Rings of keys and values, hidden states between groups of layers, and room for the chunk at hand. That room is held
    as one piece while nobody works there: an allocator that gave parts of it to others would have to take it anew.

    Attributes:
        landings: where tokens of a chunk come to from another device, in turn, and are changed in place: one chunk that
            waits, one at hand, one that may still be read while it leaves. None on a CPU.
    """

    def __init__(self, config: InfDiTConfig, layers: range, grid: BlockGrid, batch: int, offload: Offloader) -> None:
        """layers: which of the model's; grid: of the picture; batch: pictures at a time."""
        plan = offload.plan
        self.layers, self.offload, self.states = layers, offload, offload.hidden_states(grid.blocks)
        self.chunks = list(grid.chunks(plan.chunk))
        self.groups = [layers[first : first + plan.group] for first in range(0, len(layers), plan.group)]
        size = min(grid.line + 1 + plan.chunk, grid.blocks)
        # a layer that has all blocks at once needs nothing of what it kept when it is done
        self.rings = [KVRing(size) for _ in self.groups[0][: 1 if len(self.chunks) == 1 else None]]
        self.rings *= len(self.groups[0]) // len(self.rings)
        self.landings: list[Tensor] = []
        self._config, self._batch = config, batch
        self._room: Tensor | None = None

    def take(self, like: Tensor) -> None:
        """Take what stays, of the dtype and on the device of a tensor."""
        T, D, H, d = (getattr(self._config, n) for n in ("block_tokens", "hidden_size", "num_heads", "head_dim"))
        for ring in self.rings:
            ring.take(like, (self._batch, T, H, d))
        if len(self.groups) > 1:
            self.states.take(like, (self._batch, len(self.chunks[0]), T, D))
        if self.layers.start and like.device.type != "cpu" and not self.landings:
            self.landings = [like.new_empty(self._batch * len(self.chunks[0]) * T * D) for _ in range(LANDINGS)]

    def clear(self) -> None:
        """Begin to work: a chunk may take the room."""
        if self._room is None:
            self.tidy()
        self._room = None

    def tidy(self) -> None:
        """The work is done: the room is one piece again."""
        self._room = self.offload.room(self._batch)

    def give_back(self) -> None:
        """Keep nothing any more, whoever holds a reference to this."""
        self.states.give_back()
        self._room, self.landings = None, []
        for ring in self.rings:
            ring.kept = None


def sweep(
    model: InfDiT, bench: Workbench, geometry: Geometry, modulations: Sequence[Tensor], take: Take, give: Give,
    progress: Callable[[int], None], prepare: Callable[[range], None] = lambda blocks: None,
) -> None:
    """Consecutive layers over a whole grid of blocks.

    Args:
        model: the weights; those of the bench's layers on the host if the plan streams them, others on the device.
        bench: which layers, in groups; blocks in chunks; what is kept where.
        geometry: grid and positions.
        modulations: of these layers, see `InfDiT.modulations_for`.
        take: gives the tokens of the chunk at hand before the first of these layers, give: takes them after the last,
            both on the device.
        progress: is told the number of blocks after each layer; an exception that it raises ends the sweep.
        prepare: is told which blocks will be taken next, once the device has work to do.
    """
    layers, offload, states = bench.layers, bench.offload, bench.states
    differentiated = modulations[0].requires_grad  # then every tensor stays, and none is used again
    if not differentiated:
        bench.take(modulations[0])
    streamed = offload.ready([model.layers[i] for i in group] for group in bench.groups)
    with closing(streamed) as ready:
        for group in bench.groups:
            own = [modulations[i - layers.start] for i in group]
            steps = list(zip(next(ready), own, bench.rings[: len(group)], strict=True))
            if group.start == layers.start and not differentiated:
                bench.clear()
            for blocks, following in zip(bench.chunks, [*bench.chunks[1:], None], strict=True):
                chunk = Chunk(geometry, blocks, offload, model)
                h, window = take(chunk) if group.start == layers.start else (states.load(blocks, following), None)
                for number in range(len(steps)):
                    layer, modulation, ring = steps[number]
                    h = layer(h, modulation, chunk.turns, partial(ring.keep, chunk), window)
                    del layer, modulation  # no variable may outlive the group and keep a layer
                    if number == 0 and group.start == layers.start and following is not None:
                        prepare(following)
                    offload.transfer.throttle()
                    progress(len(blocks))
                if group.stop == layers.stop:
                    give(chunk, h)
                else:
                    states.store(blocks, h)
                del chunk, h, window
            del steps  # weights of this group make room before those of another are fetched
    offload.transfer.settle()
    if not differentiated:
        bench.tidy()

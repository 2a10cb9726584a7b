"""Unidirectional Block Attention (Inf-DiT, section 3.2): the one loop over layers and blocks.

Within a layer a block needs only its neighbours' *inputs* of that layer, and its neighbours come before it in raster
order. So the loops over layers and over blocks may be exchanged freely:

    for each group of layers:  for each chunk of blocks:  for each layer of the group

and all that a layer keeps from chunk to chunk is a ring of keys and values of the last C + 1 blocks. Between groups
the hidden states of all blocks are kept. The result is the same for every group and chunk, up to rounding.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .config import InfDiTConfig
from .grid import BlockGrid, Place
from .memory import MemoryPlan, WeightsKept
from .model import InfDiT, rotary_angles, rotate
from .tiers import Fetch, HostMemory, Lane, Tier

Positions = Literal["continuous", "wrapped"]
# blocks at (row, column) → their pixels (B, n, 6, h, w) and windows of the low-resolution picture (B, n, 3, w, w)
Read = Callable[[Sequence[Place]], tuple[Tensor, Tensor]]
Call = Callable[..., Tensor]
Write = Callable[[Sequence[Place], Tensor], None]  # blocks at (row, column) and their pixels (B, n, 3, h, w)
Skip = Callable[[range, range], bool]  # (layers, blocks): whether to leave a chunk out


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

    def __init__(self, geometry: Geometry, blocks: range, lane: Lane, dtype: torch.dtype) -> None:
        grid, head_dim = geometry.grid, geometry.config.head_dim
        self.blocks = blocks
        self.places = [grid.place(i) for i in blocks]
        rows, columns = geometry.token_positions(self.places)
        self.angles = rotary_angles(lane.upload(rows), lane.upload(columns), head_dim, dtype)
        self.own = lane.upload(list(blocks))
        self.neighbours = lane.upload([n for i in blocks for n in grid.neighbours(i)])
        self.turns: dict[int, Tensor] = {}
        for slot, shifts in enumerate(zip(*(geometry.frame_shifts(i) for i in blocks), strict=True)):
            if any(shift != (0, 0) for shift in shifts):
                shift_rows, shift_columns = lane.upload(shifts)[..., None].unbind(1)  # (n, 1) each
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
        keys = keys.index_select(1, slots).unflatten(1, (-1, 4))
        for slot, turn in visit.turns.items():  # before the values are there: turning takes room of its own
            keys[:, :, slot] = rotate(keys[:, :, slot], turn)
        return keys, values.index_select(1, slots).unflatten(1, (-1, 4))


class HiddenStates:
    """Tokens of all blocks between two groups of layers: kept on the device, or on the host and fetched ahead."""

    def __init__(self, lane: Lane, place: Tier) -> None:
        self._lane, self._place = lane, place
        self._host: HostMemory | None = None
        self._kept: dict[range, Tensor] = {}
        self._ahead: dict[range, Fetch] = {}

    def put(self, blocks: range, h: Tensor) -> None:
        """Keep the tokens (B, n, T, D) of a chunk until the next group."""
        if self._place == "device":
            self._kept[blocks] = h
            return
        if blocks not in self._kept:
            self._kept[blocks] = self._host_empty(h.shape, h.dtype)
        self._lane.store(h, self._kept[blocks])

    def take(self, blocks: range, following: range | None) -> Tensor:
        """The tokens of a chunk; those of the following one set off meanwhile."""
        if self._place == "device":
            return self._kept.pop(blocks)
        self._prefetch(blocks)
        (h,) = self._ahead.pop(blocks).wait()
        if following is not None:
            self._prefetch(following)
        return h

    def reserve(self, blocks: range, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Take the room of a chunk that is not computed."""
        make = self._lane.empty if self._place == "device" else self._host_empty
        self._kept[blocks] = make(shape, dtype)

    def forget(self, blocks: range, last: bool) -> None:
        """Do without a chunk that was to be taken; in the last group what is on the device makes room."""
        self._ahead.pop(blocks, None)
        if last and self._place == "device":
            del self._kept[blocks]

    def _host_empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._host = self._host or self._lane.host(math.prod(shape) * dtype.itemsize)
        return self._host.empty(shape, dtype)

    def _prefetch(self, blocks: range) -> None:
        if blocks not in self._ahead:
            self._ahead[blocks] = self._lane.fetch([self._kept[blocks]])


def streams(plan: MemoryPlan, name: str) -> bool:
    """Whether the parameter of this name stays on the host and is fetched when it is needed."""
    return plan.weights == "streamed" and name.startswith(("layers.", "modulations."))


def place(model: InfDiT, plan: MemoryPlan, device: torch.device) -> InfDiT:
    """The model with its parameters where a plan wants them: all on the device, or layers and modulations on the host.

    Parameters that are there already are shared; if all are, this is the model itself.
    """
    if _placed.get(model) == (plan.weights, device):
        return model
    parameters = dict(model.named_parameters())
    host = Lane(device).host(max(tensor.numel() * tensor.itemsize for tensor in parameters.values()))

    def wanted(name: str, tensor: Tensor) -> Tensor:
        if not streams(plan, name):
            return tensor.to(device)
        if device.type == "cpu" or tensor.is_pinned():
            return tensor.to("cpu")
        return host.empty(tensor.shape, tensor.dtype).copy_(tensor)

    state = {name: wanted(name, parameter) for name, parameter in parameters.items()}
    if all(state[name] is parameter for name, parameter in parameters.items()):
        return model
    with torch.device("meta"):
        placed = InfDiT(model.config, model.defaults)
    placed.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, assign=True)
    _placed[placed] = plan.weights, device
    return placed.requires_grad_(False).eval()


_placed: WeakKeyDictionary[InfDiT, tuple[WeightsKept, torch.device]] = WeakKeyDictionary()  # what `place` has made


def callables(groups: Iterable[Sequence[nn.Module]], plan: MemoryPlan, lane: Lane) -> Iterator[list[Call]]:
    """Modules by groups, ready to be called on the device: as they are, or with weights fetched one group ahead."""
    if plan.weights == "resident":
        yield from (list(group) for group in groups)
        return
    ahead: deque[list[tuple[nn.Module, Fetch]]] = deque()
    for group in groups:
        ahead.append([(module, lane.fetch(list(module.parameters()))) for module in group])
        if len(ahead) == 2:
            yield [partial(_call_with, module, fetch.wait()) for module, fetch in ahead.popleft()]
    yield [partial(_call_with, module, fetch.wait()) for module, fetch in ahead.popleft()]


def _call_with(module: nn.Module, parameters: list[Tensor], *inputs: object) -> Tensor:
    names = (name for name, _ in module.named_parameters())
    return functional_call(module, dict(zip(names, parameters, strict=True)), inputs)


def sweep(
    model: InfDiT,
    geometry: Geometry,
    plan: MemoryPlan,
    lane: Lane,
    modulations: tuple[Sequence[Tensor], Tensor],
    read: Read,
    write: Write,
    progress: Callable[[int], None] | None = None,
    skip: Skip | None = None,
) -> None:
    """One evaluation of the network over a whole grid of blocks.

    Args:
        model: the weights; those of `layers` on the host if the plan streams them, all others on the lane's device.
        geometry: grid and positions.
        plan: layers in groups, blocks in chunks, what is kept where.
        modulations: of the layers and of the head, see `InfDiT.modulations_for`.
        read: gives the input of the blocks at hand; write: takes their result; both on the device.
        progress: told the number of blocks after each layer; an exception that it raises ends the sweep.
        skip: what is not computed, when only memory is of interest: hidden states then hold anything.
    """
    layer_modulations, head_modulation = modulations
    grid, depth = geometry.grid, len(model.layers)
    states = HiddenStates(lane, plan.hidden)
    chunks = list(grid.chunks(plan.chunk))
    groups = [range(first, min(first + plan.group, depth)) for first in range(0, depth, plan.group)]
    ready = callables(([model.layers[i] for i in group] for group in groups), plan, lane)
    for group in groups:
        steps = [
            (layer, layer_modulations[i], KVRing(grid, plan.chunk)) for i, layer in zip(group, next(ready), strict=True)
        ]
        for blocks, following in zip(chunks, [*chunks[1:], None], strict=True):
            if skip is not None and skip(group, blocks):
                if group.start > 0:
                    states.forget(blocks, last=group.stop == depth)
                elif group.stop < depth:
                    shape = len(head_modulation[0]), len(blocks), model.config.block_tokens, model.config.hidden_size
                    states.reserve(blocks, shape, model.dtype)
                continue
            visit = Visit(geometry, blocks, lane, torch.promote_types(model.dtype, torch.float32))
            window = None
            if group.start == 0:
                pixels, lr = read(visit.places)
                h, window = model.embed(pixels), model.embed_lr(lr, lane.upload(inside(grid, visit.places)))
                del pixels, lr
            else:
                h = states.take(blocks, following)
            for number in range(len(steps)):  # by number: no variable may outlive the group and keep a layer
                h = _advance(h, steps[number], visit, window)
                lane.pace()
                if progress is not None:
                    progress(len(blocks))
            if group.stop == depth:
                write(visit.places, model.unembed(h, head_modulation))
            else:
                states.put(blocks, h)
        del steps  # weights and rings of this group make room before those of another are fetched
        lane.drain()


def _advance(h: Tensor, step: tuple[Call, Tensor, KVRing], visit: Visit, window: Tensor | None) -> Tensor:
    layer, modulation, ring = step
    return layer(h, modulation, visit.angles, partial(ring.share, visit), window)


def inside(grid: BlockGrid, places: Sequence[Place]) -> list[list[list[bool]]]:
    """(n, 3, 3): which of the 3×3 blocks around each place lie in the picture."""
    near = (-1, 0, 1)
    return [
        [[0 <= row + r < grid.rows and 0 <= column + c < grid.columns for c in near] for r in near]
        for row, column in places
    ]


def cut_windows(lr: Tensor, places: Sequence[Place], size: int) -> Tensor:
    """The 3×3 blocks of `size` pixels of `lr` around each place, (B, n, 3, w, w); zeros outside."""
    windows: list[Tensor] = []
    for row, column in places:
        above, before = (1 - min(row, 1)) * size, (1 - min(column, 1)) * size  # pixels that lie outside
        top, left = (row - 1) * size + above, (column - 1) * size + before
        cut = lr[..., top : (row + 2) * size, left : (column + 2) * size]
        padding = (before, 3 * size - before - cut.shape[-1], above, 3 * size - above - cut.shape[-2])
        windows.append(F.pad(cut, padding))
    return torch.stack(windows, 1)

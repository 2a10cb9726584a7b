"""PyTorch's caching allocator for CUDA as a model: what a card must have free for a run, not what its tensors sum to.

After c10/cuda/CUDACachingAllocator.cpp with its default options: sizes are rounded to 512 bytes; up to 1 MiB comes from
segments of 2 MiB, up to 10 MiB from segments of 20 MiB, more from a segment of its own, rounded to 2 MiB. A request
takes the smallest free block that is large enough and leaves the rest, neighbours that are free become one, and when
the driver has no more, segments that are free altogether are given back to it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20
ROUND, SMALL, SMALL_SEGMENT, LARGE_SEGMENT, OWN_SEGMENT, OWN_ROUND = 512, MIB, 2 * MIB, 20 * MIB, 10 * MIB, 2 * MIB
Event = tuple[int, int]  # name of a storage, its bytes when it is made, −1 when it is freed


@dataclass(eq=False)
class _Block:
    """A piece of a segment; `before` and `after` are its neighbours there."""

    size: int
    small: bool
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None
    number: int = 0


class Full(Exception):  # noqa: N818 - a state, not a fault
    """The limit does not suffice."""


class Allocator:
    """One stream's pools of memory.

    Attributes:
        limit: bytes that the driver has.
        reserved: bytes taken from it, peak: at most.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit, self.reserved, self.peak = limit, 0, 0
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._made = 0

    def allocate(self, size: int) -> _Block:
        """A block of so many bytes.

        Raises:
            Full: there is none.
        """
        size = max(ROUND, -(-size // ROUND) * ROUND)
        small = size <= SMALL
        pool = self._free[small]
        at = bisect_left(pool, (size, -1))
        block = pool.pop(at)[2] if at < len(pool) else self._segment(size, small)
        block.free = False
        rest = block.size - size
        if rest >= ROUND if small else rest > SMALL:
            tail = _Block(rest, small, before=block, after=block.after)
            if tail.after is not None:
                tail.after.before = tail
            block.size, block.after = size, tail
            self._keep(tail)
        return block

    def release(self, block: _Block) -> None:
        """Take a block back, and join it with what is free beside it."""
        block.free = True
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._forget(other)
                block.size += other.size
                if other is block.before:
                    block.before = other.before
                    if block.before is not None:
                        block.before.after = block
                else:
                    block.after = other.after
                    if block.after is not None:
                        block.after.before = block
        self._keep(block)

    def _segment(self, size: int, small: bool) -> _Block:
        own = -(-size // OWN_ROUND) * OWN_ROUND
        segment = SMALL_SEGMENT if small else LARGE_SEGMENT if size < OWN_SEGMENT else own
        if self.reserved + segment > self.limit:
            self._give_back()
        if self.reserved + segment > self.limit:
            raise Full
        self.reserved += segment
        self.peak = max(self.peak, self.reserved)
        return _Block(segment, small)

    def _give_back(self) -> None:
        for pool in self._free.values():
            for _, _, block in list(pool):
                if block.before is None and block.after is None:
                    self._forget(block)
                    self.reserved -= block.size

    def _keep(self, block: _Block) -> None:
        self._made += 1
        block.number = self._made
        insort(self._free[block.small], (block.size, block.number, block))

    def _forget(self, block: _Block) -> None:
        pool = self._free[block.small]
        pool.pop(bisect_left(pool, (block.size, block.number)))


def works(events: Sequence[Event], limit: float) -> bool:
    """Whether a run whose tensors come and go like this gets along with so many bytes."""
    allocator, held = Allocator(limit), {}
    try:
        for name, size in events:
            if size < 0:
                allocator.release(held.pop(name))
            else:
                held[name] = allocator.allocate(size)
    except Full:
        return False
    return True


def least_limit(events: Sequence[Event], step: int = 2 * MIB) -> int:
    """The least number of bytes with which it does, and with `step` less it does not."""
    low, high = 0, sum(size for _, size in events if size > 0) + 40 * MIB
    while high - low > step:
        middle = (low + high) // 2
        low, high = (low, middle) if works(events, middle) else (middle, high)
    return high

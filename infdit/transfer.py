"""Two tiers of memory, device and host, and the transfers between them.

On CUDA weights and hidden states on the host are pinned and their copies run beside the arithmetic, on a stream of
their own; pictures are copied when a chunk of them is needed, and the arithmetic waits. Elsewhere a copy
is a plain copy; on a CPU the two tiers are one memory and every plan stays legal. So that a meter can still tell them
apart, what belongs to a tier is made under `tier(...)`; what is computed from host tensors is on the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Tier = Literal["device", "host"]
ALIGNMENT = 512  # bytes, at which pieces of a slab begin
_tier: ContextVar[Tier | None] = ContextVar("tier", default=None)


@contextmanager
def tier(name: Tier) -> Iterator[None]:
    """Tensors made inside belong to this tier: a label for meters, without effect on the tensors."""
    token = _tier.set(name)
    try:
        yield
    finally:
        _tier.reset(token)


def current_tier() -> Tier | None:
    """The tier whose tensors are being made, or None where it follows from their inputs."""
    return _tier.get()


class Transfer:
    """Copies between the host and one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = _copy_stream(device) if device.type == "cuda" else None
        self._last: torch.cuda.Event | None = None

    def host(self, piece: int) -> HostMemory:
        """Memory of the host that the device can reach quickly, for tensors of at most about `piece` bytes."""
        return HostMemory(piece, self.device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the device."""
        with tier("device"):
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def to_device(self, numbers: Sequence[object]) -> Tensor:
        """Nested numbers as a tensor on the device, without waiting for what the device is doing."""
        tensor = torch.tensor(numbers)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self._stream else tensor.to(self.device)

    def copy_to_device(self, tensors: Sequence[Tensor]) -> PendingCopy:
        """Begin to copy tensors from the host to the device."""
        with tier("device"):
            if self._stream is None:
                return PendingCopy([tensor.to(self.device, copy=True) for tensor in tensors])
            # not before the arithmetic that is queued now: what it writes may be what is fetched
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
            return PendingCopy(copies, arrived)

    def copy_to_host(self, source: Tensor, target: Tensor) -> None:
        """Begin to copy a tensor of the device, all of whose arithmetic is queued, into one of the host."""
        if self._stream is None:
            target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._stream)

    def throttle(self) -> None:
        """After each layer of a chunk, wait until the device has done the one before: bar and stop tell the truth."""
        if self._stream is not None:
            if self._last is not None:
                self._last.synchronize()
            self._last = torch.cuda.Event()
            self._last.record(torch.cuda.current_stream(self.device))

    def synchronize(self) -> None:
        """Wait until the device has done all that is queued: what was freed can then be used again."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).synchronize()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runs: the allocator keeps a pool of memory for every stream."""
    return torch.cuda.Stream(device)


class HostMemory:
    """Tensors on the host; beside an accelerator they are cut from pinned slabs.

    PyTorch rounds every pinned allocation up to a power of two. A slab is one, and holds eight pieces or more: what is
    lost is an eighth at most.
    """

    def __init__(self, piece: int, device: torch.device) -> None:
        self._slab_bytes, self._pinned = slab_bytes(piece), device.type == "cuda"
        self._cut = device.type not in ("cpu", "mps")
        self._slab: Tensor | None = None
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape; it keeps its slab alive."""
        with tier("host"):
            if not self._cut:
                return torch.empty(tuple(shape), dtype=dtype)
            size = math.prod(shape) * dtype.itemsize
            if self._slab is None or self._used + size > len(self._slab):
                self._slab = torch.empty(max(size, self._slab_bytes), dtype=torch.uint8, pin_memory=self._pinned)
                self._used = 0
            piece = self._slab[self._used : self._used + size].view(dtype).view(tuple(shape))
            self._used += -(-size // ALIGNMENT) * ALIGNMENT
            return piece


def slab_bytes(piece: int) -> int:
    """The power of two that holds at least eight pieces."""
    return 2 ** math.ceil(math.log2(8 * max(piece, ALIGNMENT)))


class PendingCopy:
    """Copies under way to the device."""

    def __init__(self, tensors: list[Tensor], event: torch.cuda.Event | None = None) -> None:
        self._tensors, self._event = tensors, event

    def wait(self) -> list[Tensor]:
        """The copies; arithmetic that is queued from now on sees them whole."""
        if self._event is not None:
            compute = torch.cuda.current_stream(self._tensors[0].device)
            compute.wait_event(self._event)
            for tensor in self._tensors:
                tensor.record_stream(compute)
        return self._tensors

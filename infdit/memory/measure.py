"""What a device does in a second, measured once a process: products of two matrices and a copy, about 10 ms.

And what a process holds, which on a CPU is all that can be measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import psutil
import torch

from ..device import empty_pinned_cache

LONG = 1.5e-3  # seconds of a product, beside which starting it is little
SIDES = (256, 512, 1024, 2048, 4096)  # of the matrices: the first that takes so long tells
COPIED = 2**25  # bytes


@dataclass(frozen=True)
class Speed:
    """Of a device in a dtype.

    Attributes:
        flops: floating-point operations a second of a product of large matrices.
        bus: bytes a second from the host, from pinned memory where it can be had; None where they are one memory.
        locking: bytes of main memory that are pinned in a second; None where none are.
    """

    flops: float
    bus: float | None = None
    locking: float | None = None


@cache
def measured(device: torch.device, dtype: torch.dtype) -> Speed | None:
    """What a device does now; None where there is none of its kind, or no memory left on it."""
    try:
        speed = Speed(_flops(device, dtype), *_bus(device))
        if device.type != "cpu":
            getattr(torch, device.type).empty_cache()
            empty_pinned_cache(device)
    except (RuntimeError, AssertionError, AttributeError, ImportError):
        return None
    return speed


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    found = 0.0
    for side in SIDES:
        a = torch.ones((side, side), device=device, dtype=dtype)
        seconds = _seconds(device, lambda a=a: a @ a)
        found = 2 * side**3 / seconds
        if seconds > LONG:
            break
    return found


def _bus(device: torch.device) -> tuple[float | None, float | None]:
    if device.type in ("cpu", "mps"):
        return None, None
    source, locking = torch.ones(COPIED, dtype=torch.uint8, device="cpu"), None
    if device.type == "cuda":
        began = time.perf_counter()
        try:
            source = torch.empty(COPIED, dtype=torch.uint8, device="cpu", pin_memory=True)
            locking = COPIED / (time.perf_counter() - began)
        except RuntimeError:
            pass  # a plain copy tells enough
    target = torch.empty_like(source, device=device)
    return COPIED / _seconds(device, lambda: target.copy_(source, non_blocking=True)), locking


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The shorter of two, after one that is not counted."""
    taken: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        card = getattr(torch, device.type)
        card.synchronize(*([device] if device.type in ("cuda", "xpu") else []))  # which without it is the current one
        taken.append(time.perf_counter() - began)
    return max(min(taken[1:]), 1e-9)


class Held:
    """Bytes of main memory that this process holds beyond what it held at first, and that no file holds too."""

    EVERY = 0.02  # seconds: looking takes some microseconds

    def __init__(self) -> None:
        self._process, self._next = psutil.Process(), 0.0
        self._first = self._most = self._now()

    def look(self) -> None:
        """See whether it is more than ever."""
        now = time.monotonic()
        if now >= self._next:
            self._next, self._most = now + self.EVERY, max(self._most, self._now())

    def most(self) -> int:
        """At most, as far as it was seen."""
        self._next = 0.0
        self.look()
        return self._most - self._first

    def _now(self) -> int:
        found = self._process.memory_info()
        return found.rss - getattr(found, "shared", 0)  # of Linux: mapped files

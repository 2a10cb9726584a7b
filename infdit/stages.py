"""Several devices on one evaluation: consecutive layers on each, and chunks of blocks go from one to the next.

A layer needs of a chunk what the layer before made of it, and of earlier chunks what it keeps itself. So a device holds
the weights and the keys and values of its own layers only, and works on a chunk while the one before it works on the
next. What is computed is the same in every bit as on one device of that kind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import cycle
from queue import Empty, Queue
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .device import DeviceFailed, PinFailed, out_of_memory

if TYPE_CHECKING:
    from .memory.offload import Transfer
    from .memory.plan import MemoryPlan

Progress = Callable[[int], None]
Stage = Callable[[Progress], None]  # works through all chunks; says after each layer how many blocks are done
COURIER = "infdit courier"  # name of a thread that waits for other processes, see `ranks`
TICK = 0.05  # seconds after which whoever waits looks whether the others go on


class Elsewhere(Protocol):
    """Other processes that have some of the layers, see `ranks`: a handover to the next of them, and from the last."""

    rank: int

    def begin(self, plan: MemoryPlan, shape: Sequence[int], vector: Tensor | None, levels: Sequence[float]) -> None:
        """Say what evaluations are of from now on: pictures (B, 3, h, w), their CLIP vectors, noise levels foreseen."""

    def evaluate(self, sigma: Tensor, level: float | None) -> None:
        """Begin an evaluation; arguments as those of `Denoiser.pass_on`."""

    def expect(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, landings: Sequence[Tensor]
    ) -> None:
        """Begin to receive tokens of these shapes, one after the other; landings: see `Workbench`."""

    def give(self, h: Tensor, look: Progress) -> None:
        """Send tokens on as soon as those before have gone; look: see `Handover`."""

    def take(self, look: Progress) -> Tensor:
        """The tokens that come next; look: see `Handover`."""
        ...


class _LeftAlone(Exception):  # noqa: N818 - no error of anybody's
    """Another stage has failed, or was stopped."""


class Handover:
    """Tokens of chunks on their way from one device to the next: one chunk at most is there before it is wanted."""

    def __init__(self, transfer: Transfer, device: torch.device, landings: Sequence[Tensor]) -> None:
        """transfer: of the device that they come from; landings: see `Workbench`."""
        self._transfer, self._device, self._landings = transfer, device, cycle(landings)
        self._room, self._there = threading.Semaphore(1), Queue()

    def give(self, h: Tensor, look: Progress) -> None:
        """Hand tokens on as soon as there is room; look: is called with 0 meanwhile, and may raise."""
        while not self._room.acquire(timeout=TICK):
            look(0)
        self._there.put(self._transfer.hand_on(h, self._device, next(self._landings, None)))

    def take(self, look: Progress) -> Tensor:
        """The tokens that were given next."""
        while True:
            try:
                coming = self._there.get(timeout=TICK)
            except Empty:
                look(0)
                continue
            self._room.release()
            return coming.wait()[0]


class Stops:
    """Errors that whoever watches a run has raised, to end it: no device has failed."""

    def __init__(self) -> None:
        self._last = 0  # its id alone: an error would keep what the run held

    def __contains__(self, error: BaseException) -> bool:
        return id(error) == self._last

    def noting(self, told: Callable[..., None]) -> Callable[..., None]:
        """The same function; what it raises is known from then on."""

        def tell(*what: object) -> None:
            try:
                told(*what)
            except BaseException as error:
                self._last = id(error)
                raise

        return tell


class Belt:
    """Stages that work at the same time, each in a thread, the last in the caller's: bar and stop stay there.

    One that fails ends them all; so does a stop.
    """

    def __init__(self, progress: Progress, stops: Stops) -> None:
        """stops: knows an error that is no device's."""
        self._progress, self._stops = progress, stops
        self._ended, self._lock, self._done = threading.Event(), threading.Lock(), 0
        self._failure: BaseException | None = None

    def run(self, stages: Sequence[Stage], devices: Sequence[torch.device]) -> None:
        """Run all stages to their ends.

        Raises:
            DeviceFailed: a device failed, and not for want of memory.
            Anything else that a stage raises first; what `progress` raises.
        """
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        others = zip(stages[:-1], devices[:-1], strict=True)
        work = [
            threading.Thread(target=self._work, args=(*other, *modes), name=f"infdit on {other[1]}", daemon=True)
            for other in others
        ]
        for thread in work:
            thread.start()
        try:
            self._guarded(stages[-1], self._tell, devices[-1])
        finally:
            self._ended.set()
            for thread in work:
                thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # whose traceback has this frame: neither may keep the other, and what the attempt held
        self._tell(0)

    def _work(self, stage: Stage, device: torch.device, inference: bool, grad: bool) -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            self._guarded(stage, self._count, device)

    def _guarded(self, stage: Stage, progress: Progress, device: torch.device) -> None:
        """Run a stage; whatever it raises ends the others, and the first of all such is kept."""
        try:
            stage(progress)
        except _LeftAlone:
            pass
        except BaseException as error:  # noqa: BLE001 - the caller raises it again
            named = error
            said = isinstance(error, DeviceFailed | PinFailed) or error in self._stops
            if isinstance(error, RuntimeError) and not said and not out_of_memory(error):
                reason = str(error).partition("\n")[0]
                named = DeviceFailed(f"{device}, one of several devices, failed ({reason}): try without it")
                named.__cause__ = error
            with self._lock:
                self._failure = self._failure or named
            self._ended.set()

    def _count(self, done: int) -> None:
        """The progress of a thread: the caller hears of it."""
        if self._ended.is_set():
            raise _LeftAlone
        with self._lock:
            self._done += done

    def _tell(self, done: int) -> None:
        """The progress of the caller, for all."""
        if self._ended.is_set() and self._failure is not None:
            raise _LeftAlone
        with self._lock:
            done, self._done = done + self._done, 0
        self._progress(done)

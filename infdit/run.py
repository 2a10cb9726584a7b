"""Sampling that survives a device that fills up.

Memory can run out in a run that was planned well: another program took it. What the attempt held is then given back, a
smaller plan is made, and sampling goes on from the beginning of the step that was under way. The picture is the same.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

import torch
from torch import Tensor

from .denoiser import Conditioning, Denoiser
from .device import out_of_host_memory, out_of_memory
from .memory import MemoryPlan
from .model import InfDiT
from .planner import amount
from .samplers import Callback, Method, State
from .tiers import Tier
from .uniba import Skip, place

log = logging.getLogger(__name__)

HOST_FULL = (
    "the computer's own memory is full, not the graphics card's: close other programs, allow more on the card so that "
    "less is kept beside it, or make a smaller picture"
)


class OutOfMemory(MemoryError):  # noqa: N818 - as torch.cuda's
    """No smaller plan is left."""


@dataclass
class Report:
    """What a run did, filled in while it runs.

    Attributes:
        plan: that it began with, and after `replanned` that it ended with.
        replanned: a sentence for each time that memory ran out.
        seconds: of each step; one that was repeated may be there twice.
    """

    plan: MemoryPlan | None = None
    replanned: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass
class _Position:
    """Where a sampler stands at the beginning of a step: all that is needed to go on from there."""

    step: int
    x: Tensor
    last: Tensor | None = None  # denoised of the step before, for samplers that look back
    done: int = 0  # blocks

    def move(self, device: torch.device) -> None:
        self.x = self.x.to(device)
        self.last = None if self.last is None else self.last.to(device)


class Run:
    """Pictures sampled one after another under a plan that shrinks when it must.

    Args:
        model: as it was loaded; the plan says where its parameters go.
        plan: to begin with.
        device: that computes.
        smaller: makes a plan that takes less than the given one, or raises OutOfMemory.
        progress: told the number of blocks done in all after each layer of a chunk.
        report: is filled in.
        skip: see `uniba.sweep`.
    """

    def __init__(
        self,
        model: InfDiT,
        plan: MemoryPlan,
        device: torch.device,
        smaller: Callable[[MemoryPlan], MemoryPlan],
        progress: Callable[[int], None],
        report: Report,
        skip: Skip | None = None,
    ) -> None:
        self.plan, self.device = plan, device
        self._model, self._smaller, self._progress, self._skip = model, smaller, progress, skip
        self._placed: InfDiT | None = None
        self._report = report
        self._done = 0
        report.plan = plan

    @property
    def block_size(self) -> int:
        """Pixels: pictures are padded to whole blocks."""
        return self._model.config.block_size

    @property
    def keeps_grey(self) -> bool:
        """Whether a picture without colour must come back without any: a bridge invents nothing, colour neither."""
        return self._model.defaults.start_noise == 0

    @property
    def images(self) -> torch.device:
        """Where the pictures are while they are sampled."""
        return self.device if self.plan.images == "device" else torch.device("cpu")

    @property
    def around(self) -> Tier:
        """The tier of what lies around the sampling; on a CPU there is one memory, unless the plan says otherwise."""
        return "device" if self.device.type == "cpu" and self.plan.images == "device" else "host"

    def sample(
        self,
        conditioning: Conditioning,
        start: list[Tensor],
        sampler: Method,
        sigmas: Tensor,
        callback: Callback,
    ) -> Tensor:
        """Sample one picture.

        Args:
            conditioning: on `images`.
            start: x, (1, 3, h, w) on `images`; taken out of the list, so that it is let go of after the first step.
            sampler: one that cannot resume starts anew when memory has run out.
            sigmas: (n + 1,) noise levels.
            callback: see `samplers`.

        Raises:
            OutOfMemory: not even the smallest plan fits, or it is the host of an accelerator that is full: a smaller
                plan would take more of it.
        """
        position = _Position(0, start.pop(), done=self._done)
        while True:
            failure = ""
            try:
                return self._attempt(position, conditioning, sampler, sigmas, callback)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                # the error itself would keep all that the attempt held
                failure, on_the_host = str(error), out_of_host_memory(error)
            if on_the_host and self.device.type != "cpu":
                raise OutOfMemory(f"{HOST_FULL} ({failure.splitlines()[0] if failure else 'no reason given'})")
            self._make_room(failure, position, len(sigmas) - 1)
            position.move(self.images)
            conditioning = replace(
                conditioning,
                lr=conditioning.lr.to(self.images),
                lr_upscaled=conditioning.lr_upscaled.to(self.images),
            )

    def _attempt(
        self,
        position: _Position,
        conditioning: Conditioning,
        sampler: Method,
        sigmas: Tensor,
        callback: Callback,
    ) -> Tensor:
        self._placed = self._placed or place(self._model, self.plan, self.device)
        denoiser = Denoiser(
            self._placed, conditioning, self.plan, progress=self._advance, device=self.device, skip=self._skip
        )
        if not sampler.resumes:
            return sampler.sample(denoiser, position.x, sigmas, self._timed(callback))
        first, calls = position.step, count()
        denoised = position.last

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            step, repeated = divmod(next(calls), sampler.evaluations)
            if not repeated:
                position.step, position.x, position.last, position.done = first + step, x, denoised, self._done
            return denoiser(x, sigma)

        def evaluated(state: State) -> None:
            nonlocal denoised
            if sampler.looks_back:
                denoised = state["denoised"]
            callback(state)

        return sampler.sample(denoise, position.x, sigmas, self._timed(evaluated), start=first, last=position.last)

    def _timed(self, callback: Callback) -> Callback:
        """The callback, with the seconds since the step before noted in the report."""
        began = time.monotonic()

        def timed(state: State) -> None:
            nonlocal began
            now = time.monotonic()
            self._report.seconds.append(now - began)
            began = now
            callback(state)

        return timed

    def _advance(self, blocks: int) -> None:
        self._done += blocks
        self._progress(self._done)

    def _make_room(self, failure: str, position: _Position, steps: int) -> None:
        """Give back what the failed attempt held and make a smaller plan."""
        self._placed = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._done = position.done
        self._report.plan = self.plan = self._smaller(self.plan)
        message = (
            f"out of memory in step {position.step + 1} of {steps}: going on with a smaller plan of "
            f"{amount(self.plan.peak_bytes or 0)}; the picture is the same"
        )
        log.warning("%s (%s)", message, failure.splitlines()[0] if failure else "no reason given")
        self._report.replanned.append(message)


"""Evaluations that survive a device that fills up.

Memory can run out in a run that was planned well: another program took it. It does so within an evaluation. What the
attempt held is then given back, a smaller plan is made, and the same evaluation is done again: to the sampler, ours or
anybody's, it only took longer. The picture is the same.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .denoiser import Conditioning, Denoiser
from .device import out_of_host_memory, out_of_memory
from .memory import MemoryPlan
from .model import InfDiT
from .offload import distribute_weights
from .planner import amount
from .samplers import Denoise
from .transfer import Tier
from .uniba import Skip

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
        seconds: of each step.
    """

    plan: MemoryPlan | None = None
    replanned: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Run:
    """Evaluations for pictures that are sampled one after another, under a plan that shrinks when it must.

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
        """Whether what has no colour must come back without any: a bridge invents nothing, colour neither."""
        return self._model.defaults.start_noise == 0

    @property
    def images(self) -> torch.device:
        """Where the pictures are while they are sampled."""
        return self.device if self.plan.images == "device" else torch.device("cpu")

    @property
    def around(self) -> Tier:
        """The tier of what lies around the sampling; on a CPU there is one memory, unless the plan says otherwise."""
        return "device" if self.device.type == "cpu" and self.plan.images == "device" else "host"

    def denoiser(self, conditioning: Conditioning) -> Denoise:
        """denoise(x, σ) for one picture, x and the result wherever the sampler has them.

        conditioning: on `images`; whoever keeps another reference to it keeps its memory, when it has to move.

        Raises (when called):
            OutOfMemory: not even the smallest plan fits, or it is the host of an accelerator that is full: a smaller
                plan would take more of it.
        """
        held, denoiser = [conditioning], None
        del conditioning

        def denoise(x: Tensor, sigma: Tensor | float) -> Tensor:
            """D(x; σ), under a smaller plan each time that memory runs out."""
            nonlocal denoiser
            before = self._done
            while True:
                try:
                    denoiser = denoiser or self._make(held[0])
                    return denoiser(x.to(self.images), sigma).to(x.device)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    # the error itself would keep all that the attempt held
                    failure, on_the_host = str(error), out_of_host_memory(error)
                if on_the_host and self.device.type != "cpu":
                    raise OutOfMemory(f"{HOST_FULL} ({failure.splitlines()[0] if failure else 'no reason given'})")
                denoiser, self._done = None, before
                self._make_room(failure)
                held[0] = held[0].to(self.images)

        return denoise

    def _make(self, conditioning: Conditioning) -> Denoiser:
        self._placed = self._placed or distribute_weights(self._model, self.plan, self.device)
        return Denoiser(
            self._placed, conditioning, self.plan, progress=self._advance, device=self.device, skip=self._skip
        )

    def _advance(self, blocks: int) -> None:
        self._done += blocks
        self._progress(self._done)

    def _make_room(self, failure: str) -> None:
        """Give back what the failed attempt held and make a smaller plan."""
        self._placed = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._report.plan = self.plan = self._smaller(self.plan)
        peak = amount(self.plan.peak_bytes or 0)
        message = f"out of memory: going on with a smaller plan of {peak}; the picture is the same"
        log.warning("%s (%s)", message, failure.splitlines()[0] if failure else "no reason given")
        self._report.replanned.append(message)


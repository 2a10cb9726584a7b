"""Evaluations that survive a device that fills up, and that are checked.

Memory can run out in a run that was planned well: another program took it. It does so within an evaluation. What the
attempt held is then given back, a smaller plan is made, and the same evaluation is done again: to the sampler, ours or
anybody's, it only took longer. The picture is the same.

Numbers can outgrow their dtype, and a picture of NaN is none: the run ends with the evaluation that made them.
"""

from __future__ import annotations

import logging
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .denoiser import Conditioning, Denoiser, Painted
from .device import (
    PinFailed,
    WrongNumbers,
    empty_caches,
    empty_pinned_cache,
    out_of_host_memory,
    out_of_memory,
    same_device,
)
from .disk import empty_in
from .fidelity import Likeness
from .memory.footprint import Weights
from .memory.measure import Held
from .memory.offload import distribute_weights
from .memory.plan import CPU, MemoryPlan, Workload
from .memory.planner import OutOfMemory, PlannedRun, format_bytes
from .model import InfDiT
from .samplers import Denoise, get_sampler

log = logging.getLogger(__name__)

HOST_FULL = (
    "the computer's own memory is full, not the graphics card's: close other programs, allow more on the card so that "
    "less is kept beside it, or make a smaller picture"
)


@dataclass
class Report:
    """What a run did, filled in while it runs.

    Attributes:
        plan: the first, and after `replanned` the last.
        replanned: a sentence for each time that memory ran out or could not be pinned.
        doing: what it does now: "preparing" a picture, "sampling" it, or "finishing" it.
        size: (height, width) of what it makes now: of several passes each has its own.
        seconds: of each step.
        faithful: of each picture, how alike it and the one given are, see `fidelity`.
        seams: of each picture, how much the lines between patches and between blocks show, see `seams`.
        settings: all that changes a pixel beside model and picture, see `receipt`; evaluations: of all pictures.
        resumed: a sentence for each saved state that was gone on from, or refused.
        peak_bytes: at most, weights included, as a card's allocator counted; on a CPU, as the process held it whenever
            the bar could move (what a file holds too is not counted). reserved_bytes: on a card, the allocator's.
    """

    plan: MemoryPlan | None = None
    replanned: list[str] = field(default_factory=list)
    doing: str = ""
    size: tuple[int, int] = (0, 0)
    seconds: list[float] = field(default_factory=list)
    faithful: list[Likeness] = field(default_factory=list)
    seams: list[list[float]] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)
    evaluations: int = 0
    resumed: list[str] = field(default_factory=list)
    peak_bytes: int | None = None
    reserved_bytes: int | None = None


class Run:
    """Evaluations for pictures that are sampled one after another, under a plan that shrinks when it must.

    Args:
        model: as it was loaded; the plan says where its parameters go.
        planned: what is computed, and the plan to begin with.
        progress: is told what is done in all: rows that were prepared, and blocks after each layer of a chunk. It may
            raise to end the run.
        report: is filled in.
        painted: see `Denoiser`.
    """

    def __init__(
        self, model: InfDiT, planned: PlannedRun, progress: Callable[[int], None], report: Report,
        painted: Painted | None = None,
    ) -> None:
        self._model, self._planned, self._progress, self._report = model, planned, progress, report
        self._painted = painted
        self._placed: InfDiT | None = None
        self._denoiser: Denoiser | None = None
        self._conditioning: Conditioning | None = None
        self._held: Held | None = None
        self._done, self._per_step = 0, get_sampler(planned.workload.sampler).evaluations
        report.plan = planned.plan

    @property
    def report(self) -> Report:
        """What was done."""
        return self._report

    @property
    def workload(self) -> Workload:
        """What is computed."""
        return self._planned.workload

    @property
    def keeps_grey(self) -> bool:
        """Whether what has no colour must come back without any: a bridge invents nothing, colour neither."""
        return self._model.defaults.start_noise == 0

    @property
    def images(self) -> torch.device:
        """Where the pictures are while they are sampled: of several devices on the first that has layers."""
        workload, plan = self.workload, self._planned.plan
        if plan.images != "device":
            return CPU
        return plan.stages(workload.devices, workload.config.num_layers)[0][0]

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Room for a picture that is made on the CPU, float32: in memory or, if the plan says so, on disk."""
        on_disk = self._planned.plan.images == "disk"
        return empty_in((self.workload.folder or tempfile.gettempdir()) if on_disk else None, shape)

    def begin(self, doing: str, size: tuple[int, int] | None = None) -> None:
        """Say what is done from now on, and to a picture of which size if that is another.

        Unless it is sampling, what a picture was sampled with is given back.
        """
        self._report.doing, self._report.size = doing, size or self._report.size
        if doing != "sampling":
            self._denoiser = self._conditioning = None
        self.advance(0)

    def advance(self, done: int) -> None:
        """Say that so much more is done, maybe nothing: whoever watches may end the run here."""
        self._done += done
        if self._held is not None:
            self._held.look()
        self._progress(self._done)

    def denoiser(self, conditioning: Conditioning, levels: Sequence[float] = ()) -> Denoise:
        """denoise(x, σ) for one picture, x and the result wherever the sampler has them.

        conditioning: on `images`; whoever keeps another reference to it keeps its memory, when it has to move.
        levels: see `Denoiser`.

        Raises (when called):
            OutOfMemory: not even the smallest plan fits, or it is the host of an accelerator that is full: a smaller
                plan would take more of it.
            WrongNumbers: a result that is not finite.
            CheckpointError: the model's file was written to meanwhile.
        """
        self._conditioning, self._denoiser, done = conditioning, None, 0
        del conditioning

        def denoise(x: Tensor, sigma: Tensor | float) -> Tensor:
            """D(x; σ), under a smaller plan each time that memory runs out."""
            nonlocal done
            before = self._done
            while True:
                try:
                    result = self._evaluate(x, sigma, levels)
                    # a sum takes no room and keeps any NaN and inf; the host has waited for this evaluation anyway
                    if not math.isfinite(result.sum().item()):
                        raise WrongNumbers(_not_finite(1 + done // self._per_step, self.workload.dtype, x))
                    done += 1
                    return result.to(x.device)
                except (RuntimeError, MemoryError) as error:
                    unpinned = isinstance(error, PinFailed)
                    if self._planned.elsewhere is not None or not (unpinned or out_of_memory(error)):
                        raise  # other processes know of no other plan
                    # the error itself would keep all that the attempt held
                    failure, on_the_host = str(error), out_of_host_memory(error)
                if on_the_host and not self.workload.unified_memory:
                    raise OutOfMemory(f"{HOST_FULL} ({failure.splitlines()[0] if failure else 'no reason given'})")
                self._done = before
                self._plan_anew(failure, unpinned)

        return denoise

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Around all evaluations: afterwards nothing is kept that was made for them, whoever holds a traceback."""
        try:
            with self._measured():
                yield
        except BaseException as error:
            _forget(error)
            raise
        finally:
            self._denoiser = self._conditioning = self._placed = None
            for device in self.workload.devices:
                empty_pinned_cache(device)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Note what a device gives out meanwhile, less what others had of it; of several the fullest."""
        cuda, cards = torch.cuda, [d for d in dict.fromkeys(self.workload.devices) if d.type == "cuda"]
        before: list[tuple[int, int]] = []
        for card in cards:
            ours = self._weights_on(card)
            before.append((cuda.memory_allocated(card) - ours, cuda.memory_reserved(card) - ours))
            cuda.reset_peak_memory_stats(card)
        self._held = Held() if self.workload.device.type == "cpu" else None
        yield
        if self._held is not None:
            self._report.peak_bytes = self._held.most() + self._weights_on(self.workload.device)
        if cards:
            peaks = zip(cards, before, strict=True)
            used = [(cuda.max_memory_allocated(c) - a, cuda.max_memory_reserved(c) - r) for c, (a, r) in peaks]
            self._report.peak_bytes, self._report.reserved_bytes = map(max, zip(*used, strict=True))

    def _weights_on(self, device: torch.device) -> int:
        """Bytes of weights that are on a device before the run."""
        there = self._planned.plan.weights == "resident" and same_device(self._model.device, device)
        return Weights.of(self.workload.config, self.workload.dtype).total if there else 0

    def _evaluate(self, x: Tensor, sigma: Tensor | float, levels: Sequence[float]) -> Tensor:
        if self._model.file is not None:
            self._model.file.check()
        plan, devices, elsewhere = self._planned.plan, self.workload.devices, self._planned.elsewhere
        rank = None if elsewhere is None else elsewhere.rank
        self._placed = self._placed or distribute_weights(self._model, plan, devices, rank)
        if self._denoiser is None:
            assert self._conditioning is not None
            if elsewhere is not None:
                given = self._conditioning
                elsewhere.begin(plan, given.lr_upscaled.shape, given.clip_embedding, levels)
            self._denoiser = Denoiser(
                self._placed, self._conditioning, plan, progress=self.advance, device=devices, painted=self._painted,
                levels=levels, elsewhere=elsewhere,
            )  # fmt: skip
        return self._denoiser(x.to(self.images), sigma)

    def _plan_anew(self, failure: str, unpinned: bool) -> None:
        """Give back what the failed attempt held, and make a smaller plan, or one that does without pinned memory."""
        assert self._conditioning is not None
        self._placed = self._denoiser = None
        self._conditioning = self._conditioning.to(CPU)  # what is free for a smaller plan is seen without its pictures
        for device in self.workload.devices:
            empty_caches(device)
        self._planned = self._planned.unpinned() if unpinned else self._planned.smaller()
        self._report.plan = plan = self._planned.plan
        smaller = f"out of memory: going on with a smaller plan of {format_bytes(plan.peak_bytes or 0)}"
        plain = "main memory could not be pinned: going on with plain copies, which take longer"
        message = f"{plain if unpinned else smaller}; the picture is the same"
        log.warning("%s (%s)", message, failure.splitlines()[0] if failure else "no reason given")
        self._report.replanned.append(message)
        self._conditioning = self._conditioning.to(self.images)


def _forget(error: BaseException | None) -> None:
    """Take from an error, and from those that led to it, what the functions that it came through worked with."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)  # but those that go on
        error = error.__cause__ or error.__context__


def _not_finite(step: int, dtype: torch.dtype, x: Tensor) -> str:
    """What is wrong with step 1, 2, …, and the way out: a dtype that reaches further, unless it lies elsewhere."""
    if not math.isfinite(x.sum().item()):
        return f"the sampler gave NaN or inf in step {step}: choose another sampler or other noise levels"
    way_out = {
        torch.float16: "choose bf16 or fp32 (float32) as the dtype, whose numbers reach further",
        torch.bfloat16: "choose fp32 (float32) as the dtype, which is more exact",
    }.get(dtype, "no dtype reaches further, so check the model's file and the noise levels")
    return f"the model gave NaN or inf in step {step} in {str(dtype).removeprefix('torch.')}: {way_out}"

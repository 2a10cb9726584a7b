"""One run of `infdit.upscale`, planned, placed, watched and reported: what both Upscale nodes have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..infdit import MemoryPlan, Report, upscale
from ..infdit.measure import PeakMeter
from ..infdit.memory import Weights
from ..infdit.model import InfDiT
from ..infdit.planner import GIB, Request, seconds_per_evaluation
from ..infdit.samplers import Method, evaluations
from ..infdit.upscale import PictureState
from .clip import GuidedVector
from .host import Bar, HostedModel, Preview, choose_plan, with_weights
from .report import Measured, duration, run_report, sampling_words

COUNTING = 1.5e-3  # seconds that PeakMeter takes for a layer of a chunk: measured
FEW_PERCENT, NOT_FELT = 0.03, 0.5  # of the time, seconds: what counting may cost

Noise = Callable[[tuple[int, int, int, int]], Tensor]


def request_for(
    model: HostedModel,
    target: tuple[int, int],
    source: Sequence[int],
    sampler: str | Method | None = None,
    noise_given: bool = False,
) -> Request:
    """What is to be planned: pictures of shape `source`, (B, h, w, channels), enlarged to `target`, (height, width)."""
    batch, height, width, channels = source
    network = model.network
    return Request(
        network.config,
        *target,
        batch=batch,
        dtype=network.dtype,
        device=model.device,
        sampler=sampler or network.defaults.sampler,
        weights=None if model.streams or model.device.type == "cpu" else "resident",
        source=(height, width, channels),
        noise_given=noise_given,
    )


def budget_bytes(gib: float) -> int | None:
    """A memory_budget in bytes; 0 is automatic, None."""
    return round(gib * GIB) or None


@dataclass(frozen=True)
class Job:
    """A run to be done.

    Attributes:
        model: that upscales.
        image: (B, h, w, 3 or 4) float32 on the CPU.
        target: height and width of the result.
        sampler: a name or a method; sigmas: the noise levels.
        memory_budget: in GiB; 0: automatic.
        conditioning: what CLIP says.
        node_id: of the node that runs.
        sampler_name, noise_name: for the report; no noise_name if there is none. notes: lines for it.
    """

    model: HostedModel
    image: Tensor
    target: tuple[int, int]
    sampler: str | Method
    sigmas: Tensor
    memory_budget: float
    conditioning: GuidedVector | None
    node_id: str | None
    sampler_name: str
    noise_name: str
    notes: Sequence[str] = ()

    def run(
        self, seed: int = 0, noise: Noise | None = None, callback: Callable[[PictureState], None] | None = None
    ) -> tuple[Tensor, str]:
        """The enlarged pictures, float32 on the CPU, and the report."""
        request = request_for(self.model, self.target, self.image.shape, self.sampler, noise is not None)
        plan = choose_plan(request, budget_bytes(self.memory_budget))
        done, measured, bar = Report(), Measured(notes=[*self.notes, *self._conditioning_notes()]), Bar(self.node_id)

        def work(network: InfDiT) -> Tensor:
            with watched(request, plan, network, evaluations(self.sampler, self.sigmas), measured):
                return upscale(
                    network,
                    self.image,
                    size=self.target,
                    sampler=self.sampler,
                    sigmas=self.sigmas,
                    seed=seed,
                    noise=noise,
                    plan=plan,
                    clip_embedding=self._vectors(),
                    progress=TimeLeft(bar),
                    callback=callback,
                    device=request.device,
                    report=done,
                )

        told = "stopped"
        try:
            result = with_weights(self.model, plan, work)
            bar.fill()
            told = f"{request.width}×{request.height} in {duration(measured.seconds)}"
        finally:
            bar.tell(told)
        steps = (len(self.sigmas) - 1) * request.batch
        sampling = sampling_words(self.sampler_name, self.sigmas, self.model.network.defaults, self.noise_name)
        return result, run_report(self.model.name, sampling, steps, request, plan, done, measured)

    def _vectors(self) -> Tensor | None:
        listens = self.model.network.config.vector_dim > 0
        return self.conditioning.vectors if self.conditioning is not None and listens else None

    def _conditioning_notes(self) -> list[str]:
        listens = self.model.network.config.vector_dim > 0
        if self.conditioning is None:
            return ["conditioning: none, zeros stand for what CLIP would tell this model"] if listens else []
        if not listens:
            return ["conditioning: ignored, this model has no CLIP input"]
        return [f"conditioning: {self.conditioning.told}", *(f"note: {text}" for text in self.conditioning.warnings)]


class TimeLeft:
    """`progress` of `infdit.upscale`: the bar, the live picture, and the time left once a first chunk is done."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._began = bar, time.monotonic()

    def __call__(self, done: int, total: int, preview: Preview | None) -> None:
        left = (time.monotonic() - self._began) * (total - done) / max(1, done)
        self._bar.move(done, total, preview, f"{done / total:.0%}, {duration(left)} left")


@contextmanager
def watched(
    request: Request, plan: MemoryPlan, network: InfDiT, evaluated: int, measured: Measured
) -> Iterator[None]:
    """Take the time, and the peak where that is cheap: by the card's allocator, or by counting tensors.

    Counting takes longer than a small model on a CPU computes. It is left out unless it costs a few percent, or so
    little that nobody feels it.
    """
    began = time.monotonic()
    try:
        if request.device.type == "cuda":
            with _allocated(request, plan, measured):
                yield
        elif _counting_is_cheap(request, plan, evaluated):
            here = plan.weights == "resident"
            with PeakMeter({"device": network.parameters()} if here else None, request.device) as meter:
                yield
            measured.peak = meter.peak["device"]
        else:
            yield
    finally:
        measured.seconds = time.monotonic() - began


def _counting_is_cheap(request: Request, plan: MemoryPlan, evaluated: int) -> bool:
    grid = request.grid
    visits = -(-grid.blocks // plan.chunk) * request.config.num_layers
    each = seconds_per_evaluation(request.config, grid, plan, request.dtype, request.device)
    count = evaluated * request.batch
    return count * visits * COUNTING <= max(NOT_FELT, FEW_PERCENT * count * each)


@contextmanager
def _allocated(request: Request, plan: MemoryPlan, measured: Measured) -> Iterator[None]:
    """What the card's allocator gave out, less what others had of it; weights that are there already count."""
    device, cuda = request.device, torch.cuda
    ours = Weights.of(request.config, request.dtype).total if plan.weights == "resident" else 0
    allocated, reserved = (held(device) - ours for held in (cuda.memory_allocated, cuda.memory_reserved))
    cuda.reset_peak_memory_stats(device)
    yield
    measured.peak = cuda.max_memory_allocated(device) - allocated
    measured.reserved = cuda.max_memory_reserved(device) - reserved

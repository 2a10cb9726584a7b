"""What a run did, in a few short lines for people."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..infdit import InfDiTConfig, MemoryPlan, Report, SamplingDefaults
from ..infdit.grid import BlockGrid
from ..infdit.planner import Request, amount


@dataclass
class Measured:
    """What was seen of a run while it ran.

    Attributes:
        peak: bytes on the device at most, None where nobody counted; reserved: by the card's allocator.
        seconds: in all.
        notes: lines that the user should read.
    """

    peak: int | None = None
    reserved: int | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def duration(seconds: float) -> str:
    """A time for people."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def run_report(
    name: str, sampling: str, steps: int, request: Request, plan: MemoryPlan, done: Report, measured: Measured
) -> str:
    """All lines about a run with the model of this name that began with this plan; steps: of all pictures."""
    each = f"{duration(measured.seconds / steps)} a step, " if steps else ""
    return "\n".join(
        [
            size_words(request),
            model_words(name, request),
            sampling,
            *plan_words(request, done.plan or plan),
            memory_words(plan, measured),
            f"time: {each}{duration(measured.seconds)} in all",
            *measured.notes,
            *(f"note: {note}" for note in done.replanned),
        ]
    )


def size_words(request: Request) -> str:
    """From what to what."""
    height, width, _ = request.source or (0, 0, 0)
    count = f", {request.batch} pictures" if request.batch > 1 else ""
    return f"{width}×{height} to {request.width}×{request.height}{count}"


def model_words(name: str, request: Request) -> str:
    """Which model, how exact, where."""
    return f"model: {name}, {str(request.dtype).removeprefix('torch.')} on {request.device}"


def sampling_words(sampler: str, sigmas: Tensor, defaults: SamplingDefaults, noise: str) -> str:
    """How it is sampled; `noise` says where the start's noise comes from, and is empty where there is none."""
    levels = sigmas.tolist()
    steps = len(levels) - 1
    if not steps:
        return "sampling: none, this is the plain enlargement"
    taken = f"sampling: {steps} {'step' if steps == 1 else 'steps'} of {sampler}"
    if not noise:
        return f"{taken}; {defaults.start}"
    return (
        f"{taken}, noise {levels[0]:.3g} to {levels[-1] or levels[-2]:.3g} (made for {defaults.sigma_max:.3g} to "
        f"{defaults.sigma_min:.3g}), {noise}"
    )


def plan_words(request: Request, plan: MemoryPlan) -> list[str]:
    """How a run is cut into pieces, what is where, and why."""
    lines = [f"plan: {_pieces(request.config, request.grid, plan)}"]
    if not request.one_memory:
        places = {"device": "on the card", "host": "in main memory"}
        weights = "on the card" if plan.weights == "resident" else "streamed from main memory"
        hidden = f"hidden states {places[plan.hidden]}, " if plan.group < request.config.num_layers else ""
        lines.append(f"weights {weights}, {hidden}pictures {places[plan.images]}")
    return [*lines, plan.reason] if plan.reason else lines


def _pieces(config: InfDiTConfig, grid: BlockGrid, plan: MemoryPlan) -> str:
    layers = f"{plan.group} of {config.num_layers} layers" if plan.group < config.num_layers else "all layers"
    blocks = f"{plan.chunk} of {grid.blocks} blocks" if plan.chunk < grid.blocks else f"all {grid.blocks} blocks"
    return f"{layers} and {blocks} of {grid.block} px at a time"


def memory_words(plan: MemoryPlan, measured: Measured) -> str:
    """Predicted and measured peak."""
    if measured.peak is None:
        seen = "not measured (counting would take longer than the work)"
    else:
        seen = f"{amount(measured.peak)} measured"
    reserved = "" if measured.reserved is None else f" ({amount(measured.reserved)} reserved)"
    host = f"; main memory {amount(plan.host_bytes)} predicted" if plan.host_bytes else ""
    return f"peak: {amount(plan.peak_bytes or 0)} predicted, {seen}{reserved}{host}"

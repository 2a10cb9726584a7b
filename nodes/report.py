"""What a run did, in a few short lines for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..infdit import MemoryPlan, Report, SamplingDefaults
from ..infdit.memory.cost import seconds_of_run
from ..infdit.memory.plan import Workload
from ..infdit.memory.planner import PlannedRun, format_bytes
from .comfy_page import duration

SEEN = 2.0  # ΔE2000, on average over a picture


def run_report(
    name: str, sampling: str, planned: PlannedRun, done: Report, seconds: float, notes: Sequence[str]
) -> str:
    """All lines about a run with the model of this name; seconds: in all."""
    workload, plan, steps = planned.workload, done.plan or planned.plan, len(done.seconds)  # of this run, not before it
    each = f" ({duration(seconds / steps)} a step)" if steps > 1 else ""
    return "\n".join(
        [
            f"{size_line(workload)} in {duration(seconds)}{each}",
            *way_lines(workload),
            sampling,
            model_line(name, workload),
            *notes,
            *resumed_lines(done),
            *(f"note: {note}" for note in done.replanned),
            *faithful_lines(done),
            *plan_lines(workload, plan),
            memory_line(plan, done),
        ]
    )


def seconds_foretold(workload: Workload, plan: MemoryPlan, sigmas: Tensor) -> float:
    """How long a run over these noise levels takes, roughly."""
    return seconds_of_run(workload, plan, [sigmas] * len(workload.passes))


def overshoot_note(image: Tensor) -> list[str]:
    """That values are clipped, if any are."""
    low, high = (bound.item() for bound in image.aminmax())
    return [] if low >= 0 and high <= 1 else [f"note: values from {low:.3g} to {high:.3g} were clipped to 0..1"]


def resumed_lines(done: Report) -> list[str]:
    """Where the run went on, and what of its states was of no use: of many pictures the first and the last."""
    told = done.resumed
    told = told if len(told) < 4 else [told[0], f"{len(told) - 2} more such notes are in the receipt", told[-1]]
    return [f"note: {note}" for note in told]


def size_line(workload: Workload) -> str:
    """From what to what."""
    height, width, _ = workload.source or (0, 0, 0)
    count = f", {workload.batch} pictures" if workload.batch > 1 else ""
    return f"{width}×{height} to {workload.width}×{workload.height}{count}"


def way_lines(workload: Workload) -> list[str]:
    """By way of which sizes, if there is more than one pass."""
    return [workload.way] if workload.way else []


def faithful_lines(done: Report) -> list[str]:
    """How alike the input and the result made small again are, of several pictures the least alike."""
    if not done.faithful:
        return []
    least = min(done.faithful, key=lambda likeness: likeness.consistency)
    which = ", the least of all pictures" if len(done.faithful) > 1 else ""
    seen = "; more fidelity or less denoise helps" if least.colour > SEEN else ""
    return [f"made small again, against the input: {least}{which}{seen}"]


def model_line(name: str, workload: Workload) -> str:
    """Which model, how exact, where."""
    return f"model: {name}, {str(workload.dtype).removeprefix('torch.')} on {workload.device}"


def sampling_line(sampler: str, sigmas: Tensor, defaults: SamplingDefaults, noise: str) -> str:
    """How it is sampled; `noise` says where the start's noise comes from, and is empty where there is none.

    Which noise levels the model was made for is said where others are taken.
    """
    levels = sigmas.tolist()
    steps = len(levels) - 1
    if not steps:
        return "sampling: none, this is the plain enlargement"
    taken = f"sampling: {steps} {'step' if steps == 1 else 'steps'} of {sampler}"
    if not noise:
        return f"{taken}; {'is given no noise' if defaults.start_noise else defaults.start}"
    made_for = [defaults.sigma_max, defaults.sigma_min][: 1 if steps == 1 else 2]
    ends = [levels[0], *([] if steps == 1 else [levels[-1] or levels[-2]])]
    own = all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(ends, made_for, strict=True))
    other = "" if own else f" (made for {defaults.sigma_max:.3g} to {defaults.sigma_min:.3g})"
    return f"{taken}, noise {' to '.join(f'{level:.3g}' for level in ends)}{other}, {noise}"


def plan_lines(workload: Workload, plan: MemoryPlan) -> list[str]:
    """How a run is cut into pieces, and what is where."""
    depth, grid = workload.config.num_layers, workload.grid
    stages = plan.stages(workload.devices, depth) if plan.layers else []
    held = [footprint.device for _, footprint in workload.footprints(plan)] if stages else []
    layers = f"{plan.group} of {depth} layers" if plan.group < depth else "all layers"
    blocks = f"{plan.chunk} of {grid.blocks} blocks" if plan.chunk < grid.blocks else f"all {grid.blocks} blocks"
    shares = "; ".join(
        f"layers {part[0] + 1} to {part[-1] + 1} on {device}, {format_bytes(size)}"
        for (device, part), size in zip(stages, held, strict=True)
    )
    lines = [f"plan: {layers} and {blocks} of {grid.block} px at a time"]
    if shares:
        lines.append(f"at the same time: {shares}")
    if not workload.unified_memory:
        places = {"device": "on the card", "host": "in main memory", "disk": "on disk"}
        weights = "on the card" if plan.weights == "resident" else "streamed from main memory"
        hidden = f"hidden states {places[plan.hidden]}, " if plan.group < depth else ""
        plain = "" if plan.pinned else "; main memory is not pinned, so copies take longer"
        lines.append(f"weights {weights}, {hidden}pictures {places[plan.images]}{plain}")
    return lines


def memory_line(plan: MemoryPlan, done: Report) -> str:
    """Predicted peak, the one that a card's allocator counted, and why this plan."""
    measured = ""
    if done.peak_bytes is not None:
        reserved = "" if done.reserved_bytes is None else f" ({format_bytes(done.reserved_bytes)} reserved)"
        measured = f", {format_bytes(done.peak_bytes)} measured{reserved}"
    host = f"; main memory {format_bytes(plan.host_bytes)} predicted" if plan.host_bytes else ""
    reason = f"; {plan.reason}" if plan.reason else ""
    return f"peak: {format_bytes(plan.peak_bytes or 0)} predicted{measured}{host}{reason}"

"""Inf-DiT Memory Plan: what a run would hold, before it runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from comfy_api.latest import io, ui
from torch import Tensor

from ..infdit import BudgetTooSmall, MemoryPlan
from ..infdit.memory.cost import seconds_per_evaluation
from ..infdit.memory.plan import CPU, Workload
from ..infdit.memory.planner import candidates, fastest_plan, format_bytes, format_seconds
from ..infdit.upscale import schedule
from .comfy_memory import ManagedModel, budget_bytes, obtainable, plan_run
from .comfy_page import from_image, page_language, to_image
from .plot import MemoryBar, draw
from .report import model_line, plan_lines, seconds_foretold, size_line, way_lines
from .schema import CATEGORY, BudgetedNode, memory_budget_input, model_input, number, search_aliases
from .size import MAX_SIDE, Size, result_size, size_input
from .words import in_language


class InfDiTMemoryPlan(BudgetedNode):
    """Foretells memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTMemoryPlan",
            display_name="Inf-DiT Memory Plan",
            category=CATEGORY,
            description="Tells before a run how much memory Inf-DiT Upscale would take, what fills it, and whether it "
            "fits, without running it. Set size and memory_budget as you would there.",
            inputs=[
                model_input(),
                _side_input("width"),
                _side_input("height"),
                size_input(),
                memory_budget_input(
                    "GiB of the graphics card's memory that the run may hold, model included (without a card: of main "
                    "memory). 0, automatic: what Inf-DiT Upscale would take here and now."
                ),
                io.Image.Input(
                    "image", optional=True,
                    tooltip="The pictures that would be enlarged, in place of width and height.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="report",
                    tooltip="The plan in a few lines: what it holds where, or what is the least that works.",
                ),
                io.Image.Output(display_name="plot", tooltip="The same as a picture."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            **search_aliases("inf-dit vram", "infdit memory", "vram estimate", "memory usage"),
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        """Never the same: what is free changes without any input."""
        return float("nan")

    @classmethod
    def execute(
        cls, model: ManagedModel, width: int, height: int, memory_budget: float, size: Size | None = None,
        image: Tensor | None = None,
    ) -> io.NodeOutput:
        height, width = (
            int(number(side, name, 1, MAX_SIDE, whole=True)) for name, side in (("height", height), ("width", width))
        )
        source = (1, height, width, 3) if image is None else tuple(from_image(image).shape)
        workload = model.workload(source, result_size(size, *source[1:3]))
        preview = preview_plan(workload, budget_bytes(memory_budget))
        lines = [*plan_lines(workload, preview.plan), *preview.alternatives()] if preview.fits else []
        lines = [*way_lines(workload), *lines]
        sigmas = schedule(model.defaults)
        taken = format_seconds(seconds_foretold(workload, preview.plan, sigmas))
        way = f"{len(sigmas) - 1} {'step' if len(sigmas) == 2 else 'steps'} of {model.defaults.sampler}"
        title = f"{size_line(workload)}{f' in about {taken} ({way})' if preview.fits else ''}"
        named = model_line(model.name, workload)
        plot = draw(title, preview.verdict, preview.fits, preview.bars, [named, *lines])
        report = [title, named, preview.verdict, *(bar.line for bar in preview.bars), *lines]
        text = in_language("\n".join(report), page_language())
        return io.NodeOutput(text, to_image(plot), ui=ui.PreviewImage(plot, cls=cls))


def _side_input(name: str) -> io.Input:
    return io.Int.Input(
        name, display_name=f"picture {name}", default=1024, min=1, max=MAX_SIDE,
        tooltip="Of the picture that would be enlarged, in pixels. Not used if a picture is connected.",
    )


@dataclass(frozen=True)
class PlanPreview:
    """What would come of a run.

    Attributes:
        plan: the plan, or the least that is missing something.
        bars: what fills which memory.
        refusal: why it would not run; empty if it would.
    """

    workload: Workload
    plan: MemoryPlan
    bars: list[MemoryBar]
    refusal: str

    @property
    def fits(self) -> bool:
        """Whether it would run."""
        return not self.refusal

    @property
    def verdict(self) -> str:
        """In one sentence."""
        return f"does not fit: {self.refusal}" if self.refusal else "fits"

    def alternatives(self) -> list[str]:
        """The least and the fastest plan beside this one."""
        seconds = seconds_per_evaluation(self.workload, self.plan)
        lines: list[str] = []
        plans = candidates(self.workload)
        for name, other in (("least", min(plans, key=lambda c: c.peak)), ("fastest", min(plans))):
            if other.peak != self.plan.peak_bytes:
                times = other.seconds / seconds
                lines.append(f"{name} possible: {format_bytes(other.peak)}, about {times:.2g} times as long")
        return lines


def preview_plan(workload: Workload, budget: int | None) -> PlanPreview:
    """Plan as Inf-DiT Upscale would; where it would refuse, say so and show the least that is missing something."""
    room, refusal = obtainable(workload.device), ""
    try:
        plan = plan_run(workload, budget).plan
    except BudgetTooSmall as error:
        refusal, least = str(error), error.least if error.tier == "device" else None
        asked = max(1, least or (room if budget is None else min(budget, room)))
        try:
            plan = fastest_plan(workload, asked, sys.maxsize)
        except BudgetTooSmall as error:  # it is not only the host that is too small
            plan = fastest_plan(workload, error.least, sys.maxsize)
    held, unified = workload.footprint(plan), workload.unified_memory
    limit = (room, "the free") if budget is None or budget > room else (budget, "the budget of")
    bars = [MemoryBar("main memory" if unified else "graphics card", held.device_parts, *limit)]
    if not unified:
        bars.append(MemoryBar("main memory", held.host_parts, obtainable(CPU), "the free"))
    return PlanPreview(workload, plan, bars, refusal)

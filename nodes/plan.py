"""Inf-DiT Memory Plan: what a run would hold, before it runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from comfy_api.latest import io, ui
from torch import Tensor

from ..infdit import BudgetTooSmall, MemoryPlan
from ..infdit.planner import Request, amount, seconds_per_evaluation
from .host import CPU, HostedModel, choose_plan, obtainable, to_image
from .job import budget_bytes, request_for
from .plot import Filling, draw
from .report import model_words, plan_words, size_words
from .schema import CATEGORY, memory_budget_input, model_input, search_aliases
from .size import MAX_SIDE, Size, result_size, size_input


class InfDiTMemoryPlan(io.ComfyNode):
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
                io.Int.Input(
                    "width",
                    display_name="picture width",
                    default=1024,
                    min=1,
                    max=MAX_SIDE,
                    tooltip="Of the picture that would be enlarged, in pixels. Not used if a picture is connected.",
                ),
                io.Int.Input(
                    "height",
                    display_name="picture height",
                    default=1024,
                    min=1,
                    max=MAX_SIDE,
                    tooltip="Of the picture that would be enlarged, in pixels. Not used if a picture is connected.",
                ),
                size_input(),
                memory_budget_input(
                    "GiB of the graphics card's memory that the run may hold, model included (without a card: of main "
                    "memory). 0: what Inf-DiT Upscale would take here and now."
                ),
                io.Image.Input(
                    "image",
                    optional=True,
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
            **search_aliases("inf-dit vram", "infdit memory", "vram estimate", "memory usage"),
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        """Never the same: what is free changes without any input."""
        return float("nan")

    @classmethod
    def execute(
        cls,
        model: HostedModel,
        width: int,
        height: int,
        memory_budget: float,
        size: Size | None = None,
        image: Tensor | None = None,
    ) -> io.NodeOutput:
        source = (1, height, width, 3) if image is None else tuple(image.shape)
        if len(source) != 4 or 0 in source:
            raise ValueError(f"image of shape {source} must be (batch, height, width, channels), of at least one pixel")
        request = request_for(model, result_size(size, *source[1:3]), source)
        outlook = foresee(request, budget_bytes(memory_budget))
        lines = [*plan_words(request, outlook.plan), *outlook.alternatives()] if outlook.fits else []
        title, verdict = size_words(request), outlook.verdict
        fillings = outlook.fillings()
        plot = draw(title, verdict, outlook.fits, fillings, [model_words(model.name, request), *lines])
        report = [title, model_words(model.name, request), verdict, *map(filling_words, fillings), *lines]
        image_out = to_image(plot)
        return io.NodeOutput("\n".join(report), image_out, ui=ui.PreviewImage(plot, cls=cls))


@dataclass(frozen=True)
class Outlook:
    """What would come of a request.

    Attributes:
        plan: the plan, or the least that is missing something.
        room, host_room: bytes that can be had on the device and in main memory.
        budget: bytes asked for; None: automatic.
        refusal: why it would not run; empty if it would.
    """

    request: Request
    plan: MemoryPlan
    room: int
    host_room: int
    budget: int | None
    refusal: str

    @property
    def fits(self) -> bool:
        """Whether it would run."""
        return not self.refusal

    @property
    def verdict(self) -> str:
        """In one sentence."""
        return f"does not fit: {self.refusal}" if self.refusal else f"fits: takes {amount(self.plan.peak_bytes or 0)}"

    def fillings(self) -> list[Filling]:
        """What fills which memory."""
        held = self.request.footprint(self.plan)
        device = {
            "weights": held.weights,
            "keys and values": held.ring,
            "hidden states": held.hidden,
            "pictures": held.images,
            "workspace": held.workspace,
        }
        one = self.request.one_memory
        asked = self.budget is not None and self.budget <= self.room
        limit = (self.budget or 0, "the budget of") if asked else (self.room, "the free")
        fillings = [Filling("main memory" if one else "graphics card", device, *limit)]
        if not one:
            host = {"weights": held.host_weights, "hidden states": held.host_hidden, "pictures": held.host_images}
            fillings.append(Filling("main memory", host, self.host_room, "the free"))
        return fillings

    def alternatives(self) -> list[str]:
        """The least and the fastest plan beside this one."""
        seconds = self._seconds(self.plan)
        lines: list[str] = []
        candidates = self.request.candidates()
        for name, other in (("least", min(candidates, key=lambda c: c.peak)), ("fastest", min(candidates))):
            if other.peak != self.plan.peak_bytes:
                times = self._seconds(other.plan) / seconds
                lines.append(f"{name} possible: {amount(other.peak)}, about {times:.2g} times as long")
        return lines

    def _seconds(self, plan: MemoryPlan) -> float:
        r = self.request
        return seconds_per_evaluation(r.config, r.grid, plan, r.dtype, r.device)


def foresee(request: Request, budget: int | None) -> Outlook:
    """Plan as Inf-DiT Upscale would; where it would refuse, say so and show the least that is missing something."""
    room, host_room = obtainable(request.device), obtainable(CPU)
    try:
        return Outlook(request, choose_plan(request, budget), room, host_room, budget, "")
    except BudgetTooSmall as error:
        refusal, least = str(error), error.least if error.tier == "device" else None
    asked = max(1, least or (room if budget is None else min(budget, room)))
    try:
        plan = request.plan(asked, sys.maxsize)
    except BudgetTooSmall as error:  # it is not only the host that is too small
        plan = request.plan(error.least, sys.maxsize)
    return Outlook(request, plan, room, host_room, budget, refusal)


def filling_words(filling: Filling) -> str:
    """A bar of the plot in words."""
    parts = ", ".join(f"{name} {amount(size)}" for name, size in filling.parts.items() if size)
    return f"{filling.name}: {amount(filling.total)} of {filling.limit_name} {amount(filling.limit)}: {parts}"

"""What the schemas share: link types, the category, inputs of several nodes, fields that only newer ComfyUIs know."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from .comfy_page import refusal
from .inputs import shown

CATEGORY = "image/upscaling/Inf-DiT"
MAX_BUDGET = 32.0  # GiB, of the slider: most of its way is what cards have
MOST_BUDGET = 1024.0  # GiB, of what is taken: workflows saved before the slider ended at 32 say up to 64
MAX_SEED = 2**64 - 1

InfDiTModel = io.Custom("INFDIT_MODEL")
InfDiTCLIP = io.Custom("INFDIT_CLIP")
InfDiTConditioning = io.Custom("INFDIT_CONDITIONING")

SLIDER = io.NumberDisplay.slider
FIXED: Any = getattr(io, "ControlAfterGenerate", {"fixed": True})["fixed"]  # a seed after a run; 0.8.0 has on and off
ADVANCED = {"advanced": True}  # as extra_dict: io's own keyword for it exists only since 0.10


def search_aliases(*names: str) -> dict[str, Sequence[str]]:
    """Other names to find a node by, as keywords for io.Schema: none where it has no such field (before 0.11).

    io.Schema raises TypeError for a keyword that it does not know, and then the whole pack fails to load.
    """
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return {"search_aliases": list(names)} if "search_aliases" in known else {}


def number(value: object, name: str, least: float, most: float, whole: bool = False) -> float:
    """A widget's value, for which a link may have given anything; an int if it is to be a whole number.

    Raises:
        ValueError: no number, or one beyond what the widget takes.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most:
        if not whole:
            return value
        if value == int(value):
            return int(value)
    kind, limits = ("whole number", f"{least} to {most}") if whole else ("number", f"{least:.10g} to {most:.10g}")
    raise ValueError(f"{name} is {shown(value)} and must be a {kind} from {limits}")


class BudgetedNode(io.ComfyNode):
    """A node with a memory budget, which may be beyond where its slider ends."""

    @classmethod
    def validate_inputs(cls, memory_budget: float | None = None, *, size: object = None) -> bool | str:
        """In place of ComfyUI's own limits. A link's value is not known yet; size is passed whatever is asked for."""
        try:
            return memory_budget is None or number(memory_budget, "memory_budget", 0, MOST_BUDGET) >= 0
        except ValueError as error:
            return refusal(str(error), cls)


def model_input() -> io.Input:
    """The model that upscales."""
    return InfDiTModel.Input("model", tooltip="From Load Inf-DiT Model.")


def image_input(more: str = "") -> io.Input:
    """The pictures."""
    return io.Image.Input("image", tooltip=f"The pictures to enlarge: any size, any number.{more}")


def image_output() -> io.Output:
    """The result."""
    return io.Image.Output(display_name="image", tooltip="The enlarged pictures, exactly of the size asked for.")


def memory_budget_input(tooltip: str) -> io.Input:
    """How much memory a run may hold."""
    return io.Float.Input(
        "memory_budget", display_name="memory GiB (0 = auto)", default=0.0, min=0.0, max=MAX_BUDGET,
        step=0.05, round=0.01, display_mode=SLIDER, tooltip=tooltip,
    )  # fmt: skip


RUN_BUDGET = (
    "GiB of the graphics card's memory that this run may hold, model included (without a card: of main memory). The "
    "picture is the same with any, only the time differs. 0, automatic: as much as makes it fast, if unloading other "
    "models can free that; otherwise what is free then."
)


def conditioning_input() -> io.Input:
    """What CLIP tells the model, for models that listen."""
    return InfDiTConditioning.Input(
        "conditioning", optional=True,
        tooltip="From Inf-DiT CLIP Encode: what the picture shows and where to lead it. The published model was "
        "trained with it; models without a CLIP input, such as the bundled one, ignore it and the report says so.",
    )


def transparency_input() -> io.Input:
    """What is transparent, for pictures that come without a fourth channel."""
    return io.Mask.Input(
        "transparency", optional=True,
        tooltip="What is transparent in the picture: the mask from Load Image, 1 where nothing is seen. It is enlarged "
        "and the result has it as a fourth channel. A mask of zeros, which pictures without transparency have, "
        "changes nothing.",
    )


def report_output() -> io.Output:
    """Text for people."""
    return io.String.Output(
        display_name="report",
        tooltip="What was done, in a few lines: size and time, steps, model, then the memory plan with its predicted "
        "peak (and the measured one). Connect Preview as Text to read it.",
    )

"""What the schemas share: link types, the category, inputs of several nodes, fields that only newer ComfyUIs know."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from comfy_api.latest import io

CATEGORY = "image/upscaling/Inf-DiT"
MAX_BUDGET = 64.0  # GiB
MAX_SEED = 2**64 - 1

InfDiTModel = io.Custom("INFDIT_MODEL")
InfDiTCLIP = io.Custom("INFDIT_CLIP")
InfDiTConditioning = io.Custom("INFDIT_CONDITIONING")

SLIDER = io.NumberDisplay.slider
ADVANCED = {"advanced": True}  # as extra_dict: io's own keyword for it exists only since 0.10


def search_aliases(*names: str) -> dict[str, Sequence[str]]:
    """Other names to find a node by, as keywords for io.Schema: none where it has no such field (before 0.11).

    io.Schema raises TypeError for a keyword that it does not know, and then the whole pack fails to load.
    """
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return {"search_aliases": list(names)} if "search_aliases" in known else {}


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
        "memory_budget", default=0.0, min=0.0, max=MAX_BUDGET, step=0.05, round=0.01, display_mode=SLIDER,
        tooltip=tooltip,
    )  # fmt: skip


RUN_BUDGET = (
    "GiB of the graphics card's memory that this run may hold, model included (without a card: of main memory). The "
    "picture is the same with any, only the time differs. 0: as much as makes it fast, if unloading other models can "
    "free that; otherwise what is free then."
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
        tooltip="What was done, in a few lines: size, steps, memory plan, predicted peak (and on a card the "
        "measured one), time. Connect Preview as Text to read it.",
    )

"""What a page shows and asks for: pictures as ComfyUI has them, the bar, the live picture, the stop button."""

from __future__ import annotations

import sys
import time

import comfy.model_management as mm
import torch
from comfy.utils import ProgressBar
from PIL import Image
from torch import Tensor

from ..infdit import Report
from ..infdit.upscale import PREVIEW_SIDE, Preview

BAR_INTERVAL = 0.1  # seconds between two moves of the bar: each is a message to every open page
TEXT_INTERVAL = 0.5  # likewise, of the text under it


def from_image(image: Tensor) -> Tensor:
    """ComfyUI's IMAGE or MASK, on any device, maybe of half precision, → float32 on the CPU. Not to be changed."""
    return image.float().cpu()


def to_image(image: Tensor) -> Tensor:
    """A picture → ComfyUI's IMAGE or MASK: where, and in the dtype that, this ComfyUI wants to have it."""
    dtype = mm.intermediate_dtype() if hasattr(mm, "intermediate_dtype") else torch.float32  # since 0.18
    return image.to(mm.intermediate_device(), dtype)


class Bar:
    """The bar, the live picture and a line of text on the node that runs, and its stop button.

    Raises, when moved:
        InterruptProcessingException: the user has pressed stop.
    """

    def __init__(self, node_id: str | None = None) -> None:
        self._node_id = node_id
        self._bar: ProgressBar | None = None
        self._began, self._prepared = time.monotonic(), 0
        self._shown = self._told = float("-inf")

    def move(self, done: int, total: int, preview: Preview | None = None, text: str = "") -> None:
        """Show what is done of a total."""
        mm.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        if preview is None and done < total and now - self._shown < BAR_INTERVAL:
            return
        bar = self._bar = self._bar or ProgressBar(total)
        picture = None if preview is None else ("JPEG", Image.fromarray(preview().numpy()), PREVIEW_SIDE)
        bar.update_absolute(done, total, picture)
        self._shown = now
        if text and now - self._told >= TEXT_INTERVAL:
            self.tell(text)

    def show(self, report: Report, done: int, total: int, preview: Preview | None) -> None:
        """Move, with the time left in words: `progress` of `infdit.upscale`, whose report says what it does."""
        if report.doing == "preparing":  # at a pace of its own
            self._began, self._prepared = time.monotonic(), done
            self.move(done, total, preview, "preparing")
            return
        left = (time.monotonic() - self._began) * (total - done) / max(1, done - self._prepared)
        self.move(done, total, preview, f"{done / total:.0%}, {duration(left)} left")

    def fill(self) -> None:
        """Show that all is done: a sampler may have needed fewer evaluations than were counted on."""
        if self._bar is not None and self._bar.current < self._bar.total:
            self._bar.update_absolute(self._bar.total)

    def tell(self, text: str) -> None:
        """Show a line of text on the node, where there is a page to show it."""
        self._told = time.monotonic()
        server = getattr(sys.modules.get("server"), "PromptServer", None)  # not imported: tests run without one
        send = getattr(getattr(server, "instance", None), "send_progress_text", None)
        if send is not None and self._node_id is not None:
            send(text, self._node_id)


def duration(seconds: float) -> str:
    """A time for people."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

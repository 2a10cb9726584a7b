"""What whoever watches a run is told: how much is done, and live pictures of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import Canvas
from .samplers import State

if TYPE_CHECKING:
    from .run import Report

PREVIEW_SIDE = 512  # pixels
PREVIEW_SHARE = 0.02  # of the time at most, for pictures of what is not whole yet
PREVIEW_DELAY = 0.5  # seconds before the first of them: short runs need none

Preview = Callable[[], Tensor]
Progress = Callable[[int, int, "Preview | None"], None]


class PictureState(State):
    """Where the sampler stands, in which picture of the batch, and how many passes over it are still to come."""

    picture: int
    left: int


class Watcher:
    """Turns "so much is done" and "a step is done" into progress(done, total, preview), and notes the steps' seconds.

    done and total count rows of pictures that are prepared, layers × blocks × evaluations, and strips that are made
    faithful; done falls back when memory ran out and an evaluation is repeated. preview is None, or a function that
    makes a picture of what is there as (h, w, 3) uint8, at most 512 pixels a side: after each step what is denoised,
    and within a step, as often as takes little time, its blocks that are done over what was there before.
    """

    def __init__(
        self, progress: Progress | None, total: int, steps: int, callback: Callable[[PictureState], None] | None,
        report: Report,
    ) -> None:
        self._progress, self._total, self._steps, self._callback = progress, total, steps, callback
        self._done, self._report, self._began = 0, report, time.monotonic()
        self._due = self._began + PREVIEW_DELAY  # when a picture of what is not whole may be shown again
        self._under: Tensor | None = None  # what was shown whole of this picture

    def advance(self, done: int) -> None:
        """Say how much is done."""
        self._done = done
        if self._progress is not None:
            self._progress(self._done, self._total, None)

    def step(self, state: PictureState) -> None:
        """Say that the first evaluation of a step is done, and note how long the last one took."""
        now = time.monotonic()
        self._report.seconds.append(now - self._began)
        self._began = now
        if self._callback is not None:
            self._callback(state)
        denoised, more = state["denoised"], state["i"] < self._steps - 1
        self._under = None

        def whole() -> Tensor:
            shown = _preview(denoised, self._report.size)
            self._under = shown if more else None  # the next evaluation may be of another picture
            return shown

        self._show(whole)

    def painted(self, canvas: Canvas, up: Tensor) -> None:
        """Show what is not whole yet, if that is due."""
        if time.monotonic() < self._due:
            return

        def partly() -> Tensor:
            if self._under is None:
                self._under = _preview(up, self._report.size)
            return _preview(canvas.image, self._report.size, canvas.there, self._under)

        self._show(partly)

    def _show(self, preview: Preview) -> None:
        if self._progress is not None:
            began = time.monotonic()
            self._progress(self._done, self._total, preview)
            now = time.monotonic()
            self._due = max(self._due, now + (now - began) / PREVIEW_SHARE)


def _preview(
    picture: Tensor, size: tuple[int, int], there: Callable[[int], Tensor] | None = None, under: Tensor | None = None
) -> Tensor:
    """A picture in [-1, 1] (B, 3, ≥ height, ≥ width), the first of B, as (h, w, 3) uint8; what is not there from under.

    there: see `Canvas.there`; under: another preview.
    """
    height, width = size
    shrink = min(1.0, PREVIEW_SIDE / max(size))
    small = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    stride = max(1, int(0.5 / shrink))  # twice the preview's size is enough to leave the device
    seen = picture[:1, :, :height:stride, :width:stride].cpu().float()
    if there is not None and under is not None:
        beneath = F.interpolate(under.movedim(-1, 0)[None] / 127.5 - 1, seen.shape[-2:])
        seen = torch.where(there(stride)[: seen.shape[-2], : seen.shape[-1]], seen, beneath)
    seen = F.interpolate(seen, size=small, mode="bilinear", antialias=True)
    return ((seen[0].clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).movedim(0, -1)

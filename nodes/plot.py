"""A memory plan as a picture: for each memory how much of it is taken, a thin bar, and by what, a thick one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..infdit.memory.planner import format_bytes

WIDTH, MARGIN, BAR, GAUGE = 1024, 40, 60, 12  # pixels
BACKGROUND, TRACK, TEXT, FAINT = "#16191f", "#2b313c", "#f2f4f7", "#b4bcc8"
GOOD, BAD = "#5fd38d", "#ff7a6b"
# Okabe and Ito's colours, which colour-blind people can tell apart
COLOURS = {
    "weights": "#56b4e9",
    "keys and values": "#e69f00",
    "hidden states": "#009e73",
    "pictures": "#cc79a7",
    "workspace": "#f0e442",
}


@dataclass(frozen=True)
class MemoryBar:
    """One memory.

    Attributes:
        name: of the memory.
        parts: bytes by what they are for, by the names of COLOURS.
        limit: bytes that may be used, and what sets the limit.
    """

    name: str
    parts: dict[str, int]
    limit: int
    limit_name: str

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    @property
    def line(self) -> str:
        """In words."""
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.parts.items() if size)
        limit = f"{self.limit_name} {format_bytes(self.limit)}"
        return f"{self.name}: {format_bytes(self.total)} of {limit}: {parts}"


def draw(title: str, verdict: str, fits: bool, bars: Sequence[MemoryBar], lines: Sequence[str]) -> Tensor:
    """(1, h, w, 3) in 0..1."""
    canvas = _Canvas()
    canvas.text(title, 34, TEXT)
    canvas.text(verdict, 26, GOOD if fits else BAD)
    for bar in bars:
        canvas.gap(22)
        _draw_bar(canvas, bar)
    canvas.gap(26)
    for line in lines:
        canvas.text(line, 20, FAINT)
    return torch.from_numpy(np.array(canvas.cropped())).float()[None] / 255


def _draw_bar(canvas: _Canvas, bar: MemoryBar) -> None:
    share = f"{bar.total / bar.limit:.0%} of " if bar.limit else "more than "
    limit = f"{share}{bar.limit_name} {format_bytes(bar.limit)}"
    canvas.text(f"{bar.name}: {format_bytes(bar.total)}, {limit}", 24, TEXT)
    canvas.gap(8)
    _gauge(canvas, bar)
    _composition(canvas, bar)
    _legend(canvas, bar)


def _gauge(canvas: _Canvas, bar: MemoryBar) -> None:
    """How far the limit is: a thin bar."""
    scale = (WIDTH - 2 * MARGIN) / max(bar.total, bar.limit, 1)
    edge = MARGIN + bar.limit * scale
    end = MARGIN + max(3, bar.total * scale)
    canvas.box(MARGIN, canvas.y, edge, canvas.y + GAUGE, TRACK)
    canvas.box(MARGIN, canvas.y, min(end, edge), canvas.y + GAUGE, GOOD if bar.total <= bar.limit else TEXT)
    canvas.box(edge, canvas.y, end, canvas.y + GAUGE, BAD)
    canvas.gap(GAUGE + 8)


def _composition(canvas: _Canvas, bar: MemoryBar) -> None:
    """What it consists of: a thick bar."""
    scale = (WIDTH - 2 * MARGIN) / max(bar.total, 1)
    left = float(MARGIN)
    for name, size in bar.parts.items():
        canvas.box(left, canvas.y, left + size * scale, canvas.y + BAR, COLOURS[name])
        left += size * scale
    canvas.gap(BAR + 10)


def _legend(canvas: _Canvas, bar: MemoryBar) -> None:
    shown = [(name, size) for name, size in bar.parts.items() if size]
    column = (WIDTH - 2 * MARGIN) // 3
    for start in range(0, len(shown), 3):
        for i, (name, size) in enumerate(shown[start : start + 3]):
            x = MARGIN + i * column
            canvas.box(x, canvas.y + 4, x + 18, canvas.y + 22, COLOURS[name])
            canvas.label(x + 28, canvas.y, f"{name} {format_bytes(size)}", 20, TEXT)
        canvas.gap(32)


class _Canvas:
    """A picture that is written from top to bottom."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, 2048), BACKGROUND)
        self.y = float(MARGIN) - 8
        self._draw = ImageDraw.Draw(self.image)

    def gap(self, height: float) -> None:
        self.y += height

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        if right - left >= 0.5:
            self._draw.rectangle((round(left), round(top), max(round(left), round(right) - 1), round(bottom)), colour)

    def label(self, x: float, y: float, text: str, size: int, colour: str) -> None:
        self._draw.text((x, y), text, fill=colour, font=_font(size))

    def text(self, text: str, size: int, colour: str) -> None:
        """A paragraph."""
        for line in self._wrapped(text, _font(size)):
            self.label(MARGIN, self.y, line, size, colour)
            self.y += round(size * 1.4)

    def _wrapped(self, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
        lines = [""]  # Pillow's own font has no ×
        for word in text.replace("×", "x").split():
            longer = f"{lines[-1]} {word}".strip()
            if self._draw.textlength(longer, font=font) <= WIDTH - 2 * MARGIN or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(word)
        return lines

    def cropped(self) -> Image.Image:
        return self.image.crop((0, 0, WIDTH, min(self.image.height, round(self.y) + MARGIN - 12)))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError, ImportError):  # Pillow before 10.1, or without FreeType: one small size
        return ImageFont.load_default()

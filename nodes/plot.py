"""A memory plan as a picture: for each memory how much of it is taken, a thin bar, and by what, a thick one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..infdit.planner import amount

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
class Filling:
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


def draw(title: str, verdict: str, fits: bool, fillings: Sequence[Filling], lines: Sequence[str]) -> Tensor:
    """(1, h, w, 3) in 0..1."""
    canvas = _Canvas()
    canvas.text(title, 34, TEXT)
    canvas.text(verdict, 26, GOOD if fits else BAD)
    for filling in fillings:
        canvas.gap(22)
        _draw_filling(canvas, filling)
    canvas.gap(26)
    for line in lines:
        canvas.text(line, 20, FAINT)
    return torch.from_numpy(np.array(canvas.cropped())).float()[None] / 255


def _draw_filling(canvas: _Canvas, filling: Filling) -> None:
    share = f"{filling.total / filling.limit:.0%} of " if filling.limit else "more than "
    limit = f"{share}{filling.limit_name} {amount(filling.limit)}"
    canvas.text(f"{filling.name}: {amount(filling.total)}, {limit}", 24, TEXT)
    canvas.gap(8)
    _gauge(canvas, filling)
    _composition(canvas, filling)
    _legend(canvas, filling)


def _gauge(canvas: _Canvas, filling: Filling) -> None:
    """How far the limit is: a thin bar."""
    scale = (WIDTH - 2 * MARGIN) / max(filling.total, filling.limit, 1)
    edge = MARGIN + filling.limit * scale
    end = MARGIN + max(3, filling.total * scale)
    canvas.box(MARGIN, canvas.y, edge, canvas.y + GAUGE, TRACK)
    canvas.box(MARGIN, canvas.y, min(end, edge), canvas.y + GAUGE, GOOD if filling.total <= filling.limit else TEXT)
    canvas.box(edge, canvas.y, end, canvas.y + GAUGE, BAD)
    canvas.gap(GAUGE + 8)


def _composition(canvas: _Canvas, filling: Filling) -> None:
    """What it consists of: a thick bar."""
    scale = (WIDTH - 2 * MARGIN) / max(filling.total, 1)
    left = float(MARGIN)
    for name, size in filling.parts.items():
        canvas.box(left, canvas.y, left + size * scale, canvas.y + BAR, COLOURS[name])
        left += size * scale
    canvas.gap(BAR + 10)


def _legend(canvas: _Canvas, filling: Filling) -> None:
    shown = [(name, size) for name, size in filling.parts.items() if size]
    column = (WIDTH - 2 * MARGIN) // 3
    for start in range(0, len(shown), 3):
        for i, (name, size) in enumerate(shown[start : start + 3]):
            x = MARGIN + i * column
            canvas.box(x, canvas.y + 4, x + 18, canvas.y + 22, COLOURS[name])
            canvas.label(x + 28, canvas.y, f"{name} {amount(size)}", 20, TEXT)
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

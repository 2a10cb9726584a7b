"""Pictures drawn by code: text, lines and curves at every angle, lattices, panels, flat colour.

Photographs hold few of them, generators and editors make many, and the eye sees a stair in a line before anything else.
Everything is drawn at four times the size and made smaller by area, so that edges are antialiased as a renderer's are.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FINE = 4  # drawn pixels per pixel along each axis
Colour = tuple[int, int, int]
LETTERS = string.ascii_letters + string.digits + "  .,;:!?()-+=/&%@#"


def draw(side: int, rng: np.random.Generator) -> np.ndarray:
    """A random drawing, (side, side, 3) uint8."""
    kinds = (_text, _text, _strokes, _strokes, _shapes, _lattice, _panels, _flat)
    background, ink = _colours(rng)
    canvas = Image.new("RGB", (side * FINE, side * FINE), background)
    kinds[int(rng.integers(len(kinds)))](canvas, ink, rng)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX))


def _colours(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """Background and ink: half the time black on white or white on black, else colours, pure ones among them."""
    pair = ((255, 255, 255), (0, 0, 0)) if rng.random() < 0.5 else (_colour(rng), _colour(rng))
    background, ink = pair
    return (background, ink) if rng.random() < 0.7 else (ink, background)


def _colour(rng: np.random.Generator) -> Colour:
    levels = rng.choice((0, 255), 3) if rng.random() < 0.3 else rng.integers(0, 256, 3)
    return int(levels[0]), int(levels[1]), int(levels[2])


def _inks(ink: Colour, rng: np.random.Generator) -> Callable[[], Colour]:
    """The same ink for all parts of a drawing, or another for each."""
    return (lambda: ink) if rng.random() < 0.6 else (lambda: _colour(rng))


def _text(canvas: Image.Image, ink: Colour, rng: np.random.Generator) -> None:
    pen, pick, side = ImageDraw.Draw(canvas), _inks(ink, rng), canvas.width
    size = round(math.exp(rng.uniform(math.log(14), math.log(90)))) * FINE
    font = ImageFont.load_default(size)
    top = -float(rng.uniform(0, size))
    while top < side:
        line = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=side * 3 // size + 2))
        pen.text((-float(rng.uniform(0, size)), top), line, fill=pick(), font=font)
        top += size * float(rng.uniform(1.0, 1.5))
    if rng.random() < 0.25:
        canvas.paste(canvas.rotate(float(rng.uniform(-30, 30)), Image.Resampling.BILINEAR))


def _strokes(canvas: Image.Image, ink: Colour, rng: np.random.Generator) -> None:
    """Lines, arcs and hair: bundles of curves that run beside each other."""
    pen, pick, side = ImageDraw.Draw(canvas), _inks(ink, rng), canvas.width
    for _ in range(int(rng.integers(2, 14))):
        width = round(FINE * math.exp(rng.uniform(0, math.log(9))))
        angle, middle = rng.uniform(0, 2 * math.pi), rng.uniform(0, side, 2)
        ahead = np.array([math.cos(angle), math.sin(angle)])
        bend = rng.normal(0, 1.2) if rng.random() < 0.5 else 0.0  # of the curve, in radians along the picture
        along = np.linspace(-1, 1, 65)[:, None]
        turned = np.array([-ahead[1], ahead[0]])
        curve = middle + side * (along * ahead + bend * along**2 / 2 * turned)
        for i in range(int(rng.integers(1, 6))):
            shifted = curve + turned * i * width * float(rng.uniform(2, 5))
            pen.line([(float(x), float(y)) for x, y in shifted], fill=pick(), width=width, joint="curve")


def _shapes(canvas: Image.Image, ink: Colour, rng: np.random.Generator) -> None:
    pen, pick, side = ImageDraw.Draw(canvas), _inks(ink, rng), canvas.width
    for _ in range(int(rng.integers(1, 9))):
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), side * rng.uniform(0.03, 0.5)
        box = (x - r, y - r * rng.uniform(0.3, 1), x + r, y + r)
        width = round(FINE * rng.uniform(1, 10))
        match int(rng.integers(3)):
            case 0:
                pen.ellipse(box, fill=pick())
            case 1:
                pen.ellipse(box, outline=pick(), width=width)
            case _:
                corners = rng.uniform(-r, r, (int(rng.integers(3, 6)), 2)) + np.array([x, y])
                pen.polygon([(float(a), float(b)) for a, b in corners], fill=pick())


def _lattice(canvas: Image.Image, ink: Colour, rng: np.random.Generator) -> None:
    """Stripes, bars or checks at an angle, no finer than the low-resolution picture can hold."""
    y, x = np.mgrid[: canvas.height, : canvas.width]
    angle = 0.0 if rng.random() < 0.2 else rng.uniform(0, 2 * math.pi)
    period = FINE * math.exp(rng.uniform(math.log(10), math.log(48)))
    duty = rng.uniform(0.3, 0.7)
    first = (x * math.cos(angle) + y * math.sin(angle)) / period % 1 < duty
    other = (y * math.cos(angle) - x * math.sin(angle)) / period % 1 < duty
    mask = (first, first & other, first ^ other)[int(rng.integers(3))]
    canvas.paste(ink, mask=Image.fromarray(mask.astype(np.uint8) * 255))


def _panels(canvas: Image.Image, ink: Colour, rng: np.random.Generator) -> None:
    """A screenshot: panels with borders of whole pixels, gradients, small text."""
    pen, pick, side = ImageDraw.Draw(canvas), _inks(ink, rng), canvas.width
    for _ in range(int(rng.integers(2, 8))):
        left, top = (int(v) * FINE for v in rng.integers(-20, side // FINE, 2))
        right, bottom = left + int(rng.integers(10, 200)) * FINE, top + int(rng.integers(10, 120)) * FINE
        line = FINE * int(rng.integers(1, 5))
        pen.rounded_rectangle((left, top, right, bottom), int(rng.choice((0, 0, 16, 40))), pick(), pick(), line)
        size = int(rng.integers(12, 30)) * FINE
        words = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=12))
        pen.text((left + size / 2, top + size / 2), words, fill=_colour(rng), font=ImageFont.load_default(size))


def _flat(canvas: Image.Image, ink: Colour, rng: np.random.Generator) -> None:
    """One colour, two colours, or a gradient between two."""
    if rng.random() < 0.4:
        y, x = np.mgrid[: canvas.height, : canvas.width] / canvas.width
        angle = rng.uniform(0, 2 * math.pi)
        ramp = 127.5 + 180 * ((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle))
        canvas.paste(ink, mask=Image.fromarray(np.clip(ramp, 0, 255).astype(np.uint8)))
    elif rng.random() < 0.3:
        canvas.paste(ink, (0, 0, canvas.width, int(rng.integers(canvas.height))))

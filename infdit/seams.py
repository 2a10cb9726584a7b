"""How much the lines show along which a network works, between its patches and between its blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STRIP = 64  # rows at a time
LUMA = 0.299, 0.587, 0.114  # BT.601, of R, G and B


def seams(picture: Tensor, periods: Sequence[int], told: Callable[[int], None]) -> list[float]:
    """Mean step of luma across the lines of each period over the mean step elsewhere; nan where there is no line.

    1 where a grid cannot be told. A picture enlarged by four has somewhat more by nature: what is certain changes most
    half way between two known pixels.

    Args:
        picture: (3, H, W) in 0..1 on the CPU.
        periods: in pixels; lines lie before the pixels period, 2·period, …
        told: is called several times a second, with 0.
    """
    weights = torch.tensor(LUMA, dtype=torch.float64, device="cpu")
    found = [(0.0, 0, 0.0, 0) for _ in periods]  # sum and number of the steps across lines, and of all
    for top in range(0, picture.shape[1], STRIP):
        luma = torch.tensordot(weights, picture[:, top : top + STRIP + 1].double(), 1)
        # the row after the strip belongs to the next: only the step to it is of this one
        for steps, first in ((luma.diff(dim=0), top + 1), (luma[:STRIP].diff(dim=1).mT, 1)):
            each, length = steps.abs().sum(1), steps.shape[1]
            for n, period in enumerate(periods):
                lines, (across, counted, total, count) = each[-first % period :: period], found[n]
                across, total = across + lines.sum().item(), total + each.sum().item()
                found[n] = across, counted + len(lines) * length, total, count + len(each) * length
        told(0)
    return [_ratio(*sums) for sums in found]


def _ratio(across: float, lines: int, total: float, count: int) -> float:
    if lines in (0, count):
        return math.nan
    mean, elsewhere = across / lines, max(0.0, total - across) / (count - lines)
    return mean / elsewhere if elsewhere else 1.0 if not mean else math.inf

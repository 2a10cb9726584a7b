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
    across, elsewhere = ([[0.0, 0] for _ in periods] for _ in range(2))  # sums of steps, and how many they are
    for top in range(0, picture.shape[1], STRIP):
        luma = torch.tensordot(weights, picture[:, top : top + STRIP + 1].double(), 1)
        # the row after the strip belongs to the next: only the step to it is of this one
        for steps, first in ((luma.diff(dim=0), top + 1), (luma[:STRIP].diff(dim=1).mT, 1)):
            totals = steps.abs().sum(1)
            for n, period in enumerate(periods):
                lines = totals[-first % period :: period]
                sums = lines.sum().item(), totals.sum().item()
                counts = len(lines) * steps.shape[1], len(totals) * steps.shape[1]
                across[n] = [across[n][0] + sums[0], across[n][1] + counts[0]]
                elsewhere[n] = [elsewhere[n][0] + sums[1] - sums[0], elsewhere[n][1] + counts[1] - counts[0]]
        told(0)
    return [_ratio(a, b) for a, b in zip(across, elsewhere, strict=True)]


def _ratio(a: Sequence[float], b: Sequence[float]) -> float:
    if not (a[1] and b[1]):
        return math.nan
    mean, usual = a[0] / a[1], b[0] / b[1]
    return mean / usual if usual else 1.0 if not mean else math.inf

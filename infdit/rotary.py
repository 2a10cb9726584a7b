"""Rotary positions (Su et al. 2021) of two axes: half of a head's pairs turn by the token's row, half by its column."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_angles(rows: Tensor, columns: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Angles that turn the pairs of a head: the first half by the token's row, the second by its column.

    Args:
        rows, columns: (N, side) positions in patches.
        head_dim: d.
        dtype: float32 or float64.

    Returns:
        (N, side·side, d/2): pos · 10000^(−4j/d) for pair j < d/4 of each half.
    """
    pairs = torch.arange(head_dim // 4, device=rows.device, dtype=dtype)
    frequencies = torch.exp(-math.log(10000) * 4 / head_dim * pairs)
    side = rows.shape[1]
    by_row = (rows[..., None] * frequencies)[:, :, None].expand(-1, side, side, -1)
    by_column = (columns[..., None] * frequencies)[:, None].expand(-1, side, side, -1)
    return torch.cat((by_row, by_column), -1).flatten(1, 2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the interleaved pairs of x (…, T, H, d) by angles (…, T, d/2), in the angles' precision."""
    a, b = x.to(angles.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos()[..., None, :], angles.sin()[..., None, :]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)

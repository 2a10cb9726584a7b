"""Rotary positions (Su et al. 2021) of two axes: half of a head's pairs turn by the token's row, half by its column."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_turns(rows: Tensor, columns: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Complex numbers that turn the pairs of a head: the first half by the token's row, the second by its column.

    Args:
        rows, columns: (N, side) positions in patches.
        head_dim: d.
        dtype: float32 or float64, of their real parts.

    Returns:
        (N, side·side, d/2): e^(i·pos·10000^(−4j/d)) for pair j < d/4 of each half.
    """
    pairs = torch.arange(head_dim // 4, device=rows.device, dtype=dtype)
    frequencies = torch.exp(-math.log(10000) * 4 / head_dim * pairs)
    angles, side = (positions[..., None] * frequencies for positions in (rows, columns)), rows.shape[1]
    by_row, by_column = (torch.polar(torch.ones_like(angle), angle) for angle in angles)
    by_row, by_column = by_row[:, :, None].expand(-1, side, side, -1), by_column[:, None].expand(-1, side, side, -1)
    return torch.cat((by_row, by_column), -1).flatten(1, 2)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the interleaved pairs of x (…, T, H, d) by turns (…, T, d/2): of the turns' precision."""
    wide = x.to(turns.dtype.to_real())
    pairs, turns = torch.view_as_complex(wide.unflatten(-1, (-1, 2))), turns[..., None, :]
    return torch.view_as_real(pairs * turns if wide is x else pairs.mul_(turns)).flatten(-2)

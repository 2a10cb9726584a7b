"""Norm and rotation of queries and keys as one kernel of Triton: each is read once and written once.

It rounds where PyTorch's operations do; sums are added in another order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn


def norm_and_turn(qk: Tensor, norm: nn.LayerNorm, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, normalised and turned, (B, N, T, H, d) each.

    Args:
        qk: (B, N, T, 2·H, d), contiguous: heads of queries, of keys.
        norm: of both.
        turns: (N, T, d/2), complex64, see `rotary_turns`.
    """
    *tokens, both, width = qk.shape
    heads = both // 2
    q, k = (qk.new_empty((*tokens, heads, width)) for _ in range(2))
    rows, pairs = (triton.next_power_of_2(n) for n in (heads, width // 2))
    parts = torch.view_as_real(turns)
    with torch.cuda.device_of(qk):
        launch: Any = _kernel[q.numel() // (heads * width), 2]
        launch(qk, parts, norm.weight, norm.bias, q, k, parts.numel() // width, norm.eps, heads, width, rows, pairs)
    return q, k


@triton.jit
def _kernel(
    qk: tl.tensor, turns: tl.tensor, weight: tl.tensor, bias: tl.tensor, q: tl.tensor, k: tl.tensor,
    period: tl.tensor, eps: tl.tensor,
    heads: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
) -> None:  # fmt: skip
    """Queries or keys of one token, as (ROWS, PAIRS, 2) of which (heads, width/2, 2) are there."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, pair, side = tl.arange(0, ROWS)[:, None, None], tl.arange(0, PAIRS)[None, :, None], tl.arange(0, 2)[None, None]
    column = 2 * pair + side
    there = (row < heads) & (column < width)
    x = tl.load(qk + (2 * token + part) * heads * width + row * width + column, there, 0.0).to(tl.float32)
    x = tl.where(there, x - (tl.sum(tl.sum(x, 2), 1) / width)[:, None, None], 0.0)
    x *= tl.rsqrt(tl.sum(tl.sum(x * x, 2), 1) / width + eps)[:, None, None]
    x = x * tl.load(weight + column, column < width, 0.0) + tl.load(bias + column, column < width, 0.0)
    dtype = qk.dtype.element_ty  # pyright: ignore[reportAttributeAccessIssue] - which pointers have
    real, imaginary = tl.split(x.to(dtype).to(tl.float32))
    cos, sin = tl.split(tl.load(turns + token % period * width + column, column < width, 0.0))
    turned = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos).to(dtype)
    tl.store((q if part == 0 else k) + token * heads * width + row * width + column, turned, there)

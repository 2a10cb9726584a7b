"""Softmax attention, with or without a kernel that holds no matrix of scores.

PyTorch has fused kernels for most devices, but not for Apple chips, DirectML, older AMD cards, nor for float64 on CUDA.
There the scores of a chunk of the published model would be gigabytes. So they are computed in pieces over blocks, heads
and queries, in float32 or better, and what a piece takes is known beforehand.

N blocks, H heads, T queries, K keys, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

SCORES = 2**23  # of a piece, at most, unless one query has more keys: 32 MiB in float32


@cache
def fused(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch has a kernel there that holds no scores: as it says itself; of a card that is not here: yes."""
    if device.type not in ("cpu", "cuda", "xpu"):
        return False
    try:
        q, k = (torch.empty((1, 1, length, head_dim), dtype=dtype, device=device) for length in (16, 64))
        return torch.ops.aten._fused_sdp_choice(q, k, k) != SDPBackend.MATH.value  # what the function below chooses by
    except (RuntimeError, AssertionError, AttributeError):
        return device.type == "cuda" and dtype.itemsize <= 4


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q (N, H, T, d) to k and v (N, H, K, d): (N, H, T, d), heads of a token side by side."""
    if fused(q.device, q.dtype, q.shape[-1]):
        return F.scaled_dot_product_attention(q, k, v)
    result = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    for n, h, t in product(*map(_slices, q.shape[:3], _piece(q.shape[:3], k.shape[2]))):
        result[n, h, t] = _attend(q[n, h, t], k[n, h], v[n, h])
    return result


def piece_bytes(shape: tuple[int, int, int], keys: int, head_dim: int, itemsize: int) -> int:
    """Bytes that attention takes beside its result where it is not fused.

    shape: N, H, T; keys: K; itemsize: of the dtype.
    """
    blocks, heads, queries = _piece(shape, keys)
    each = 2 * queries * keys + queries * head_dim + 2 * keys * head_dim  # scores and their softmax; q; k and v
    return blocks * heads * each * max(torch.float32.itemsize, itemsize)


def _piece(shape: tuple[int, ...], keys: int) -> tuple[int, int, int]:
    """Of how many blocks, heads and queries scores are computed at once."""
    blocks, heads, queries = shape
    rows = max(1, SCORES // keys)
    return (
        max(1, min(blocks, rows // (heads * queries))),
        max(1, min(heads, rows // queries)),
        min(queries, rows),
    )


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(begin, min(begin + step, size)) for begin in range(0, size, step))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one piece, in float32 or float64."""
    wide = torch.promote_types(q.dtype, torch.float32)

    def stacked(x: Tensor) -> Tensor:
        return x.to(wide, copy=True, memory_format=torch.contiguous_format).flatten(0, 1)

    keys, values = stacked(k).mul_(q.shape[-1] ** -0.5), stacked(v)
    weights = torch.bmm(stacked(q), keys.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, values).unflatten(0, q.shape[:2])

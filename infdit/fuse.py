"""Norm and rotation of queries and keys: by PyTorch's operations, or by one kernel where that is asked for.

The operations read and write all queries and keys four times, a third of the bytes that a layer moves beside its
products. The kernel has to be asked for, by an environment variable, for no card has measured yet what it brings. It is
not left to torch.compile: what that makes of the same operations on a CPU is six to eleven kernels, by the version and
the width, which move 160 MB and more where this one moves 42.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from .rotary import rotate

log = logging.getLogger(__name__)
SWITCH = "INFDIT_TRITON"  # environment variable
Kernel = Callable[[Tensor, nn.LayerNorm, Tensor], tuple[Tensor, Tensor]]


def queries_and_keys(qk: Tensor, norm: nn.LayerNorm, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, normalised and turned, (B, N, T, H, d) each; maybe of a wider dtype.

    Args:
        qk: (B, N, T, 2·H, d): heads of queries, then of keys.
        norm: of both.
        turns: (N, T, d/2), see `rotary_turns`.
    """
    kernel = None if qk.requires_grad or not os.environ.get(SWITCH) else _kernel(qk.device, qk.dtype)
    if kernel is not None:
        return kernel(qk, norm, turns)
    q, k = (rotate(part, turns) for part in norm(qk).chunk(2, -2))
    return (q.to(qk.dtype), k.to(qk.dtype)) if qk.requires_grad else (q, k)


@cache
def _kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """What is asked for, tried once; None, and a warning, where it cannot be had."""
    try:
        from .kernel import norm_and_turn

        if dtype.itemsize > 4:
            raise TypeError(f"it has none of {dtype}")
        norm = nn.LayerNorm(8, device=device, dtype=dtype)
        qk = torch.ones((1, 1, 2, 6, 8), device=device, dtype=dtype)
        norm_and_turn(qk, norm, torch.ones((1, 2, 4), device=device, dtype=torch.complex64))
    except Exception as error:  # noqa: BLE001 - whatever a compiler says, or that there is none
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("%s is set, and Triton has no kernel for %s (%s): the run does without", SWITCH, device, reason)
        return None
    return norm_and_turn

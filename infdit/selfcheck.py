"""A device that computes something else than the CPU is found out before it makes a picture.

Backends have been silently wrong: an index_copy_ into strided memory, a fused attention, half precision. So the first
use of a device and dtype evaluates a toy network there and on the CPU, over 3×3 blocks and a seam of positions, once
with everything on the device and once with all that can be on the host.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from .config import LR_FACTOR, InfDiTConfig
from .denoiser import Conditioning, Denoiser
from .device import PinFailed, WrongNumbers
from .memory.plan import CPU, MemoryPlan, Workload
from .model import InfDiT

SKIP = "INFDIT_SKIP_SELF_CHECK"  # environment variable
LIMIT = 0.05  # of the numbers' size, in the worst block: rounding to bfloat16 is 0.013, faults are 0.15 and more
_TOY = InfDiTConfig(2, 64, 2, block_size=16, vector_dim=0, position_period=8)
_PLANS = (MemoryPlan(1, 2), MemoryPlan(1, 2, "streamed", "host", "host"))
_SIGMA = 2.0


def check_device(workload: Workload) -> None:
    """Compare each device with the CPU, the first time in this process that it is used with a dtype.

    Raises:
        WrongNumbers: they differ; not if the environment variable INFDIT_SKIP_SELF_CHECK is set.
    """
    for device in workload.devices:
        if device.type != "cpu" and not os.environ.get(SKIP):
            _once(device, workload.dtype, workload.pinnable != 0)


@cache
def _once(device: torch.device, dtype: torch.dtype, pinned: bool) -> None:
    compare(device, dtype, pinned)


def compare(device: torch.device, dtype: torch.dtype, pinned: bool = True) -> float:
    """Evaluate the toy network on the CPU in float32 and on a device in a dtype; pinned: see `MemoryPlan`.

    Returns:
        By how much of the numbers' size they differ, in the worst block.

    Raises:
        WrongNumbers: they differ by more than rounding.
    """
    model, side = _toy_model(), 3 * _TOY.block_size
    generator = torch.Generator("cpu").manual_seed(1)
    lr, up, x = (
        torch.randn(1, 3, s, s, generator=generator, dtype=torch.float32, device="cpu")
        for s in (side // LR_FACTOR, side, side)
    )
    expected = Denoiser(model, Conditioning(lr, up), device=CPU)(x, _SIGMA)
    model.to(dtype)
    worst = 0.0
    for plan in _PLANS:
        images, plan = device if plan.images == "device" else CPU, replace(plan, pinned=pinned)
        try:
            evaluate = Denoiser(model, Conditioning(lr, up).to(images), plan, device=device)
            found = evaluate(x.to(images), _SIGMA).cpu()
        except PinFailed:
            continue  # a run does without, too
        error = _worst_block(found - expected) / expected.std().item()
        if not error <= LIMIT:
            raise WrongNumbers(
                f"{device} with PyTorch {torch.__version__} computes other numbers than the CPU in "
                f"{str(dtype).removeprefix('torch.')} (off by {error:.1g} of their size where {LIMIT} is rounding): "
                f"choose another dtype, the CPU or another PyTorch, or set {SKIP}=1 to run all the same"
            )
        worst = max(worst, error)
    return worst


def _worst_block(difference: Tensor) -> float:
    """The largest root mean square over a block of (1, 3, h, w)."""
    return math.sqrt(torch.nn.functional.avg_pool2d(difference**2, _TOY.block_size).mean(1).max().item())


def _toy_model() -> InfDiT:
    """Random weights under which every part counts: attention is peaked, and the ways back to the tokens are loud."""
    with torch.device("meta"):
        model = InfDiT(_TOY)
    generator, state = torch.Generator("cpu").manual_seed(0), dict[str, Tensor]()
    for name, parameter in model.named_parameters():
        size = 0.1 if name.endswith("bias") else 1
        if name.endswith("weight") and parameter.dim() == 2:
            size = (4 if name.endswith((".out.weight", "mlp.2.weight")) else 1) * parameter.shape[1] ** -0.5
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
        state[name] = drawn * size
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()

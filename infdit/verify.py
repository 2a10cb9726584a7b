"""What a plan holds, counted without holding it.

The whole of `upscale` runs on fake tensors, which have shapes and no memory, on a fake accelerator beside a fake host.
Of each evaluation only those chunks are computed where the peak can lie: of the first and of the last group of layers
the first two chunks, for the ring of keys and values is made whole by the first and what comes next is fetched, those
where most keys are turned into another frame, and the last two, when all hidden states are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from .config import LR_FACTOR, InfDiTConfig
from .grid import BlockGrid, Geometry
from .measure import PeakMeter
from .memory import MemoryPlan
from .model import InfDiT
from .offload import is_streamed
from .planner import Request
from .run import Report, Run
from .samplers import karras_sigmas, method_of
from .transfer import Tier
from .uniba import Skip
from .upscale import pictures

ACCELERATOR = "lazy:0"  # a device that PyTorch knows and that nobody has: only fake tensors can be on it
STEPS = 3  # after which a sampler holds all that it ever does


class _FlashAttention(TorchFunctionMode):
    """Attention as an accelerator's kernel computes it: no matrix of scores is ever held."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - PyTorch's own signature
        if func is F.scaled_dot_product_attention and args[0].device.type != "cpu":
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def counted_peak(request: Request, plan: MemoryPlan, whole: bool = False) -> dict[Tier, int]:
    """Bytes that `upscale` holds at most, on the device and on the host; `Request.footprint` foretells them.

    Args:
        request: the run, of pictures of a quarter of the result's sides and with noise from a seed.
        plan: its schedule.
        whole: compute every chunk; only slower.
    """
    config, target = request.config, (request.height, request.width)
    device = torch.device("cpu" if request.one_memory else ACCELERATOR)
    grid = BlockGrid.covering(*target, config.block_size, plan.sweep)
    sigmas = karras_sigmas(STEPS, 0.1, 1.0)
    with FakeTensorMode(allow_non_fake_inputs=True), _FlashAttention():
        model = _fake_model(config, request.dtype)
        image = torch.empty(request.batch, *(-(-side // LR_FACTOR) for side in target), 3)
        skip = None if whole else _thin(config, grid, plan)
        run = Run(model, plan, device, _refuse, lambda done: None, Report(), skip)
        held: dict[Tier, list[Tensor]] = {"device": [], "host": []}
        if request.one_memory:  # else they are copied to where they are wanted
            for name, parameter in model.named_parameters():
                held["host" if is_streamed(plan, name) else "device"].append(parameter)
        with PeakMeter(held, device) as meter:
            draws = (torch.empty(1, 3, grid.height, grid.width) for _ in range(request.batch))
            pictures(run, image, target, None, method_of(request.sampler), sigmas, draws, lambda state: None)
    return meter.peak


def _fake_model(config: InfDiTConfig, dtype: torch.dtype) -> InfDiT:
    with torch.device("meta"):
        model = InfDiT(config)
    state = {name: torch.empty(parameter.shape, dtype=dtype) for name, parameter in model.named_parameters()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def _thin(config: InfDiTConfig, grid: BlockGrid, plan: MemoryPlan) -> Skip:
    """Leave out what cannot hold more than what is computed."""
    geometry, chunks = Geometry(config, grid), list(grid.chunks(plan.chunk))
    wanted = {*chunks[:2], *chunks[-2:]}

    def turned(blocks: range) -> int:
        shifts = zip(*(geometry.frame_shifts(i) for i in blocks), strict=True)
        return sum(any(shift != (0, 0) for shift in slot) for slot in shifts)

    slots = [turned(blocks) for blocks in chunks]
    for order in (range(len(chunks)), range(len(chunks) - 1, -1, -1)):  # hidden states get more, in the last group less
        most = 0
        for i in order:
            if slots[i] > most:
                wanted.add(chunks[i])
                most = slots[i]

    def skip(layers: range, blocks: range) -> bool:
        return (layers.start > 0 and layers.stop < config.num_layers) or blocks not in wanted

    return skip


def _refuse(plan: MemoryPlan) -> MemoryPlan:
    raise AssertionError("fake tensors do not run out of memory")

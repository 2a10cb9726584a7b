"""Weights and memory in ComfyUI's hands.

Weights are ComfyUI's to move: they rest on its offload device and come to the compute device in one piece, which may
push other models out. A plan that streams them leaves them where they rest and has only its own peak made free.
Nothing is pushed out for more than a plan holds (and the reserve that ComfyUI keeps in any case).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..infdit import BudgetTooSmall, MemoryPlan, OutOfMemory, SamplingDefaults, load_model
from ..infdit.clip import CLIPEncoder, load_clip
from ..infdit.device import default_dtype, empty_caches, one_memory, out_of_memory
from ..infdit.memory.plan import CPU, Weights, Workload
from ..infdit.memory.planner import GIB, MARGIN, PlannedRun, fastest_plan, format_bytes, free_bytes, thrifty_plan
from ..infdit.model import InfDiT
from ..infdit.samplers import SamplerInfo
from ..infdit.upscale import workload_of
from .schema import MOST_BUDGET, number

# of ComfyUI's command line, those for diffusion models before those for all
FLAGS = {
    "fp32_unet": torch.float32, "bf16_unet": torch.bfloat16, "fp16_unet": torch.float16,
    "force_fp32": torch.float32, "force_fp16": torch.float16,
}  # fmt: skip
CLIP_WORKSPACE = 2**30  # bytes: a text tower of 0.5 GB in float32, and activations

T = TypeVar("T")


class InfDiTWeights(nn.Module):
    """A network in the form that ModelPatcher takes: one whose `device` can be assigned. ComfyUI logs its name."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.device = device


@dataclass(frozen=True, eq=False)
class ManagedModel:
    """What an INFDIT_MODEL link carries: a network whose weights ComfyUI manages."""

    name: str
    network: InfDiT
    patcher: ModelPatcher

    @property
    def device(self) -> torch.device:
        """The compute device."""
        return self.patcher.load_device

    @property
    def defaults(self) -> SamplingDefaults:
        """How it is sampled."""
        return self.network.defaults

    @property
    def listens(self) -> bool:
        """Whether it has a CLIP input."""
        return self.network.config.vector_dim > 0

    def workload(
        self,
        shape: Sequence[int],
        target: tuple[int, int],
        sampler: str | SamplerInfo | None = None,
        noise_given: bool = False,
    ) -> Workload:
        """What is to be planned: pictures of a shape (B, h, w, channels), enlarged to (height, width).

        Weights may stay on the host, but not where ComfyUI is told to keep all on the card.
        """
        stay = self.device.type != "cpu" and self.patcher.offload_device.type != "cpu"
        sampler = sampler or self.defaults.sampler
        workload = workload_of(
            self.network, shape, target, sampler, self.device, noise_given, "resident" if stay else None
        )
        return replace(workload, pinnable=pinnable())


@dataclass(frozen=True, eq=False)
class ManagedCLIP:
    """What an INFDIT_CLIP link carries."""

    name: str
    encoder: CLIPEncoder
    patcher: ModelPatcher
    warnings: tuple[str, ...] = ()


def managed_model(name: str, path: str, dtype: torch.dtype | None) -> ManagedModel:
    """Read a model to the offload device. dtype None: what ComfyUI would choose.

    Raises:
        CheckpointError: a file that cannot be used.
    """
    device, rest = mm.get_torch_device(), mm.unet_offload_device()
    network = load_model(path, dtype=dtype or comfy_dtype(device), device=rest)
    return ManagedModel(name, network, ModelPatcher(InfDiTWeights(network, rest), device, rest))


def comfy_dtype(device: torch.device) -> torch.dtype:
    """What ComfyUI would have a diffusion model compute in, by its flags and what it knows of the card.

    On a CPU, where it does not know bf16, what the library would.
    """
    for flag, dtype in FLAGS.items():
        if getattr(mm.args, flag, False):
            return dtype
    if device.type == "cpu":
        return default_dtype(device)
    if mm.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if mm.should_use_fp16(device) else torch.float32


def managed_clip(name: str, path: str) -> ManagedCLIP:
    """Read CLIP to the CPU, where it rests.

    Raises:
        CheckpointError, OpenCLIPMissingError: see `load_clip`.
    """
    device = mm.get_torch_device()
    encoder = load_clip(path, None if device.type == "cpu" else comfy_dtype(device), CPU)
    return ManagedCLIP(name, encoder, ModelPatcher(InfDiTWeights(encoder, CPU), device, CPU))


def obtainable(device: torch.device) -> int:
    """Bytes that a run can have here: what is free, and what ComfyUI can free by moving models out; less a margin.

    Where there is one memory, moving a model out frees nothing.
    """
    if one_memory(device):
        return free_bytes(device)
    models = [loaded for loaded in mm.current_loaded_models if loaded.device == device and loaded.model is not None]
    free = mm.get_free_memory(device) + sum(loaded.model_loaded_memory() for loaded in models)
    return int((free - mm.extra_reserved_memory()) * (1 - MARGIN))


def pinnable() -> int:
    """Bytes of main memory that ComfyUI would still pin: none with --disable-pinned-memory or where it never does."""
    return max(0, int(mm.MAX_PINNED_MEMORY - mm.TOTAL_PINNED_MEMORY))


def budget_bytes(gib: float) -> int | None:
    """A memory_budget in bytes; 0 is automatic, None.

    Raises:
        ValueError: no number, or below zero.
    """
    gib = number(gib, "memory_budget", 0, MOST_BUDGET)
    return max(1, round(gib * GIB)) if gib else None


def plan_run(workload: Workload, budget: int | None) -> PlannedRun:
    """A run with a plan. None: the smallest plan of those about as fast as any, or what is obtainable if that is less.

    Raises:
        BudgetTooSmall: no plan fits.
    """
    plan = _choose_plan(workload, budget)  # a smaller one, should memory run out, finds weights where this wants them
    return PlannedRun(replace(workload, weights=plan.weights), plan, partial(obtainable, workload.device))


def _choose_plan(workload: Workload, budget: int | None) -> MemoryPlan:
    room = obtainable(workload.device)
    if budget is None:
        thrifty = thrifty_plan(workload)
        if (thrifty.peak_bytes or 0) <= room:
            return thrifty
    asked = room if budget is None else min(budget, room)
    try:
        return fastest_plan(workload, max(1, asked))
    except BudgetTooSmall as error:
        if error.tier == "host":
            raise
        least = error.least
    raise BudgetTooSmall(_refusal(workload, budget, room, least), least)


def _refusal(workload: Workload, budget: int | None, room: int, least: int) -> str:
    """Why there is no plan, in the unit of memory_budget."""
    size, needed = f"{workload.width}×{workload.height}", math.ceil(least / GIB * 100) / 100
    if budget is not None and least <= room:
        return (
            f"memory {budget / GIB:.3g} GiB is too little: type {needed:g} at least for {size}, or 0, which is "
            "automatic"
        )
    place = "of memory" if workload.unified_memory else "on the graphics card"
    return (
        f"{size} takes {needed:g} GiB at least, and {format_bytes(max(0, room))} {place} is all that can be had here "
        "now: close other programs, or make a smaller picture"
    )


def with_weights(model: ManagedModel, plan: MemoryPlan, work: Callable[[InfDiT], T]) -> T:
    """work(network), with its weights where a plan wants them and room for the rest of it; then all else is given back.

    Raises:
        OutOfMemory: in place of whatever else says so, for then ComfyUI would unload all models.
    """
    try:
        return work(_bring(model, plan))
    except OutOfMemory as error:
        failure = str(error)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        failure = (
            f"out of memory on {model.device} beyond what was planned ({reason}): set memory GiB below "
            f"{max(0.01, (plan.peak_bytes or 0) / GIB):.2f}, close other programs, or make a smaller picture"
        )
    finally:
        _give_back(model.device)
    _give_back(model.device)  # only now nothing refers to the error any more, which kept all that the attempt held
    raise OutOfMemory(failure)


def _bring(model: ManagedModel, plan: MemoryPlan) -> InfDiT:
    peak = plan.peak_bytes or 0
    if plan.weights == "streamed":
        unload(model.patcher)
        mm.free_memory(peak, model.device)
        return model.network.to(CPU)
    beside = max(0, peak - Weights.of(model.network.config, model.network.dtype).total)
    mm.load_models_gpu([model.patcher], memory_required=beside, force_full_load=True)
    # --novram loads in part whatever it is asked for, and plain torch layers cannot compute from another device
    return model.network.to(model.device)


def unload(patcher: ModelPatcher) -> None:
    """Move a model's weights to where they rest, and no other's."""
    if patcher.load_device != patcher.offload_device:
        others = [loaded for loaded in mm.current_loaded_models if loaded.model is not patcher]
        mm.free_memory(1e30, patcher.load_device, keep_loaded=others)


def _give_back(device: torch.device) -> None:
    """What the allocators keep for themselves after a run, pinned memory of the host too."""
    mm.soft_empty_cache()
    empty_caches(device)


@contextmanager
def clip_at_work(clip: ManagedCLIP) -> Iterator[CLIPEncoder]:
    """The encoder on the compute device, or where it rests if there is no room; afterwards it is there again."""
    patcher = clip.patcher
    if patcher.load_device.type == "cpu" or obtainable(patcher.load_device) < patcher.model_size() + CLIP_WORKSPACE:
        yield clip.encoder
        return
    mm.load_models_gpu([patcher], memory_required=CLIP_WORKSPACE, force_full_load=True)
    try:
        yield clip.encoder.to(patcher.load_device)
    finally:
        unload(patcher)
        clip.encoder.to(CPU)

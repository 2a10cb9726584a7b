"""Weights and memory in ComfyUI's hands.

Weights are ComfyUI's to move: they rest on its offload device and come to the compute device in one piece, which may
push other models out. A plan that streams them leaves them where they rest and has only its own peak made free.
Nothing is pushed out for more than a plan holds (and the reserve that ComfyUI keeps in any case). Models that yield by
themselves (DynamicVRAM) are not pushed out at all: beside one of those ours comes for the time of a run.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..infdit import BudgetTooSmall, MemoryPlan, OutOfMemory, SamplingDefaults, load_model
from ..infdit.clip import CLIPEncoder, load_clip
from ..infdit.device import default_dtype, devices_of, empty_caches, one_memory, out_of_memory, same_device
from ..infdit.memory.footprint import Weights
from ..infdit.memory.plan import CPU, Workload
from ..infdit.memory.planner import (
    GIB,
    MARGIN,
    PlannedRun,
    fastest_plan,
    format_bytes,
    free_bytes,
    shared_plan,
    thrifty_plan,
)
from ..infdit.model import InfDiT
from ..infdit.samplers import SamplerInfo
from ..infdit.upscale import workload_of
from .schema import MOST_BUDGET, number

# of ComfyUI's command line, those for diffusion models before those for all
FLAGS = {
    "fp32_unet": torch.float32, "bf16_unet": torch.bfloat16, "fp16_unet": torch.float16,
    "force_fp32": torch.float32, "force_fp16": torch.float16,
}  # fmt: skip
ONE, ALL = "auto", "all"  # devices
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
    beside: tuple[torch.device, ...] = ()

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
        return replace(workload, pinnable=pinnable(), beside=self.beside)


@dataclass(frozen=True, eq=False)
class ManagedCLIP:
    """What an INFDIT_CLIP link carries."""

    name: str
    encoder: CLIPEncoder
    patcher: ModelPatcher
    warnings: tuple[str, ...] = ()


def managed_model(name: str, path: str, dtype: torch.dtype | None, devices: str = ONE) -> ManagedModel:
    """Read a model to the offload device.

    Args:
        name, path: of the file.
        dtype: None: what ComfyUI would choose.
        devices: see `devices_named`.

    Raises:
        CheckpointError: a file that cannot be used.
        ValueError: devices that are not here.
    """
    device, *beside = devices_named(devices)
    rest = CPU if beside else mm.unet_offload_device()
    network = load_model(path, dtype=dtype or comfy_dtype(device), device=rest)
    return ManagedModel(name, network, ModelPatcher(InfDiTWeights(network, rest), device, rest), tuple(beside))


def devices_named(names: str) -> list[torch.device]:
    """What computes: "auto", ComfyUI's device; "all", each of its kind; or names with commas between them.

    Raises:
        ValueError: no such device, or one twice that is no CPU.
    """
    names, own = names.strip().lower(), mm.get_torch_device()
    if names in ("", ONE):
        return [own]
    if names == ALL:
        others = [torch.device(own.type, i) for i in range(getattr(torch, own.type).device_count())]
        return [own, *(device for device in others if not same_device(device, own))] if own.type != "cpu" else [own]
    found = devices_of(names)
    if any(same_device(a, b) and a.type != "cpu" for i, a in enumerate(found) for b in found[:i]):
        raise ValueError(f"devices {names!r} names one of them twice: give each once")
    return found


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


def obtainable(device: torch.device, others: bool = True) -> int:
    """Bytes that a run can have here: what is free, and what ComfyUI can free by moving models out; less a margin.

    Where there is one memory, moving a model out frees nothing.

    others: whether models may go that are not ours.
    """
    if one_memory(device):
        return free_bytes(device)
    models = [
        loaded
        for loaded in mm.current_loaded_models
        if loaded.device == device
        and loaded.model is not None
        and (others or isinstance(getattr(loaded.model, "model", None), InfDiTWeights))
    ]
    free = mm.get_free_memory(device) + sum(loaded.model_loaded_memory() for loaded in models)
    return int((free - mm.extra_reserved_memory()) * (1 - MARGIN))


def pinnable() -> int:
    """Bytes of main memory that ComfyUI would still pin, or give back: none with --disable-pinned-memory."""
    if mm.MAX_PINNED_MEMORY <= 0:
        return 0
    theirs = sum(loaded.model.pinned_memory_size() for loaded in mm.current_loaded_models if _yields(loaded))
    return max(0, int(mm.MAX_PINNED_MEMORY - mm.TOTAL_PINNED_MEMORY + theirs))


def _yields(loaded: mm.LoadedModel) -> bool:
    """Whether a model makes room by itself when memory is taken: DynamicVRAM, which 0.8.0 does not have."""
    return getattr(loaded.model, "is_dynamic", bool)()


def _yielding(device: torch.device) -> bool:
    """Whether there are such models on a device: load_models_gpu would move them out for one that does not yield."""
    return any(loaded.device == device for loaded in filter(_yields, mm.current_loaded_models))


def make_room(size: float, device: torch.device, pinned: int = 0, host: int = 0) -> None:
    """Have ComfyUI make so many bytes free on a device, and so many of main memory, `pinned` of them to be pinned."""
    known = inspect.signature(mm.free_memory).parameters
    mm.free_memory(size, device, **{"for_dynamic": True} if "for_dynamic" in known else {})
    asked = {"pins_required": pinned, "ram_required": host}
    if pinned and "pins_required" in known:  # which it does not look at in the call above
        mm.free_memory(0, device, **{name: count for name, count in asked.items() if name in known})


def release_ram(size: int) -> None:
    """Have ComfyUI throw away results of older prompts until so many bytes of main memory can be had."""
    release = getattr(sys.modules.get("comfy.memory_management"), "extra_ram_release", None)
    if release is not None:
        release(size / (1 - MARGIN))


def budget_bytes(gib: float) -> int | None:
    """A memory_budget in bytes; 0 is automatic, None.

    Raises:
        ValueError: no number, or below zero.
    """
    gib = number(gib, "memory_budget", 0, MOST_BUDGET)
    return max(1, round(gib * GIB)) if gib else None


def plan_run(workload: Workload, budget: int | None) -> PlannedRun:
    """A run with a plan.

    None: the smallest of those about as fast as any, with weights and hidden states on the card if that takes no more
    than half of what is there without moving other models out; or what is obtainable if that is less.

    Raises:
        BudgetTooSmall: no plan fits.
    """
    try:
        plan = _choose_plan(workload, budget)
    except BudgetTooSmall as error:
        if error.tier == "device":
            raise
        release_ram(error.least)
        plan = _choose_plan(workload, budget)
    # a smaller one, should memory run out, finds weights where this wants them
    return PlannedRun(replace(workload, weights=plan.weights), plan, obtainable)


def _choose_plan(workload: Workload, budget: int | None) -> MemoryPlan:
    most = sys.maxsize if budget is None else budget
    shared = shared_plan(workload, lambda device: min(most, obtainable(device))) if workload.beside else None
    if shared is not None:
        return shared
    room = obtainable(workload.device)
    if budget is None:
        for in_place, most in ((True, obtainable(workload.device, others=False) // 2), (False, room)):
            plan = thrifty_plan(workload, in_place=in_place)
            if (plan.peak_bytes or 0) <= most:
                return plan
    try:
        return fastest_plan(workload, max(1, min(most, room)))
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
    peak, host = plan.peak_bytes or 0, plan.host_bytes or 0
    if plan.weights == "streamed" or plan.layers or _yielding(model.device):
        unload(model.patcher)
        away = plan.pinned and (plan.weights, plan.hidden) != ("resident", "device")
        for device in (model.device, *(model.beside if plan.layers else ())):
            make_room(peak, device, host if away else 0, host)
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
    if _yielding(patcher.load_device):
        make_room(patcher.model_size() + CLIP_WORKSPACE, patcher.load_device)
    else:
        mm.load_models_gpu([patcher], memory_required=CLIP_WORKSPACE, force_full_load=True)
    try:
        yield clip.encoder.to(patcher.load_device)
    finally:
        unload(patcher)
        clip.encoder.to(CPU)

"""What belongs to ComfyUI, turned into the values that the library takes: devices, memory, the bar, the stop button.

Weights are ComfyUI's to move: they rest on its offload device and come to the compute device in one piece, which may
push other models out. A plan that streams them leaves them where they rest and has only its own peak made free.
Nothing is pushed out for more than a plan holds (and the reserve that ComfyUI keeps in any case).
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar
from PIL import Image
from torch import Tensor, nn

from ..infdit import BudgetTooSmall, MemoryPlan, OutOfMemory, load_model
from ..infdit.clip import CLIPEncoder, load_clip
from ..infdit.device import default_dtype, out_of_memory
from ..infdit.memory import Weights
from ..infdit.model import InfDiT
from ..infdit.planner import MARGIN, Request, amount, free_bytes

CPU = torch.device("cpu")
PREVIEW_SIDE = 512  # pixels: the longest side of a preview that the frontend is sent
BAR_INTERVAL = 0.1  # seconds between two moves of the bar: each is a message to every open page
TEXT_INTERVAL = 0.5  # likewise, of the text under it
CLIP_WORKSPACE = 2**30  # bytes: a text tower of 0.5 GB in float32, and activations

T = TypeVar("T")
Preview = Callable[[], Tensor]  # makes the picture as it stands: uint8 (h, w, 3) on the CPU


class InfDiTWeights(nn.Module):
    """A network in the form that ModelPatcher takes: one whose `device` can be assigned. ComfyUI logs its name."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.device = device


@dataclass(frozen=True, eq=False)
class HostedModel:
    """What an INFDIT_MODEL link carries: a network whose weights ComfyUI manages."""

    name: str
    network: InfDiT
    patcher: ModelPatcher

    @property
    def device(self) -> torch.device:
        """That computes."""
        return self.patcher.load_device

    @property
    def streams(self) -> bool:
        """Whether its weights may stay on the host: not where ComfyUI is told to keep all on the card."""
        return self.device.type != "cpu" and self.patcher.offload_device.type == "cpu"


@dataclass(frozen=True, eq=False)
class HostedCLIP:
    """What an INFDIT_CLIP link carries."""

    name: str
    encoder: CLIPEncoder
    patcher: ModelPatcher
    warnings: tuple[str, ...] = ()


def host_model(name: str, path: str, dtype: torch.dtype | None) -> HostedModel:
    """Read a model to the offload device. dtype None: what the compute device is at home in.

    Raises:
        CheckpointError: a file that cannot be used.
    """
    device, rest = mm.get_torch_device(), mm.unet_offload_device()
    network = load_model(path, dtype=dtype or default_dtype(device), device=rest)
    patcher = ModelPatcher(InfDiTWeights(network, rest), load_device=device, offload_device=rest)
    return HostedModel(name, network, patcher)


def host_clip(name: str, path: str) -> HostedCLIP:
    """Read CLIP to the CPU, where it rests.

    Raises:
        CheckpointError, OpenCLIPMissingError: see `load_clip`.
    """
    device = mm.get_torch_device()
    encoder = load_clip(path, None if device.type == "cpu" else default_dtype(device), CPU)
    patcher = ModelPatcher(InfDiTWeights(encoder, CPU), load_device=device, offload_device=CPU)
    return HostedCLIP(name, encoder, patcher)


# ---- memory


def obtainable(device: torch.device) -> int:
    """Bytes that a run can have here: what is free, and what ComfyUI can free by moving models out; less a margin."""
    if device.type == "cpu":
        return free_bytes(device)
    models = [loaded for loaded in mm.current_loaded_models if loaded.device == device and loaded.model is not None]
    free = mm.get_free_memory(device) + sum(loaded.model_loaded_memory() for loaded in models)
    return int((free - mm.extra_reserved_memory()) * (1 - MARGIN))


def choose_plan(request: Request, budget: int | None) -> MemoryPlan:
    """The plan of a run. None: the smallest plan of those about as fast as any, or what is obtainable if that is less.

    Raises:
        BudgetTooSmall: no plan fits.
    """
    room = obtainable(request.device)
    if budget is None:
        thrifty = request.thrifty_plan()
        if (thrifty.peak_bytes or 0) <= room:
            return thrifty
    asked = room if budget is None else min(budget, room)
    try:
        return request.plan(max(1, asked))
    except BudgetTooSmall as error:
        if error.tier == "host" or asked == budget:
            raise
        refusal, least = str(error), error.least
    place = "of memory" if request.one_memory else "on the graphics card"
    raise BudgetTooSmall(f"{refusal} ({amount(max(0, room))} {place} is all that can be had here now)", least)


def with_weights(model: HostedModel, plan: MemoryPlan, work: Callable[[InfDiT], T]) -> T:
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
            f"out of memory on {model.device} beyond what was planned ({reason}): set memory_budget below "
            f"{amount(plan.peak_bytes or 0)}, close other programs, or make a smaller picture"
        )
    finally:
        _give_back(model.device)
    gc.collect()  # only now nothing refers to the error any more, which kept all that the attempt held
    _give_back(model.device)
    raise OutOfMemory(failure)


def _bring(model: HostedModel, plan: MemoryPlan) -> InfDiT:
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
    if device.type == "cuda":
        getattr(torch._C, "_host_emptyCache", lambda: None)()


@contextmanager
def clip_at_work(clip: HostedCLIP) -> Iterator[CLIPEncoder]:
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


# ---- pictures


def from_image(image: Tensor) -> Tensor:
    """ComfyUI's IMAGE or MASK, on any device, maybe of half precision, → float32 on the CPU. Not to be changed."""
    return image.float().cpu()


def to_image(image: Tensor) -> Tensor:
    """A picture → ComfyUI's IMAGE or MASK: where, and in the dtype that, this ComfyUI wants to have it."""
    dtype = mm.intermediate_dtype() if hasattr(mm, "intermediate_dtype") else torch.float32  # since 0.18
    return image.to(mm.intermediate_device(), dtype)


# ---- bar, live picture, stop button


class Bar:
    """The bar, the live picture and a line of text on the node that runs, and its stop button.

    Raises, when moved:
        InterruptProcessingException: the user has pressed stop.
    """

    def __init__(self, node_id: str | None = None) -> None:
        self._node_id = node_id
        self._bar: ProgressBar | None = None
        self._shown = self._told = float("-inf")

    def move(self, done: int, total: int, preview: Preview | None = None, text: str = "") -> None:
        """Show what is done of a total."""
        mm.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        if preview is None and done < total and now - self._shown < BAR_INTERVAL:
            return
        bar = self._bar = self._bar or ProgressBar(total)
        picture = None if preview is None else ("JPEG", Image.fromarray(preview().numpy()), PREVIEW_SIDE)
        bar.update_absolute(done, total, picture)
        self._shown = now
        if text and now - self._told >= TEXT_INTERVAL:
            self.tell(text)

    def fill(self) -> None:
        """Show that all is done: a sampler may have needed fewer evaluations than were counted on."""
        if self._bar is not None and self._bar.current < self._bar.total:
            self._bar.update_absolute(self._bar.total)

    def tell(self, text: str) -> None:
        """Show a line of text on the node, where there is a page to show it."""
        self._told = time.monotonic()
        server = getattr(sys.modules.get("server"), "PromptServer", None)  # not imported: tests run without one
        send = getattr(getattr(server, "instance", None), "send_progress_text", None)
        if send is not None and self._node_id is not None:
            send(text, self._node_id)

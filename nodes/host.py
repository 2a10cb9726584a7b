"""What belongs to ComfyUI, turned into the values that the library takes: devices, memory, the bar, the stop button.

The weights are ComfyUI's to move: they rest on its offload device, come to the compute device in one piece before a
run, which may push other models out, and leave it when another model needs the room.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar
from PIL import Image
from torch import Tensor, nn

from ..infdit import load_model
from ..infdit.device import default_dtype
from ..infdit.model import InfDiT

PREVIEW_SIDE = 512  # pixels: the longest side of a preview that the frontend is sent
BAR_INTERVAL = 0.1  # seconds between two moves of the bar: each is a message to every open page

Preview = Callable[[], Tensor]  # makes the picture as it stands: uint8 (h, w, 3) on the CPU


class InfDiTWeights(nn.Module):
    """A network in the form that ModelPatcher takes: one whose `device` can be assigned. ComfyUI logs its name."""

    def __init__(self, network: InfDiT) -> None:
        super().__init__()
        self.network = network
        self.device = network.device


@dataclass(frozen=True, eq=False)
class HostedModel:
    """What an INFDIT_MODEL link carries: a network whose weights ComfyUI manages."""

    name: str
    network: InfDiT
    patcher: ModelPatcher


def host_model(name: str, path: str, dtype: torch.dtype | None) -> HostedModel:
    """Read a model to the offload device. dtype None: what the compute device is at home in.

    Raises:
        CheckpointError: a file that cannot be used.
    """
    device, rest = mm.get_torch_device(), mm.unet_offload_device()
    network = load_model(path, dtype=dtype or default_dtype(device), device=rest)
    return HostedModel(name, network, ModelPatcher(InfDiTWeights(network), load_device=device, offload_device=rest))


def bring_to_device(model: HostedModel, memory_required: int) -> InfDiT:
    """The network with all its weights on the compute device and memory_required bytes free beside them."""
    patcher = model.patcher
    mm.load_models_gpu([patcher], memory_required=memory_required, force_full_load=True)
    # --novram loads in part whatever it is asked for, and plain torch layers cannot compute from another device
    return model.network.to(patcher.load_device)


def from_image(image: Tensor) -> Tensor:
    """ComfyUI's IMAGE, on any device and possibly half precision, → float32 on the CPU. Never changed in place."""
    return image.float().cpu()


def to_image(image: Tensor) -> Tensor:
    """A picture → ComfyUI's IMAGE: where, and in the dtype that, this ComfyUI wants to have it."""
    dtype = mm.intermediate_dtype() if hasattr(mm, "intermediate_dtype") else torch.float32  # since 0.18
    return image.to(mm.intermediate_device(), dtype)


class Progress:
    """The bar and the live picture on the node that runs, and its stop button: `progress` of `infdit.upscale`.

    Raises, when called:
        InterruptProcessingException: the user has pressed stop.
    """

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None
        self._shown = -BAR_INTERVAL

    def __call__(self, done: int, total: int, preview: Preview | None) -> None:
        mm.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        if preview is None and done < total and now - self._shown < BAR_INTERVAL:
            return
        bar = self._bar = self._bar or ProgressBar(total)
        picture = None if preview is None else ("JPEG", Image.fromarray(preview().numpy()), PREVIEW_SIDE)
        bar.update_absolute(done, total, picture)
        self._shown = now

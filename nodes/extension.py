"""What ComfyUI is told of this pack: its nodes and its folder of models."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .advanced import InfDiTScheduler, InfDiTUpscaleAdvanced
from .clip import InfDiTCLIPEncode, InfDiTCLIPLoader
from .comfy_page import listen_to_pages, telling
from .files import register_model_folder
from .inputs import checked
from .loader import InfDiTModelLoader
from .native import InfDiTToModel
from .plan import InfDiTMemoryPlan
from .upscale import InfDiTUpscale

NODES = (
    InfDiTModelLoader,
    InfDiTCLIPLoader,
    InfDiTCLIPEncode,
    InfDiTUpscale,
    InfDiTMemoryPlan,
    InfDiTUpscaleAdvanced,
    InfDiTScheduler,
    InfDiTToModel,
)


class InfDiTExtension(ComfyExtension):
    """What this pack adds to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [telling(checked(node)) for node in NODES]


async def comfy_entrypoint() -> InfDiTExtension:
    """ComfyUI calls this once, after the user's extra model paths are known."""
    register_model_folder()
    listen_to_pages()
    return InfDiTExtension()

"""Load Inf-DiT Model: a file of models/infdit, or the small model that comes with the pack."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from .comfy_memory import ONE, managed_model
from .comfy_page import Bar, refusal
from .files import BUNDLED, FOLDER, converted, fingerprint, missing_model, model_files, model_path
from .schema import ADVANCED, CATEGORY, InfDiTModel, search_aliases

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class InfDiTModelLoader(io.ComfyNode):
    """Reads a checkpoint."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTModelLoader",
            display_name="Load Inf-DiT Model",
            category=CATEGORY,
            description="Loads an Inf-DiT model for upscaling. A small model comes with the pack; larger ones go into "
            "models/infdit.",
            inputs=[
                io.Combo.Input(
                    "model_name", options=model_files(),
                    tooltip="The small model that comes with the pack, or a file (.safetensors, or the published .pt) "
                    "in models/infdit. A .pt is converted to a .safetensors beside it when it is first used.",
                ),
                io.Combo.Input(
                    "dtype", options=list(DTYPES), default="auto", extra_dict=ADVANCED,
                    tooltip="The precision that the model computes in. auto: what ComfyUI chooses for your "
                    "hardware, usually bf16. bf16 and fp16 need half the memory of fp32.",
                ),
                io.String.Input(
                    "devices", default=ONE, optional=True, extra_dict=ADVANCED,
                    tooltip="auto: ComfyUI's own. all: every graphics card, each with a part of the model, at the same "
                    "time; the picture stays the same. Or their names, like cuda:0,cuda:1.",
                ),
            ],
            outputs=[InfDiTModel.Output(display_name="model", tooltip="The model, for the Inf-DiT Upscale nodes.")],
            hidden=[io.Hidden.unique_id],
            **search_aliases("inf-dit", "infdit", "load upscaler", "upscale model", "super resolution"),
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        """In place of ComfyUI's own check of the list: the same, with a way out. A link's value is not known yet."""
        return model_name is None or model_name in model_files() or refusal(missing_model(model_name), cls)

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None, **_: object) -> str:
        """Changes when the file does, so that a model that was replaced is loaded again. A link's name is not known."""
        return "" if model_name in (None, BUNDLED) else fingerprint((FOLDER,), model_name)

    @classmethod
    def execute(cls, model_name: str, dtype: str, devices: str = ONE) -> io.NodeOutput:
        path = converted(model_path(model_name), Bar(cls.hidden.unique_id).move)
        return io.NodeOutput(managed_model(model_name, path, DTYPES[dtype], devices))

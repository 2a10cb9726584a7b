"""Load Inf-DiT Model: a file of models/infdit, or the small model that comes with the pack."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..infdit import CheckpointError
from .host import host_model
from .schema import CATEGORY, InfDiTModel, search_aliases

FOLDER = "infdit"
EXTENSIONS = {".safetensors", ".pt"}
BUNDLED = "mini (bundled)"  # in the list of files
DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def register_model_folder() -> None:
    """Make models/infdit known, beside whatever the user's extra model paths already say about it."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | EXTENSIONS)


def model_path(model_name: str) -> str:
    """The file behind an entry of the list; "mini" for the bundled one.

    Raises:
        CheckpointError: the file is gone.
    """
    if model_name == BUNDLED:
        return "mini"
    path = folder_paths.get_full_path(FOLDER, model_name)
    if path is None:
        raise CheckpointError(
            model_name, "is no longer in models/infdit", "put it back, or press R and choose another model"
        )
    return path


def model_files() -> list[str]:
    """Files of models/infdit, without the CLIP models that `convert` puts beside them."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if not name.endswith(".clip.safetensors")]


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
                    "model_name",
                    options=[BUNDLED, *model_files()],
                    tooltip="The small model that comes with the pack, or a file (.safetensors, or the published .pt) "
                    "in models/infdit.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    tooltip="The precision that the model computes in. auto: bf16 where your hardware computes it "
                    "natively, else fp32. bf16 and fp16 need half the memory of fp32.",
                ),
            ],
            outputs=[
                InfDiTModel.Output(display_name="model", tooltip="The model, for the Inf-DiT Upscale nodes."),
            ],
            **search_aliases("inf-dit", "infdit", "load upscaler", "upscale model", "super resolution"),
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str, dtype: str) -> str:
        """Changes when the file does, so that a model that was replaced is loaded again."""
        path = None if model_name == BUNDLED else folder_paths.get_full_path(FOLDER, model_name)
        if path is None:
            return model_name
        stat = Path(path).stat()
        return f"{path} {stat.st_mtime_ns} {stat.st_size}"

    @classmethod
    def execute(cls, model_name: str, dtype: str) -> io.NodeOutput:
        return io.NodeOutput(host_model(model_name, model_path(model_name), DTYPES[dtype]))

"""Inf-DiT to Model: all that ComfyUI's own KSampler takes, for one picture or a batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy_api.latest import io
from torch import Tensor

from ..infdit.sizes import MAX_SCALE
from . import schema
from .clip import GuidedVector
from .comfy_memory import ManagedModel, budget_bytes, plan_run
from .comfy_native import Pictures, PixelVAE, native_patcher
from .comfy_page import from_image
from .size import Size, result_size, size_input
from .transparency import with_transparency


class InfDiTToModel(schema.BudgetedNode):
    """An Inf-DiT model and a picture to all that a KSampler takes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTToModel",
            display_name="Inf-DiT to Model",
            category=schema.CATEGORY,
            description="All that ComfyUI's own KSampler and Sampler Custom need to enlarge a picture with Inf-DiT, "
            "and the VAE for VAE Decode. Inf-DiT Upscale does the same in one node.",
            inputs=[
                schema.model_input(),
                schema.image_input(" Transparency (a fourth channel) is enlarged along."),
                size_input(),
                schema.memory_budget_input(schema.RUN_BUDGET),
                schema.conditioning_input(),
                schema.transparency_input(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="For KSampler, Basic Scheduler and guiders. It knows this picture."
                ),
                io.Conditioning.Output(
                    display_name="positive", tooltip="What Inf-DiT CLIP Encode says of the picture, or nothing."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The same as positive: so cfg changes nothing and costs no time."
                ),
                io.Latent.Output(
                    display_name="latent", tooltip="The picture, plainly enlarged: sampling begins with it, not empty."
                ),
                io.Vae.Output(display_name="vae", tooltip="For VAE Decode: the result, exactly of the size asked for."),
            ],
            hidden=[io.Hidden.unique_id],
            **schema.search_aliases("inf-dit ksampler", "infdit native model", "upscaler", "super resolution"),
        )

    @classmethod
    def execute(
        cls, model: ManagedModel, image: Tensor, memory_budget: float, size: Size | None = None,
        conditioning: GuidedVector | None = None, transparency: Tensor | None = None,
    ) -> io.NodeOutput:
        given = with_transparency(from_image(image), transparency)
        target, budget = result_size(size, *given.shape[1:3]), budget_bytes(memory_budget)
        workload = model.workload(given.shape, target, noise_given=True)
        workload = replace(workload, scales=())  # what a latent holds is what comes out
        if workload.way:
            raise ValueError(
                f"a KSampler enlarges by {MAX_SCALE} at most, and this takes {workload.way}: connect another Inf-DiT "
                "to Model after VAE Decode for the rest, or use Inf-DiT Upscale"
            )
        plan_run(workload, budget)  # what cannot be is said here, not where it is sampled
        pictures = Pictures.of(given, workload, model.defaults)
        if conditioning is not None and len(conditioning.vectors) not in (1, len(given)):
            raise ValueError(
                f"conditioning is of {len(conditioning.vectors)} pictures, and image has {len(given)}: give the same "
                "ones to Inf-DiT CLIP Encode"
            )
        if conditioning is not None and model.listens:
            vectors = conditioning.vectors
        else:
            width = max(1, model.network.config.vector_dim)
            vectors = torch.zeros((1, width), dtype=torch.float32, device="cpu")
        told = [[vectors[:, None], {}]]
        patcher, latent = native_patcher(model, pictures, budget), {"samples": pictures.up}
        return io.NodeOutput(patcher, told, told, latent, PixelVAE(pictures))

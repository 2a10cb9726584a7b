"""Inf-DiT Upscale: one picture in, one picture out."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..infdit import MemoryPlan, upscale
from ..infdit.memory import footprint
from ..infdit.model import InfDiT
from ..infdit.samplers import SAMPLERS
from ..infdit.upscale import target_size
from .host import HostedModel, Progress, bring_to_device, from_image, to_image
from .schema import CATEGORY, InfDiTModel, search_aliases

AUTO = "auto"
MAX_SEED = 2**64 - 1


def working_bytes(network: InfDiT, height: int, width: int, batch: int) -> int:
    """What a run with all weights on the device would like to hold there beside them; with less it takes less."""
    plan = MemoryPlan.default(network.config)
    held = footprint(network.config, height, width, plan, network.dtype, batch=batch)
    return held.device - held.weights


class InfDiTUpscale(io.ComfyNode):
    """Enlarges pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTUpscale",
            display_name="Inf-DiT Upscale",
            category=CATEGORY,
            description="Enlarges a picture up to four times with an Inf-DiT model: a diffusion transformer that "
            "works on the whole picture at once, without tiles or seams. It needs no prompt.",
            inputs=[
                InfDiTModel.Input("model", tooltip="From Load Inf-DiT Model."),
                io.Image.Input(
                    "image", tooltip="The pictures to enlarge: any size, any number. Transparency is enlarged along."
                ),
                io.Float.Input(
                    "scale",
                    default=4.0,
                    min=1.01,
                    max=4.0,
                    step=0.01,
                    tooltip="How many times larger each side becomes. The model is trained for up to 4; for more, use "
                    "the node twice.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Sampling steps: more take longer and add finer detail. 0: as many as the model was made "
                    "for.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=[AUTO, *SAMPLERS],
                    default=AUTO,
                    tooltip="How the steps are taken. auto: the sampler that the model was made for. heun computes "
                    "each step twice.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How freely the model invents detail. 1: as it was trained to; lower values stay closer "
                    "to the plain enlargement; 0 is the plain enlargement.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="The noise that detail grows from: the same seed gives the same picture.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The enlarged pictures.")],
            **search_aliases("inf-dit", "infdit", "upscaler", "super resolution", "enlarge image", "hires", "4x"),
        )

    @classmethod
    def execute(
        cls,
        model: HostedModel,
        image: Tensor,
        scale: float,
        steps: int,
        sampler_name: str,
        denoise: float,
        seed: int,
    ) -> io.NodeOutput:
        height, width = target_size(image.shape[1], image.shape[2], scale)
        network = bring_to_device(model, working_bytes(model.network, height, width, len(image)))
        result = upscale(
            network,
            from_image(image),
            scale,
            steps=steps or None,
            sampler=None if sampler_name == AUTO else sampler_name,
            denoise=denoise,
            seed=seed,
            progress=Progress(),
        )
        return io.NodeOutput(to_image(result))

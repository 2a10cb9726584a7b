"""The same upscale, taken apart for ComfyUI's own sampling nodes: noise, sampler and noise levels come in by links."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy_api.latest import io
from torch import Tensor

from ..infdit import SamplingDefaults
from ..infdit.progress import PictureState
from ..infdit.upscale import schedule, shrink
from . import schema
from .clip import GuidedVector
from .comfy_memory import ManagedModel, budget_bytes, plan_run
from .comfy_page import from_image, to_image
from .comfy_samplers import CoreNoise, CoreSampler, core_noise, core_sampler, seed_of
from .report import sampling_line
from .run import run_upscale
from .size import Size, result_size, size_input
from .transparency import with_transparency


class InfDiTUpscaleAdvanced(schema.BudgetedNode):
    """Enlarges pictures with noise, sampler and noise levels of ComfyUI's own nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTUpscaleAdvanced",
            display_name="Inf-DiT Upscale (Advanced)",
            category=schema.CATEGORY,
            description="Inf-DiT Upscale with noise, sampler and sigmas from ComfyUI's own nodes: Random Noise, "
            "KSampler Select, and Inf-DiT Scheduler or any other list of falling noise levels.",
            inputs=[
                schema.model_input(),
                schema.image_input(),
                size_input(),
                io.Noise.Input("noise", tooltip="The noise that detail grows from, such as from Random Noise."),
                io.Sampler.Input(
                    "sampler",
                    tooltip="How the steps are taken, from KSampler Select. All work but lcm, dpm_fast, dpm_adaptive, "
                    "uni_pc and those with cfg_pp. Those that add noise (ancestral, sde, ddpm, seeds, sa_solver) need "
                    "a model that starts from noise: the bundled one does not.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="Falling noise levels, from Inf-DiT Scheduler. They are in units of pixels from -1 to 1, "
                    "so those of schedulers made for latents do not fit.",
                ),
                schema.memory_budget_input(schema.RUN_BUDGET),
                schema.conditioning_input(),
                schema.transparency_input(),
            ],
            outputs=[
                schema.image_output(),
                io.Image.Output(
                    display_name="denoised",
                    tooltip="What the model took the picture to be in its last step: the same as image if the sigmas "
                    "end with 0, else image without the noise that is left in it.",
                ),
                schema.report_output(),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            **schema.search_aliases("inf-dit custom sampler", "infdit advanced", "upscaler", "super resolution"),
        )

    @classmethod
    def execute(
        cls, model: ManagedModel, image: Tensor, noise: CoreNoise, sampler: CoreSampler, sigmas: Tensor,
        memory_budget: float, size: Size | None = None, conditioning: GuidedVector | None = None,
        transparency: Tensor | None = None,
    ) -> io.NodeOutput:
        pictures = from_image(image)
        pictures = with_transparency(pictures, transparency)
        target = result_size(size, *pictures.shape[1:3])
        seed, sigmas = seed_of(noise), sigmas.float().cpu()
        # on a CPU the last denoised pictures are in the memory that is planned
        kept = len(pictures) if model.device.type == "cpu" else 0
        method, name = core_sampler(sampler, seed, kept, model.defaults.start_noise)
        workload = model.workload(pictures.shape, target, method, noise_given=True)
        spread: list[float] = []
        last: list[Tensor] = []  # what the model took each picture to be in its last step

        def make_noise(shape: tuple[int, int, int, int]) -> Tensor:
            given = core_noise(noise, shape)
            spread.append(float(given[0].float().std()))
            return given

        def keep(state: PictureState) -> None:
            if state["i"] == len(sigmas) - 2 and not state["left"]:
                part = workload.passes[-1]
                denoised = state["denoised"][..., : part.height, : part.width].cpu()
                denoised = denoised.mul(0.5).add_(0.5).clamp_(0, 1).movedim(1, -1)
                if part.shrunk is not None:
                    large, denoised = denoised, torch.empty((1, *target, 3), dtype=torch.float32, device="cpu")
                    shrink(large, large, denoised, lambda: None)
                last.append(denoised)

        result, report = run_upscale(
            model,
            plan_run(workload, budget_bytes(memory_budget)),
            pictures,
            sigmas,
            conditioning,
            cls.hidden,
            lambda: (
                sampling_line(name, sigmas, model.defaults, f"seed {seed}" if any(spread) else ""),
                noise_notes(model.defaults, sigmas, spread[0]),
            ),
            noise=make_noise,
            callback=keep,
        )
        denoised = torch.cat(last) if last else result[..., :3]
        return io.NodeOutput(to_image(result), to_image(denoised), report)


def noise_notes(defaults: SamplingDefaults, sigmas: Tensor, spread: float) -> list[str]:
    """What is far from what a model was made for; spread: standard deviation of the noise given, 1 as a rule."""
    if len(sigmas) < 2:
        return []
    notes, first, made_for = [], float(sigmas[0]), defaults.sigma_max
    if not made_for / 2 <= first <= made_for * 2:
        effect = "little is invented" if first < made_for else "the picture is lost under it"
        notes.append(f"note: noise begins at {first:.3g}, and this model was made for {made_for:.3g}: {effect}")
    if defaults.start_noise == 0 and spread > 0:
        notes.append("note: this model starts without noise, and what is given stays in the picture: use DisableNoise")
    elif not defaults.start_noise / 2 <= spread <= defaults.start_noise * 2:
        given = f"{spread:.2g} times as much as usual" if spread else "none"
        notes.append(
            f"note: this model grows detail from noise, and is given {given}, which leaves a pattern: use RandomNoise"
        )
    return notes


class InfDiTScheduler(io.ComfyNode):
    """Noise levels as Inf-DiT is sampled with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTScheduler",
            display_name="Inf-DiT Scheduler",
            category=schema.CATEGORY,
            description="Noise levels for Inf-DiT Upscale (Advanced): the schedule of Karras et al. What is 0 is taken "
            "from the model, or without one from the published model.",
            inputs=[
                io.Int.Input(
                    "steps", default=0, min=0, max=1000,
                    tooltip="Sampling steps: one noise level more than that. 0: as many as the model was made for. "
                    "With a model connected, at most as many as it gains from.",
                ),
                io.Float.Input(
                    "sigma_max", default=0.0, min=0.0, max=5000.0, step=0.01, round=False,
                    tooltip="Where sampling begins: how much noise is laid over the picture. 0: what the model was "
                    "made for, 40 for the published one.",
                ),
                io.Float.Input(
                    "sigma_min", default=0.0, min=0.0, max=100.0, step=0.001, round=False,
                    extra_dict=schema.ADVANCED,
                    tooltip="The last noise level before 0. 0: what the model was made for, 0.002 for the published "
                    "one.",
                ),
                io.Float.Input(
                    "rho", default=7.0, min=1.0, max=100.0, step=0.1, round=False, extra_dict=schema.ADVANCED,
                    tooltip="How much closer together the levels are where there is little noise. 1: evenly spaced.",
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, display_mode=schema.SLIDER,
                    tooltip="How far up the schedule sampling begins. 1: at sigma_max; lower values stay closer to "
                    "the plain enlargement; 0 is the plain enlargement. The number of steps stays.",
                ),
                schema.InfDiTModel.Input(
                    "model", optional=True,
                    tooltip="From Load Inf-DiT Model: whose values stand for what is 0. The same as for the upscale.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="Falling noise levels, the last one 0.")],
            **schema.search_aliases("inf-dit sigmas", "infdit scheduler", "karras"),
        )

    @classmethod
    def execute(
        cls, steps: int, sigma_max: float, sigma_min: float, rho: float, denoise: float,
        model: ManagedModel | None = None,
    ) -> io.NodeOutput:
        defaults = SamplingDefaults() if model is None else model.defaults
        defaults = replace(defaults, sigma_min=sigma_min or defaults.sigma_min)
        return io.NodeOutput(schedule(defaults, steps or None, sigma_max or None, denoise, rho))

"""Inf-DiT Upscale: pictures in, larger pictures out."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io
from torch import Tensor

from ..infdit import SamplingDefaults
from ..infdit.conditioning import upscale_alpha
from ..infdit.memory.planner import PlannedRun, format_seconds
from ..infdit.presets import PRESETS, sampling
from ..infdit.samplers import SAMPLERS
from . import schema
from .clip import GuidedVector
from .comfy_memory import ManagedModel, budget_bytes, plan_run
from .comfy_page import from_image, to_image
from .report import sampling_line, seconds_foretold
from .run import run_upscale
from .size import Size, result_size, size_input
from .transparency import from_mask, with_transparency

AUTO = "auto"
OWN = "model's own"  # preset
MAX_STEPS = 1000


class InfDiTUpscale(schema.BudgetedNode):
    """Enlarges pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTUpscale",
            display_name="Inf-DiT Upscale",
            category=schema.CATEGORY,
            description="Enlarges pictures up to sixteen times with an Inf-DiT model: a diffusion transformer that "
            "works on the whole picture at once, without tiles or seams. It needs no prompt.",
            inputs=[
                schema.model_input(),
                schema.image_input(" Transparency (a fourth channel) is enlarged along."),
                size_input(),
                *_sampling_inputs(),
                schema.memory_budget_input(schema.RUN_BUDGET),
                schema.conditioning_input(),
                _mask_input(),
                schema.transparency_input(),
                *_faithful_inputs(),
                io.Combo.Input(
                    "preset", options=[OWN, *PRESETS], default=OWN, optional=True, extra_dict=schema.ADVANCED,
                    tooltip="How carefully a model that starts from noise is sampled: balanced takes 13 evaluations "
                    "and ends within 0.1 of a grey level of where many steps lead, on pictures that are known; draft "
                    "8 and 0.2, paper 39 and 0.8. steps and sampler_name, where set, go before it. The bundled model "
                    "takes one step at most: there it changes nothing, and the report says so.",
                ),
                _resume_input(),
            ],
            outputs=[
                schema.image_output(),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="The mask given, enlarged. Without one: what is transparent in a picture with a fourth "
                    "channel (1 where nothing is seen, as from Load Image), else 0 everywhere.",
                ),
                schema.report_output(),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            **schema.search_aliases("inf-dit", "infdit", "upscaler", "super resolution", "enlarge image", "4x"),
        )

    @classmethod
    def execute(
        cls, model: ManagedModel, image: Tensor, steps: int, sampler_name: str, denoise: float, seed: int,
        memory_budget: float, size: Size | None = None, conditioning: GuidedVector | None = None,
        mask: Tensor | None = None, transparency: Tensor | None = None, fidelity: float = 0.0,
        colour_match: bool = False, preset: str = OWN, resume: bool = False,
    ) -> io.NodeOutput:
        pictures = from_image(image)
        steps, seed = (
            int(schema.number(value, name, 0, most, whole=True))
            for name, value, most in (("steps", steps, MAX_STEPS), ("seed", seed, schema.MAX_SEED))
        )
        denoise, fidelity = schema.number(denoise, "denoise", 0, 1), schema.number(fidelity, "fidelity", 0, 1)
        pictures = with_transparency(pictures, transparency)
        defaults, target = model.defaults, result_size(size, *pictures.shape[1:3])
        asked = None if preset == OWN else preset, steps or None, None if sampler_name == AUTO else sampler_name
        chosen = sampling(defaults, *asked, denoise=denoise)
        sampler, sigmas = str(chosen.sampler), chosen.sigmas
        masks = None if mask is None else enlarged_mask(mask, target)
        workload = model.workload(pictures.shape, target, sampler)
        workload = replace(workload, fitted=fidelity > 0, scales=workload.scales if len(sigmas) > 1 else ())
        planned = plan_run(workload, budget_bytes(memory_budget))
        result, report = run_upscale(
            model,
            planned,
            pictures,
            sigmas,
            conditioning,
            cls.hidden,
            lambda: (
                sampling_line(sampler, sigmas, defaults, f"seed {seed}" if defaults.start_noise else ""),
                [*preset_note(chosen.words, planned, sigmas), *steps_note(steps, defaults)],
            ),
            resume=bool(resume),
            seed=seed,
            fidelity=fidelity,
            colour_match=bool(colour_match),
        )
        masks = unseen(result) if masks is None else masks
        return io.NodeOutput(to_image(result), to_image(masks), report)


def _sampling_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "steps", default=0, min=0, max=MAX_STEPS, extra_dict=schema.ADVANCED,
            tooltip="Sampling steps: more take longer and can add finer detail. 0: as many as the model was "
            "made for. The bundled model gains nothing from more than one.",
        ),
        io.Combo.Input(
            "sampler_name", options=[AUTO, *SAMPLERS], default=AUTO, extra_dict=schema.ADVANCED,
            tooltip="How the steps are taken. auto: the sampler that the model was made for. heun computes "
            "each step twice.",
        ),
        io.Float.Input(
            "denoise", default=1.0, min=0.0, max=1.0, step=0.01, display_mode=schema.SLIDER,
            tooltip="How far the model may go from the plain enlargement, and how much it may invent if it is one that "
            "invents. 1: as far as it was trained to; 0: the plain enlargement.",
        ),
        io.Int.Input(
            "seed", default=0, min=0, max=schema.MAX_SEED, control_after_generate=schema.FIXED,
            tooltip="The noise that detail grows from, with models that start from noise. The bundled model starts "
            "without: there the seed changes nothing.",
        ),
    ]


def _faithful_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "fidelity", default=0.0, min=0.0, max=1.0, step=0.01, display_mode=schema.SLIDER, optional=True,
            extra_dict=schema.ADVANCED,
            tooltip="How far the result is held to the picture given. 0: as the model makes it; 1: made small again, "
            "it is that picture, and only what is finer than its pixels is the model's.",
        ),
        io.Boolean.Input(
            "colour_match", default=False, optional=True, extra_dict=schema.ADVANCED,
            tooltip="Give the result the mean and the spread of colours of the picture given, over the whole of it. "
            "For models that shift colours, which the bundled one does not.",
        ),
    ]


def _resume_input() -> io.Input:
    return io.Boolean.Input(
        "resume", display_name="resume (stop = pause)", default=False, optional=True, extra_dict=schema.ADVANCED,
        tooltip="Keep the state after each step on disk: after a stop, an error or a crash the same workflow, queued "
        "again, goes on after the last finished step and makes the same picture. The report says so. States are in "
        "the output folder, in inf-dit-unfinished, until the run is done. For runs of more than one step.",
    )


def _mask_input() -> io.Input:
    return io.Mask.Input(
        "mask", optional=True,
        tooltip="A mask to enlarge along with the picture. It comes out at the size of the result and does not "
        "change the picture.",
    )


def preset_note(words: str, planned: PlannedRun, sigmas: Tensor) -> list[str]:
    """What a preset is and how long it was foretold to take, if one was chosen."""
    about = format_seconds(seconds_foretold(planned.workload, planned.plan, sigmas))
    return [f"{words}, about {about} foretold"] if words else []


def steps_note(steps: int, defaults: SamplingDefaults) -> list[str]:
    """Why fewer steps are taken than were asked for, if that is so."""
    most = defaults.most_steps
    if most is None or steps <= most:
        return []
    taken = "one step is" if most == 1 else f"{most} steps are"
    return [f"note: {taken} all that this model gains from, so not the {steps} asked for are taken"]


def enlarged_mask(mask: Tensor, target: tuple[int, int]) -> Tensor:
    """(B, h, w) or (h, w), of any size → (B, height, width) float32 on the CPU, as a picture's alpha is enlarged."""
    return upscale_alpha(from_mask(mask, "mask")[:, None], target)[:, 0]


def unseen(image: Tensor) -> Tensor:
    """(B, h, w, 3 or 4) → (B, h, w) as Load Image gives it: 1 where nothing is seen."""
    return 1 - image[..., 3] if image.shape[-1] == 4 else image.new_zeros(image.shape[:3])

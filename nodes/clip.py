"""CLIP: what the model is told about the whole picture, and where two texts lead it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from comfy_api.latest import io
from torch import Tensor

from ..infdit import clip as infdit_clip
from ..infdit.clip import MAX_STRENGTH, NEGATIVE, POSITIVE, STRENGTH, VIEWS, View, clip_embedding
from ..infdit.conditioning import visible_colour
from .comfy_memory import ManagedCLIP, clip_at_work, managed_clip
from .comfy_page import from_image, refusal
from .files import CLIP_FOLDERS, clip_files, clip_path, fingerprint, missing_clip
from .schema import CATEGORY, SLIDER, InfDiTCLIP, InfDiTConditioning, search_aliases


@dataclass(frozen=True, eq=False)
class GuidedVector:
    """What an INFDIT_CONDITIONING link carries: CLIP's vectors, (B or 1, width), and what they were made from.

    text: positive, negative and strength, for a receipt.
    """

    vectors: Tensor
    description: str
    warnings: tuple[str, ...] = ()
    text: Mapping[str, object] = field(default_factory=dict)


class InfDiTCLIPLoader(io.ComfyNode):
    """Reads CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTCLIPLoader",
            display_name="Load Inf-DiT CLIP",
            category=CATEGORY,
            description="Loads the CLIP model (ViT-L-14) that Inf-DiT was trained with.",
            inputs=[
                io.Combo.Input(
                    "clip_name", options=clip_files(),
                    tooltip="A file in models/clip_vision or models/infdit: open_clip's ViT-L-14 "
                    "datacomp_xl_s13b_b90k, or what came with the published checkpoint (which cannot read text). Other "
                    "ViT-L-14 files have the same shapes and give wrong results.",
                ),
            ],
            outputs=[InfDiTCLIP.Output(display_name="clip", tooltip="For Inf-DiT CLIP Encode.")],
            hidden=[io.Hidden.unique_id],
            **search_aliases("inf-dit clip", "infdit clip", "clip vision loader", "open_clip"),
        )

    @classmethod
    def validate_inputs(cls, clip_name: str | None = None) -> bool | str:
        """In place of ComfyUI's own check of the list: the same, with a way out. A link's value is not known yet."""
        return clip_name is None or clip_name in clip_files() or refusal(missing_clip(clip_name), cls)

    @classmethod
    def fingerprint_inputs(cls, clip_name: str | None = None) -> str:
        """Changes when the file does, so that CLIP that was replaced is loaded again. A link's name is not known."""
        return "" if clip_name is None else fingerprint(CLIP_FOLDERS, clip_name)

    @classmethod
    def execute(cls, clip_name: str) -> io.NodeOutput:
        with captured_warnings() as warnings:
            clip = managed_clip(clip_name, clip_path(clip_name))
        return io.NodeOutput(replace(clip, warnings=tuple(warnings)))


class InfDiTCLIPEncode(io.ComfyNode):
    """Pictures and texts to what the model is told."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTCLIPEncode",
            display_name="Inf-DiT CLIP Encode",
            category=CATEGORY,
            description="Tells the published model what is in the picture. Two optional texts lead the result from "
            "what the negative says to what the positive says.",
            inputs=[
                InfDiTCLIP.Input("clip", tooltip="From Load Inf-DiT CLIP."),
                io.Image.Input("image", tooltip="The pictures that will be enlarged."),
                io.String.Input(
                    "positive", optional=True, default="", multiline=True, dynamic_prompts=True, placeholder=POSITIVE,
                    tooltip=f'What to lead the picture to. The paper\'s example is "{POSITIVE}" Empty: nothing. Needs '
                    "a CLIP file that can read text.",
                ),
                io.String.Input(
                    "negative", optional=True, default="", multiline=True, dynamic_prompts=True, placeholder=NEGATIVE,
                    tooltip=f'What to lead the picture away from. The paper\'s example is "{NEGATIVE}" Empty: nothing.',
                ),
                io.Float.Input(
                    "strength", optional=True, default=STRENGTH, min=0.0, max=MAX_STRENGTH, step=0.05,
                    display_mode=SLIDER,
                    tooltip="How strongly the texts lead. 0: not at all; 2 is the paper's. Without texts it does "
                    "nothing.",
                ),
                io.Combo.Input(
                    "view", optional=True, options=list(VIEWS), default=VIEWS[0],
                    tooltip="What CLIP sees of a picture that is not square. crop: the square in its middle, as the "
                    "model was trained; pad: all of it, smaller, for panoramas and tall pictures.",
                ),
            ],
            outputs=[InfDiTConditioning.Output(display_name="conditioning", tooltip="For the Inf-DiT Upscale nodes.")],
            **search_aliases("inf-dit prompt", "infdit conditioning", "clip vision encode", "text guidance"),
        )

    @classmethod
    def execute(
        cls, clip: ManagedCLIP, image: Tensor, positive: str = "", negative: str = "", strength: float = STRENGTH,
        view: View = "crop",
    ) -> io.NodeOutput:
        colour = visible_colour(from_image(image).clamp(0, 1)) * 2 - 1
        with captured_warnings() as warnings, clip_at_work(clip) as encoder:
            vectors = clip_embedding(encoder, colour, positive, negative, strength, view).float().cpu()
        description = _describe(clip, positive, negative, strength)
        text = {"positive": positive, "negative": negative, "strength": strength}
        return io.NodeOutput(GuidedVector(vectors, description, (*clip.warnings, *warnings), text))


def _describe(clip: ManagedCLIP, positive: str, negative: str, strength: float) -> str:
    texts = [f"{way} {text.strip()!r}" for way, text in (("to", positive), ("away from", negative)) if text.strip()]
    led = f", led {' and '.join(texts)} with strength {strength:g}" if texts and strength else ""
    return f"the picture as {clip.name} sees it{led}"


@contextmanager
def captured_warnings() -> Iterator[list[str]]:
    """What the library warns of meanwhile: nobody who looks at a page sees the log."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger = logging.getLogger(infdit_clip.__name__)
    logger.addHandler(handler)
    try:
        yield warnings
    finally:
        logger.removeHandler(handler)


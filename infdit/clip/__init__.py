"""CLIP: what the network is told about the whole image while it works on blocks.

    clip_embedding = norm(I + α·(C_positive − C_negative))

I is the picture's vector, C are those of two optional texts (`encoder`, `guidance`). The weights come from open_clip's
file or from a published Inf-DiT checkpoint (`loader`).
"""

from __future__ import annotations

from .encoder import VIEWS, CLIPEncoder, OpenCLIPMissingError, TextConfig, View, VisionConfig, preprocess
from .guidance import MAX_STRENGTH, NEGATIVE, POSITIVE, STRENGTH, clip_embedding, guide, text_direction
from .loader import CHECKPOINT_PREFIX, CONVERTED, WEIGHTS, load_clip

__all__ = [
    "CHECKPOINT_PREFIX",
    "CONVERTED",
    "MAX_STRENGTH",
    "NEGATIVE",
    "POSITIVE",
    "STRENGTH",
    "VIEWS",
    "WEIGHTS",
    "CLIPEncoder",
    "OpenCLIPMissingError",
    "TextConfig",
    "View",
    "VisionConfig",
    "clip_embedding",
    "guide",
    "load_clip",
    "preprocess",
    "text_direction",
]

"""CLIP: what the network is told about the whole image while it works on blocks.

    clip_embedding = norm(I + α·(C_positive − C_negative))

I is the picture's vector (`view`: what CLIP sees of it; `towers`), C are those of two optional texts (`guidance`).
The weights come from open_clip's file or from a published Inf-DiT checkpoint (`files`).
"""

from __future__ import annotations

from .files import CHECKPOINT_PREFIX, CONVERTED, WEIGHTS, load_clip
from .guidance import MAX_STRENGTH, NEGATIVE, POSITIVE, STRENGTH, clip_embedding, guide, text_direction
from .towers import CLIPEncoder, OpenCLIPMissingError, TextConfig, VisionConfig
from .view import VIEWS, View, preprocess

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

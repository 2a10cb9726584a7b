"""CLIP: what the network is told about the whole image while it works on blocks.

    clip_embedding = norm(I + α·(C_positive − C_negative))

I is the picture's vector, C are those of two optional texts (`encoder`, `guidance`). The weights come from open_clip's
file or from a published Inf-DiT checkpoint (`loader`).
"""

# ruff: noqa: F401 - what others use of it
from .encoder import VIEWS, CLIPEncoder, OpenCLIPMissingError, TextConfig, View, VisionConfig, preprocess
from .guidance import MAX_STRENGTH, NEGATIVE, POSITIVE, STRENGTH, clip_embedding, guide, text_direction
from .loader import WEIGHTS, load_clip

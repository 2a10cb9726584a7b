"""Picture files in and out: what a person sees in a viewer is what the network gets, and the way back.

In:  file → samples of L, LA, RGB or RGBA → upright → value / white, white being 255, or 65535 for 16-bit grey.
Out: clip(value, 0, 1) → ⌊255·value + ½⌋ → a hidden file beside the target → renamed over it.
Colours stay in the space the file declares: its ICC profile travels along. Only what has no place in an RGB or
grey file (CMYK, Lab) or in the format written (a profile in BMP, grey in WebP, 1 MiB of it in PNG) is converted, to
sRGB.
"""

from __future__ import annotations

from .notes import read_note
from .reading import SUFFIXES, Picture, PictureError, find_pictures, read_picture
from .writing import TargetError, check_target, place_for, target_explained, write_picture

__all__ = [
    "SUFFIXES",
    "Picture",
    "PictureError",
    "TargetError",
    "check_target",
    "find_pictures",
    "place_for",
    "read_note",
    "read_picture",
    "target_explained",
    "write_picture",
]

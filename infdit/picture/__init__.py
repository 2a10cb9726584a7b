"""Picture files in and out: what a person sees in a viewer is what the network gets, and the way back.

In:  file → samples of L, LA, RGB or RGBA → upright → value / white, white being 255, 65535 for 16 bits, 1 for floats.
Out: clip(value, 0, 1) → ⌊white·value + ½⌋ → a hidden file beside the target → renamed over it.
Pillow has no colour of 16 bits. Both halves of it are read by Pillow all the same (`reading._low_bytes`); PNG of
16 bits and TIFF are written by `png` and `tiff`, in some lines, row by row; TIFF that Pillow cannot read is tifffile's,
small, free (BSD) and well kept. What would do all of it, imagecodecs or OpenCV, is of 80 to 150 MB.
Colours stay in the space the file declares: its ICC profile travels along. Only what has no place in an RGB or
grey file (CMYK, Lab) or in the format written (a profile in BMP, grey in WebP, 1 MiB of it in PNG) is converted, to
sRGB.
"""

from __future__ import annotations

from .notes import read_note
from .picture import Picture, PictureError
from .png import check_png
from .reading import SUFFIXES, find_pictures, read_picture
from .writing import DEPTHS, TargetError, check_target, depth_of, place_for, target_explained, write_picture

__all__ = [
    "DEPTHS",
    "SUFFIXES",
    "Picture",
    "PictureError",
    "TargetError",
    "check_png",
    "check_target",
    "depth_of",
    "find_pictures",
    "place_for",
    "read_note",
    "read_picture",
    "target_explained",
    "write_picture",
]

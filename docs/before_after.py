"""Makes docs/before_after.png: a crop of pictures/flowers.png by bicubic and by the bundled model, both ×4."""

from pathlib import Path

import torch
from PIL import Image

import infdit
from infdit.picture import Picture, read_picture, write_picture

ROOT = Path(__file__).parents[1]
LEFT, TOP, SIDE = 96, 110, 100  # of the crop, in pixels of the source


def main() -> None:
    """Writes the picture; run from the project's root as `python -m docs.before_after`."""
    source = read_picture(ROOT / "pictures" / "flowers.png").pixels[TOP : TOP + SIDE, LEFT : LEFT + SIDE]
    with Image.open(ROOT / "pictures" / "flowers.png") as image:
        crop = image.convert("RGB").crop((LEFT, TOP, LEFT + SIDE, TOP + SIDE))
    bicubic = torch.frombuffer(
        bytearray(crop.resize((4 * SIDE, 4 * SIDE), Image.Resampling.BICUBIC).tobytes()), dtype=torch.uint8
    ).view(4 * SIDE, 4 * SIDE, 3)
    upscaled = infdit.upscale(infdit.load_model("mini"), source[None], 4.0)[0]
    both = torch.cat((bicubic / 255, torch.ones(4 * SIDE, 8, 3), upscaled), 1)
    write_picture(ROOT / "docs" / "before_after.png", Picture(both, None, grey=False))


if __name__ == "__main__":
    main()

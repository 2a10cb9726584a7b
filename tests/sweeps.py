"""A small model's sizes, inputs for one evaluation of it, and the dense transcription's answer to them."""

from __future__ import annotations

import dense
import torch

from infdit import Conditioning

SIZES = {"layers": 3, "hidden": 16, "heads": 2, "block": 16, "vector_dim": 8}
BLOCK, SIDE = 16, 4
PERIOD = 2 * SIDE  # two blocks: grids of up to five blocks cross it twice
EXACT = {"atol": 1e-10, "rtol": 0}


def random_inputs(
    rows: int, columns: int, batch: int = 2, seed: int = 1
) -> tuple[torch.Tensor, Conditioning, torch.Tensor]:
    """x, what it is conditioned on, and a noise level for each picture; all float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    h, w = rows * BLOCK, columns * BLOCK
    conditioning = Conditioning(randn(batch, 3, h // 4, w // 4), randn(batch, 3, h, w), randn(batch, 8))
    return randn(batch, 3, h, w), conditioning, torch.linspace(0.3, 2.0, batch, dtype=torch.float64)


def reference(
    weights: dict[str, torch.Tensor], x: torch.Tensor, sigma: torch.Tensor, c: Conditioning, **options: object
) -> torch.Tensor:
    return dense.denoise(
        weights, x, sigma, c.lr, c.lr_upscaled, c.clip_embedding, block=BLOCK, period=PERIOD, **options
    )

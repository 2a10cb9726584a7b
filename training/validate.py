"""How good a model is, in seconds: one step D(up + σ·ε; σ) on the middles of pictures that it never saw.

A bridge starts without noise: D(up; sigma_max).

Gain is the luma PSNR over that of `up`, in dB. Seam is the mean gradient across a grid of lines over that elsewhere,
divided by the original's: 1 is a picture that does not show how it was cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import scores
from infdit import Conditioning, MemoryPlan
from infdit.denoiser import Denoiser
from infdit.model import InfDiT

from .data import Crops
from .gradients import share

SIGMAS = (1.0, 2.0, 5.0)
NOISE_SEED = 1234


def validate(model: InfDiT, crops: dict[int, Crops], bridge: float = 0.0) -> dict[str, float]:
    """What `of_scale` says of the first scale; of more, "gain" is the mean over all, and each is told too."""
    found = {scale: of_scale(model, each, bridge) for scale, each in crops.items()}
    gains = {f"gain_x{scale}": scores["gain"] for scale, scores in found.items()} if len(found) > 1 else {}
    every = [scores["gain"] for scores in found.values()]
    return {**next(iter(found.values())), "gain": sum(every) / len(every), **gains}


def of_scale(model: InfDiT, crops: Crops, bridge: float = 0.0) -> dict[str, float]:
    """`gain`, the mean over noise levels of gains in dB, and each; `patch_seam` and `block_seam` at the middle one.

    bridge: sigma_max of a bridge, the only level then; 0: the levels SIGMAS.
    """
    generator = torch.Generator().manual_seed(NOISE_SEED)
    noise = torch.zeros(crops.hr.shape) if bridge else torch.randn(crops.hr.shape, generator=generator)
    sigmas = (bridge,) if bridge else SIGMAS
    found: dict[str, float] = {}
    for sigma in sigmas:
        levels = (share(crops.scale) * sigma).tolist() if bridge else [sigma] * len(noise)
        results = [_one_step(model, crops, noise, i, level) for i, level in enumerate(levels)]
        triples = [tuple(map(luma, each)) for each in zip(results, crops.hr, crops.up, strict=True)]
        gains = [scores.psnr(y, hr, scores.BORDER) - scores.psnr(up, hr, scores.BORDER) for y, hr, up in triples]
        found[f"gain_{sigma:g}"] = sum(gains) / len(gains)
        if sigma == sigmas[len(sigmas) // 2]:
            for name, period in (("patch", model.config.patch_size), ("block", model.config.block_size)):
                ours, theirs = (sum(scores.seam(x[i], period) for x in triples) for i in (0, 1))
                found[f"{name}_seam"] = ours / theirs
    return {"gain": sum(found[f"gain_{sigma:g}"] for sigma in sigmas) / len(sigmas), **found}


@torch.no_grad()
def _one_step(model: InfDiT, crops: Crops, noise: Tensor, i: int, sigma: float) -> Tensor:
    device = model.device
    up, lr = crops.up[i : i + 1].to(device), crops.lr[i : i + 1].to(device)
    denoise = Denoiser(model, Conditioning(lr, up), MemoryPlan(model.config.num_layers, 2**20))
    return denoise(up + sigma * noise[i : i + 1].to(device), sigma)[0].cpu()


def luma(picture: Tensor) -> scores.Floats:
    """(3, h, w) in [-1, 1] → (h, w), 16..235, rounded as a file is."""
    return scores.luma(((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).numpy())

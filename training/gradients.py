"""The loss of one step, and its gradients.

Loss (Karras et al. 2022, section 5): with y a picture, ε noise, ln σ normal and D(x; σ) = c_skip·x + c_out·F,

    E (σ² + σ_data²)/(σ·σ_data)² · |D(y + σε; σ) − y|²

which is plain L2 on F. Or the bridge from the enlarged picture (InDI, Delbracio and Milanfar 2023, inside the same
c_skip and c_out): with up the enlarged picture and t in 0..1,

    x = y + t·(up − y) + k·σ·ε,   σ = t·sigma_max

so that at t = 1 and k = 0, which most crops have, one evaluation from x = up is the sharpest picture that is certain.
EDM's question hides the input under noise many times its missing detail, and the whole picture must pass through the
tokens; here c_skip·x is nearly the picture, and F is what is missing.

To either loss can be added, with the same weight, half the squared differences of the error across
the lines between patches and between blocks: any positive quadratic form of the error has the same minimum, the
posterior mean, but with this one the grids go sooner.

A step is a fixed number of parts, each with crops, noise and a position in the picture of its own, drawn from
(seed, step, part); gradients are added in the order of the parts. So the result depends neither on how many workers
share the parts nor on where a run was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.perceptual import STLPIPS, st_lpips
from infdit import Conditioning, MemoryPlan
from infdit.config import InfDiTConfig
from infdit.denoiser import SIGMA_DATA, Denoiser
from infdit.model import InfDiT
from infdit.seams import LUMA

from . import data
from .attention import PlainAttention
from .degrade import SCALE

LOSSES = ("squares", "charbonnier", "roots")
EPSILON = 0.01  # pixels in [-1, 1], a grey level and a quarter: errors below it count as squares under every loss
FLAT = 1e-4  # pixels in [-1, 1]: a mean step below which there is nothing to be uneven
BLOCK_SEAM = 0.5  # weight of the lines between blocks beside that of all lines between patches


@dataclass(frozen=True)
class Recipe:
    """What makes a run what it is; kept in its state.

    seed: of everything; crop: side in pixels; crops: of a step, in `parts` equal parts; sigma_mean, sigma_std: of ln σ;
    bridge: sigma_max of the bridge in place of those, 0: EDM's loss; ends: share of crops with t = 1; clean: share with
    k = 0; loss: see `of_crops`; tiles, original, damaged, doubled: see `tiles.Tiles`; perceptual: weight of ST-LPIPS
    beside it; seam, grid, even: weights of `across`, `periodic` and `unevenness`; rate: learning rate after `warmup`
    steps; decay: share of the run, its last, in which the rate falls to 0; ema: of the averaged weights, less at first;
    clip: norm of the gradient at most; optimizer: "muon" or "adamw"; precision: "bfloat16" (autocast) or "float32".
    """

    seed: int = 0
    crop: int = 192
    crops: int = 8
    parts: int = 4
    sigma_mean: float = -0.2
    sigma_std: float = 1.4
    bridge: float = 0.0
    ends: float = 0.6
    clean: float = 0.7
    loss: str = "squares"
    tiles: int = 4096
    original: float = 0.0
    damaged: float = 0.0
    doubled: float = 0.0
    perceptual: float = 0.0
    seam: float = 0.0
    grid: float = 0.0
    even: float = 0.0
    rate: float = 1e-3
    warmup: int = 100
    decay: float = 0.8
    ema: float = 0.998
    clip: float = 1.0
    optimizer: str = "muon"
    precision: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.crops < 1 or self.parts < 1 or self.crops % self.parts:
            raise ValueError(f"{self.crops} crops cannot be cut into {self.parts} equal parts")
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer {self.optimizer!r} must be 'muon' or 'adamw'")
        if self.loss not in LOSSES:
            raise ValueError(f"loss {self.loss!r} must be one of {', '.join(LOSSES)}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay {self.decay} must be a share of the run, above 0 and at most 1")

    @property
    def scales(self) -> dict[int, float]:
        """What pictures are enlarged by, each with the share of sigma_max that says how much is missing then."""
        return {scale: float(share(torch.tensor(scale))) for scale in ((SCALE, 2) if self.doubled else (SCALE,))}


class Gradients:
    """Gradients of the parts of a step.

    Args:
        model: parameters of float32, on the device that computes.
        source: of the crops.
        slots: (parts, number of weights), where the gradients of each part go, in the order of the parameters.
        compiled: compile the layers; where that fails they run as they are.
        threads: so many make the crops of the next two steps meanwhile.
    """

    def __init__(
        self,
        model: InfDiT,
        recipe: Recipe,
        source: data.Source,
        slots: Tensor,
        *,
        compiled: bool = False,
        threads: int = 0,
    ) -> None:
        self.model, self.recipe, self.source, self.slots = model, recipe, source, slots
        if compiled:
            torch._dynamo.config.suppress_errors = True
            for layer in model.layers:
                layer.compile(dynamic=False)
        self._looks = _st_lpips(model.device) if recipe.perceptual else None
        self._pool = ThreadPoolExecutor(threads) if threads else None
        self._ahead: dict[tuple[int, int], Future[data.Crops]] = {}

    def run(self, step: int, parts: Iterable[int] | None = None) -> list[float]:
        """Fill the slots of a step, of all parts or of some; their losses."""
        parts = range(self.recipe.parts) if parts is None else parts
        if self._pool:
            for later in ((s, part) for s in range(step, step + 3) for part in parts):
                if later not in self._ahead:
                    self._ahead[later] = self._pool.submit(self.crops, *later)
            return [self._fill(step, part, self._ahead.pop((step, part)).result()) for part in parts]
        return [self._fill(step, part, self.crops(step, part)) for part in parts]

    def crops(self, step: int, part: int) -> data.Crops:
        """The pictures of a part."""
        recipe = self.recipe
        return self.source.draw(recipe.crops // recipe.parts, recipe.crop, (recipe.seed, step, part))

    def _fill(self, step: int, part: int, crops: data.Crops) -> float:
        """Fill the slot of a part; its loss."""
        model, recipe = self.model, self.recipe
        device, config = model.device, model.config
        rng = np.random.default_rng([recipe.seed, step, part, 1])
        noise = torch.from_numpy(rng.standard_normal(crops.hr.shape, np.float32)).to(device)
        hr, up, lr = (x.to(device) for x in (crops.hr, crops.up, crops.lr))
        if recipe.bridge:
            t, k = (torch.from_numpy(value).to(device) for value in _bridge(recipe, len(noise), rng))
            sigma = t * share(crops.scale).to(t) * recipe.bridge
            x = torch.lerp(hr, up, t[:, None, None, None]) + (k * sigma)[:, None, None, None] * noise
        else:
            sigma = _sigmas(recipe, len(noise), part, np.random.default_rng([recipe.seed, step])).to(device)
            x = hr + sigma[:, None, None, None] * noise
        with ExitStack() as stack:
            if recipe.precision == "bfloat16":
                stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                stack.enter_context(PlainAttention())
            plan = MemoryPlan(config.num_layers, 2**20)
            denoise = Denoiser(model, Conditioning(lr, up), plan, origin=_origin(config, recipe.crop, rng))
            denoised = denoise(x, sigma)
        error = denoised - hr
        scale = (sigma**2 + SIGMA_DATA**2).sqrt() / (sigma * SIGMA_DATA)
        error = error * scale[:, None, None, None]  # in units of F
        lines = 0.0
        if recipe.seam:
            lines = recipe.seam * (across(error, config.patch_size) + BLOCK_SEAM * across(error, config.block_size))
        if recipe.grid:
            lines = lines + recipe.grid * periodic(error, config.patch_size)
        loss = of_crops(recipe.loss, error, lines, EPSILON * scale).mean()
        if self._looks:
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                loss = loss + recipe.perceptual * self._looks(denoised, hr).mean()
        if recipe.even:
            steps = unevenness(denoised, config.patch_size) + unevenness(denoised, config.block_size)
            loss = loss + recipe.even * steps
        parameters = list(model.parameters())
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        every = (torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True))
        torch.cat([gradient.flatten() for gradient in every], out=self.slots[part])
        return float(loss.detach())


def _st_lpips(device: torch.device) -> STLPIPS:
    """The larger network, so that the smaller one, by which pictures are judged, was not trained for.

    Raises:
        ValueError: its weights are not there.
    """
    found = st_lpips("vgg")
    if found is None:
        raise ValueError("a perceptual loss needs its weights: pip install stlpips-pytorch --no-deps")
    return found.to(device).requires_grad_(False)


def of_crops(kind: str, error: Tensor, lines: Tensor | float, epsilon: Tensor) -> Tensor:
    """Loss of each crop, (B,), of an error (B, 3, h, w) with a second term, both in units of F, as ε (B,) is.

    "squares": the mean square. "charbonnier": the mean of √(e² + ε²). "roots": √(mean square + ε²), nearly as evenly
    as decibels count crops: under squares a page of text weighs as much as thirty photographs.
    """
    if kind == "charbonnier":
        return (error.square() + epsilon[:, None, None, None] ** 2).sqrt().mean((1, 2, 3)) + lines
    squares = error.square().mean((1, 2, 3)) + lines
    return squares if kind == "squares" else (squares + epsilon**2).sqrt()


def across(error: Tensor, cell: int) -> Tensor:
    """Half the mean squared difference of neighbours in different cells, (B,): of pure noise its square."""
    if max(error.shape[-2:]) <= cell:
        return error.new_zeros(len(error))
    rows = error[..., cell::cell, :] - error[..., cell - 1 : -1 : cell, :]
    columns = error[..., cell::cell] - error[..., cell - 1 : -1 : cell]
    return (rows.square().mean((1, 2, 3)) + columns.square().mean((1, 2, 3))) / 4


def periodic(error: Tensor, cell: int) -> Tensor:
    """Mean square of what is the same in all cells of some 32 pixels around, (B,): a pattern that the eye sees at once.

    A perceptual loss does not see it, and rewards the contrast that it gives.
    """
    phases = F.avg_pool2d(F.pixel_unshuffle(error, cell), 32 // cell).unflatten(1, (error.shape[1], -1))
    return (phases - phases.mean(2, keepdim=True)).square().mean((1, 2, 3, 4))


def unevenness(pictures: Tensor, cell: int) -> Tensor:
    """(s − 1)², (), of the seam score s of all pictures (B, 3, h, w) together: see `benchmarks.scores.seam`.

    This one moves the minimum: what is certain changes most half way between two known pixels, where patches meet.
    """
    if max(pictures.shape[-2:]) <= cell:
        return pictures.new_zeros(())
    y = torch.einsum("bchw,c->bhw", pictures.float(), pictures.new_tensor(LUMA, dtype=torch.float32))
    steps = [y.diff(dim=dim).abs().movedim(dim, -1) for dim in (-2, -1)]
    lines = torch.cat([each[..., cell - 1 :: cell].flatten() for each in steps])
    every = torch.cat([each.flatten() for each in steps])
    elsewhere = (every.sum() - lines.sum()) / (len(every) - len(lines))
    return ((lines.mean() - elsewhere) / (elsewhere + FLAT)).square()


def _sigmas(recipe: Recipe, count: int, part: int, rng: np.random.Generator) -> Tensor:
    """Noise levels of one part: one from each of as many equally likely ranges as a step has crops, shuffled."""
    ranges = rng.permutation(recipe.crops)
    places = torch.from_numpy((ranges + rng.random(recipe.crops)) / recipe.crops)
    normal = math.sqrt(2) * torch.erfinv(2 * places.clamp(1e-6, 1 - 1e-6) - 1)
    return (recipe.sigma_mean + recipe.sigma_std * normal).exp().float()[part * count : (part + 1) * count]


def share(scale: Tensor) -> Tensor:
    """Share of sigma_max that says how much is missing of pictures enlarged by `scale`: 1 at 4, a half at 2."""
    return scale.float().log2() / math.log2(SCALE)


def _bridge(recipe: Recipe, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """t and k of the crops of a part, (count,) float32 each."""
    t = np.where(rng.random(count) < recipe.ends, 1.0, rng.uniform(0.02, 1, count))
    k = np.where(rng.random(count) < recipe.clean, 0.0, rng.random(count))
    return t.astype(np.float32), k.astype(np.float32)


def _origin(config: InfDiTConfig, crop: int, rng: np.random.Generator) -> tuple[int, int]:
    """A place for the crop's first patch: whole blocks, anywhere within the period of positions."""
    blocks = max(1, config.position_period // config.block_side - crop // config.block_size + 1)
    row, column = (int(place) * config.block_side for place in rng.integers(blocks, size=2))
    return row, column

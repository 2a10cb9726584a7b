"""One training step, and the state that carries a run from one session to the next.

Loss (Karras et al. 2022, section 5): with y a picture, ε noise, ln σ normal and D(x; σ) = c_skip·x + c_out·F,

    E (σ² + σ_data²)/(σ·σ_data)² · |D(y + σε; σ) − y|²

which is plain L2 on F. To it can be added, with the same weight, half the squared differences of the error across
the lines between patches and between blocks: any positive quadratic form of the error has the same minimum, the
posterior mean, but with this one the grids go sooner.

A step is a fixed number of parts, each with crops, noise and a position in the picture of its own, drawn from
(seed, step, part); gradients are added in the order of the parts. So the result depends neither on how many workers
share the parts nor on where a run was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from infdit import Conditioning, MemoryPlan
from infdit.config import InfDiTConfig
from infdit.denoiser import SIGMA_DATA, Denoiser
from infdit.model import InfDiT

from . import data
from .attention import PlainAttention
from .optimizer import Optimizer, OptimizerState

BLOCK_SEAM = 0.5  # weight of the lines between blocks beside that of all lines between patches


@dataclass(frozen=True)
class Recipe:
    """What makes a run what it is; kept in its state.

    seed: of everything; crop: side in pixels; crops: of a step, in `parts` equal parts; sigma_mean, sigma_std: of
    ln σ; seam: weight of the second term; rate: learning rate after `warmup` steps; decay: share of the run, its last,
    in which the rate falls to 0; ema: of the averaged weights, less at first; clip: norm of the gradient at most;
    optimizer: "muon" or "adamw"; precision: "bfloat16" (autocast) or "float32".
    """

    seed: int = 0
    crop: int = 192
    crops: int = 8
    parts: int = 4
    sigma_mean: float = -0.2
    sigma_std: float = 1.4
    seam: float = 0.0
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
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay {self.decay} must be a share of the run, above 0 and at most 1")


@dataclass
class Decay:
    """The learning rate falls in a straight line from `factor` at step `start` to 0, `length` steps later."""

    start: int
    factor: float
    length: int

    def at(self, step: int) -> float:
        """The factor at a step."""
        return self.factor * max(0.0, 1 - (step - self.start) / max(1, self.length))


class TrainerState(TypedDict):
    """Everything that decides how a run goes on. There is no random state: all draws follow from the step."""

    model: list[Tensor]
    ema: list[Tensor]
    optimizer: OptimizerState
    step: int
    decay: dict[str, Any] | None


class Trainer:
    """Model, averaged weights, optimizer and the number of steps done.

    Args:
        model: parameters of float32, on the device that trains.
        pictures: (h, w, 3) uint8, see `data.read`.
        workers: threads that share the parts of a step. On a CPU one a core, each with one thread of arithmetic: they
            wait for each other once a step instead of at every operation. On a GPU they make the crops.
        compiled: compile the layers; where that fails they run as they are.
    """

    def __init__(
        self, model: InfDiT, recipe: Recipe, pictures: Sequence[np.ndarray], workers: int, compiled: bool = False
    ) -> None:
        self.model, self.recipe, self.pictures = model.requires_grad_(True), recipe, pictures
        names, self.parameters = zip(*model.named_parameters(), strict=True)
        self.optimizer = Optimizer(names, self.parameters, recipe.optimizer)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.names, self.step = list(names), 0
        self.decay: Decay | None = None
        self._pool = ThreadPoolExecutor(workers)
        if compiled:
            _compile(model)
            self._gradients(self._crops(0, 0), 0)  # by one thread: compiling is nothing that threads should share
        self._ahead: dict[int, list] = {}

    @property
    def config(self) -> InfDiTConfig:
        """Sizes of the model."""
        return self.model.config

    def advance(self) -> float:
        """One step; its loss."""
        parts = range(self.recipe.parts)
        if self.model.device.type == "cpu":
            results = list(self._pool.map(lambda part: self._gradients(self._crops(self.step, part), part), parts))
        else:
            results = [self._gradients(crops, part) for part, crops in enumerate(self._crops_ahead())]
        gradients = [torch.stack(same).mean(0) for same in zip(*(g for _, g in results), strict=True)]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        scale = (self.recipe.clip / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step([g * scale for g in gradients], self.rate())
        self.step += 1
        weight = 1 - min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.parameters, strict=True):
                average.lerp_(parameter, weight)
        return float(torch.stack([loss for loss, _ in results]).mean())

    def rate(self) -> float:
        """The learning rate of the coming step."""
        factor = min(1.0, (self.step + 1) / max(1, self.recipe.warmup))
        return self.recipe.rate * factor * (self.decay.at(self.step) if self.decay else 1.0)

    def averaged(self) -> InfDiT:
        """A model of the averaged weights, in bf16 if that is what is trained for: as it will be used."""
        with torch.device("meta"):
            model = InfDiT(self.config, self.model.defaults)
        dtype = getattr(torch, self.recipe.precision)
        model.load_state_dict({n: p.to(dtype) for n, p in zip(self.names, self.ema, strict=True)}, assign=True)
        return model.requires_grad_(False).eval()

    def state_dict(self) -> TrainerState:
        """What `load_state_dict` needs to go on as if nothing had happened."""
        return {
            "model": [p.detach() for p in self.parameters],
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "decay": asdict(self.decay) if self.decay else None,
        }

    def load_state_dict(self, state: TrainerState) -> None:
        """Continue from `state_dict()`."""
        with torch.no_grad():
            for kept, saved in ((self.parameters, state["model"]), (self.ema, state["ema"])):
                for a, b in zip(kept, saved, strict=True):
                    a.copy_(b)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.decay = Decay(**state["decay"]) if state["decay"] else None

    def _crops(self, step: int, part: int) -> data.Crops:
        count = self.recipe.crops // self.recipe.parts
        return data.draw(self.pictures, count, self.recipe.crop, (self.recipe.seed, step, part))

    def _crops_ahead(self) -> list[data.Crops]:
        """The crops of this step, while those of the next two are being made."""
        for step in range(self.step, self.step + 3):
            if step not in self._ahead:
                self._ahead[step] = [self._pool.submit(self._crops, step, p) for p in range(self.recipe.parts)]
        return [future.result() for future in self._ahead.pop(self.step)]

    def _gradients(self, crops: data.Crops, part: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss of one part and its gradients, in the order of the parameters."""
        device, recipe = self.model.device, self.recipe
        rng = np.random.default_rng([recipe.seed, self.step, part, 1])
        noise = torch.from_numpy(rng.standard_normal(crops.hr.shape, np.float32)).to(device)
        sigma = _sigmas(recipe, len(noise), part, np.random.default_rng([recipe.seed, self.step])).to(device)
        hr, up, lr = (x.to(device) for x in (crops.hr, crops.up, crops.lr))
        with ExitStack() as stack:
            if recipe.precision == "bfloat16":
                stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                stack.enter_context(PlainAttention())
            plan = MemoryPlan(self.config.num_layers, 2**20)
            denoise = Denoiser(self.model, Conditioning(lr, up), plan, origin=_origin(self.config, recipe.crop, rng))
            error = denoise(hr + sigma[:, None, None, None] * noise, sigma) - hr
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        square = error.square().mean((1, 2, 3))
        if recipe.seam:
            across = _across(error, self.config.patch_size) + BLOCK_SEAM * _across(error, self.config.block_size)
            square = square + recipe.seam * across
        loss = (weight * square).mean()
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = zip(gradients, self.parameters, strict=True)
        return loss.detach(), tuple(torch.zeros_like(p) if g is None else g for g, p in pairs)


def _compile(model: InfDiT) -> None:
    torch._dynamo.config.suppress_errors = True
    for layer in model.layers:
        layer.compile(dynamic=False)


def _across(error: Tensor, cell: int) -> Tensor:
    """Half the mean squared difference of neighbours in different cells, (B,): of pure noise its square."""
    if max(error.shape[-2:]) <= cell:
        return error.new_zeros(len(error))
    rows = error[..., cell::cell, :] - error[..., cell - 1 : -1 : cell, :]
    columns = error[..., cell::cell] - error[..., cell - 1 : -1 : cell]
    return (rows.square().mean((1, 2, 3)) + columns.square().mean((1, 2, 3))) / 4


def _sigmas(recipe: Recipe, count: int, part: int, rng: np.random.Generator) -> Tensor:
    """Noise levels of one part: one from each of as many equally likely ranges as a step has crops, shuffled."""
    ranges = rng.permutation(recipe.crops)
    places = torch.from_numpy((ranges + rng.random(recipe.crops)) / recipe.crops)
    normal = math.sqrt(2) * torch.erfinv(2 * places.clamp(1e-6, 1 - 1e-6) - 1)
    return (recipe.sigma_mean + recipe.sigma_std * normal).exp().float()[part * count : (part + 1) * count]


def _origin(config: InfDiTConfig, crop: int, rng: np.random.Generator) -> tuple[int, int]:
    """A place for the crop's first patch: whole blocks, anywhere within the period of positions."""
    blocks = max(1, config.position_period // config.block_side - crop // config.block_size + 1)
    row, column = (int(place) * config.block_side for place in rng.integers(blocks, size=2))
    return row, column

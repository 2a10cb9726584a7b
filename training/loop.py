"""Steps of training, and the state that carries a run from one session to the next."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from infdit.config import InfDiTConfig
from infdit.model import InfDiT

from .data import Source
from .gradients import Gradients, Recipe
from .optimizer import Optimizer
from .workers import Workers


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
    optimizer: dict[str, Any]
    step: int
    decay: dict[str, Any] | None


class Trainer:
    """Model, averaged weights, optimizer and the number of steps done.

    Args:
        model: parameters of float32, on the device that trains.
        source: of the crops.
        workers: on a CPU processes that share the parts of a step, see `workers`; on a GPU threads that make crops.
        compiled: compile the layers; where that fails they run as they are.
    """

    def __init__(
        self, model: InfDiT, recipe: Recipe, source: Source, workers: int, compiled: bool = False
    ) -> None:
        self.model, self.recipe = model.requires_grad_(True), recipe
        names, self.parameters = zip(*model.named_parameters(), strict=True)
        self.sizes = [p.numel() for p in self.parameters]
        self.slots = torch.zeros(recipe.parts, sum(self.sizes), device=model.device)  # gradients of the parts
        job = (model, recipe, source, self.slots)
        if model.device.type == "cpu" and workers > 1:
            self.gradients = Workers(*job, count=min(workers, recipe.parts), compiled=compiled)
        else:
            ahead = 0 if model.device.type == "cpu" else workers
            self.gradients = Gradients(*job, compiled=compiled, threads=ahead)
        self.optimizer = Optimizer(names, self.parameters, recipe.optimizer)
        # not torch.optim.swa_utils: it copies the whole model, and a weight that grows at first is ours to write anyway
        self.ema = [p.detach().clone() for p in self.parameters]
        self.names, self.step = list(names), 0
        self.decay: Decay | None = None

    @property
    def config(self) -> InfDiTConfig:
        """Sizes of the model."""
        return self.model.config

    def advance(self) -> float:
        """One step; its loss."""
        losses = self.gradients.run(self.step)
        pairs = zip(self.slots.mean(0).split(self.sizes), self.parameters, strict=True)
        gradients = [gradient.view_as(p) for gradient, p in pairs]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        scale = (self.recipe.clip / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step([g * scale for g in gradients], self.rate())
        self.step += 1
        weight = 1 - min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.parameters, strict=True):
                average.lerp_(parameter, weight)
        return sum(losses) / len(losses)

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

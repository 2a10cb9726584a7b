"""Muon for the matrices of the layers, AdamW for everything else.

Muon (Jordan et al. 2024): the momentum M of a matrix is replaced by its nearest semi-orthogonal matrix, UVᵀ of its
singular value decomposition, through five Newton-Schulz steps. Scaled by 0.2·√max(rows, columns) (Liu et al. 2025)
the update has AdamW's usual size, and one learning rate serves both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.99), 1e-8
MOMENTUM, DECAY = 0.95, 0.01
_PARTS = {"qkv.weight": 3, "key_value.weight": 2}  # matrices in one tensor that have nothing to do with each other


class OptimizerState(TypedDict):
    """Steps done and running means of gradients and of their squares."""

    step: int
    first: list[Tensor]
    second: list[Tensor]


class Optimizer:
    """Updates parameters by lists of gradients.

    Args:
        names, parameters: of the model.
        kind: "muon", or "adamw" for AdamW throughout.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[Tensor], kind: str) -> None:
        self.names, self.parameters = list(names), list(parameters)
        self.step_count = 0
        self.by_muon = [kind == "muon" and _is_layer_matrix(n, p) for n, p in zip(names, parameters, strict=True)]
        self.first = [torch.zeros_like(p) for p in parameters]
        pairs = zip(parameters, self.by_muon, strict=True)
        self.second = [p.new_zeros(0) if muon else torch.zeros_like(p) for p, muon in pairs]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """One step with learning rate `rate`."""
        self.step_count += 1
        plain = [i for i, muon in enumerate(self.by_muon) if not muon]
        for i in plain:
            self._adamw(i, gradients[i], rate)
        alike: dict[torch.Size, list[int]] = defaultdict(list)
        directions: dict[int, Tensor] = {}
        for i, muon in enumerate(self.by_muon):
            if muon:
                self.first[i].lerp_(gradients[i], 1 - MOMENTUM)
                parts = next((n for name, n in _PARTS.items() if self.names[i].endswith(name)), 1)
                directions[i] = torch.lerp(gradients[i], self.first[i], MOMENTUM).unflatten(0, (parts, -1))
                alike[directions[i].shape[1:]].append(i)
        for shape, members in alike.items():
            together = orthogonal(torch.cat([directions[i] for i in members]))
            sizes = [len(directions[i]) for i in members]
            for i, update in zip(members, together.split(sizes), strict=True):
                self.parameters[i].mul_(1 - rate * DECAY)
                self.parameters[i].sub_(update.flatten(0, 1), alpha=rate * 0.2 * max(shape) ** 0.5)

    def _adamw(self, i: int, gradient: Tensor, rate: float) -> None:
        first, second, parameter = self.first[i], self.second[i], self.parameters[i]
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        unbiased = first / (1 - BETAS[0] ** self.step_count)
        scale = (second / (1 - BETAS[1] ** self.step_count)).sqrt_().add_(EPS)
        if parameter.dim() == 2:
            parameter.mul_(1 - rate * DECAY)
        parameter.addcdiv_(unbiased, scale, value=-rate)

    def state_dict(self) -> OptimizerState:
        """All that a resumed run needs."""
        return {"step": self.step_count, "first": self.first, "second": self.second}

    def load_state_dict(self, state: OptimizerState) -> None:
        """Continue from `state_dict()`."""
        self.step_count = state["step"]
        for kept, saved in ((self.first, state["first"]), (self.second, state["second"])):
            for a, b in zip(kept, saved, strict=True):
                a.copy_(b)


def orthogonal(matrices: Tensor) -> Tensor:
    """About UVᵀ for each of (n, rows, columns): singular values end between 0.7 and 1.2."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def _is_layer_matrix(name: str, parameter: Tensor) -> bool:
    return name.startswith("layers.") and parameter.dim() == 2

"""Muon for the matrices of the layers, AdamW for everything else.

Muon (Jordan et al. 2024): the momentum M of a matrix is replaced by its nearest semi-orthogonal matrix, UVᵀ of its
singular value decomposition, through five Newton-Schulz steps. Scaled by 0.2·√max(rows, columns) (Liu et al. 2025)
the update has AdamW's usual size, and one learning rate serves both. Not torch.optim.Muon: that takes the queries, keys
and values of one tensor for one matrix, and matrices one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infdit.device import default_dtype

BETAS = 0.9, 0.99
MOMENTUM, DECAY = 0.95, 0.01
_PARTS = {"qkv.weight": 3, "key_value.weight": 2}  # matrices in one tensor that have nothing to do with each other


class Optimizer:
    """Updates parameters by lists of gradients.

    Args:
        names, parameters: of the model.
        kind: "muon", or "adamw" for AdamW throughout.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[Tensor], kind: str) -> None:
        self.names, self.parameters = list(names), list(parameters)
        self.by_muon = [kind == "muon" and _is_layer_matrix(n, p) for n, p in zip(names, parameters, strict=True)]
        self.momentum = [torch.zeros_like(p) if m else None for p, m in zip(parameters, self.by_muon, strict=True)]
        others = [p for p, muon in zip(parameters, self.by_muon, strict=True) if not muon]
        matrices, vectors = ([p for p in others if (p.dim() == 2) == two] for two in (True, False))
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, betas=BETAS)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """One step with learning rate `rate`."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        alike: dict[torch.Size, list[int]] = defaultdict(list)
        directions: dict[int, Tensor] = {}
        for i, momentum in enumerate(self.momentum):
            if momentum is not None:
                momentum.lerp_(gradients[i], 1 - MOMENTUM)
                parts = next((n for name, n in _PARTS.items() if self.names[i].endswith(name)), 1)
                directions[i] = torch.lerp(gradients[i], momentum, MOMENTUM).unflatten(0, (parts, -1))
                alike[directions[i].shape[1:]].append(i)
        for shape, members in alike.items():
            together = orthogonal(torch.cat([directions[i] for i in members]))
            sizes = [len(directions[i]) for i in members]
            for i, update in zip(members, together.split(sizes), strict=True):
                self.parameters[i].mul_(1 - rate * DECAY)
                self.parameters[i].sub_(update.flatten(0, 1), alpha=rate * 0.2 * max(shape) ** 0.5)
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"momentum": self.momentum, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for kept, saved in zip(self.momentum, state["momentum"], strict=True):
            if kept is not None:
                kept.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])


def orthogonal(matrices: Tensor) -> Tensor:
    """About UVᵀ for each of (n, rows, columns): singular values end between 0.7 and 1.2."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(default_dtype(matrices.device))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def _is_layer_matrix(name: str, parameter: Tensor) -> bool:
    return name.startswith("layers.") and parameter.dim() == 2

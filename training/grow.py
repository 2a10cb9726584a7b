"""A wider model that computes the same, to train on from there (in the manner of Net2Net, Chen et al. 2016).

Every reader of the tokens begins with a layer norm, which takes their mean away: so what writes into the tokens may be
made to write no mean. Channels of zeros beside them then change a layer norm by one factor, √(width/old width), which
the scales behind it take back. New channels are read with random weights and written with none, new heads and hidden
units the other way round: both get gradients from the first steps on.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from infdit.model import InfDiT

from .start import from_nothing

PARTS = {"qkv": 3, "key_value": 2, "modulations": 4, "head_modulation": 2}  # tensors in one, along the first axis
WRITERS = ("patch_embed", "out", "mlp.2")
BLIND = ("noise_embed.2", "vector_embed.2", "key_value")  # their old outputs must not see the new inputs


def widen(model: InfDiT, width: int, seed: int) -> InfDiT:
    """`model` with tokens of `width` channels and more heads of the same width, in float32.

    Raises:
        ValueError: width is below the model's, or no multiple of a head's.
    """
    old = model.config
    if width < old.hidden_size or width % old.head_dim:
        raise ValueError(f"width {width} must be a multiple of {old.head_dim} and at least {old.hidden_size}")
    wide = from_nothing(replace(old, hidden_size=width, num_heads=width // old.head_dim), seed)
    wide.defaults = model.defaults
    kept = {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}
    _take_back(kept, (width / old.hidden_size) ** 0.5)
    with torch.no_grad():
        for name, tensor in wide.named_parameters():
            module = name.rpartition(".")[0]
            if module.endswith(WRITERS):
                kept[name] -= kept[name].mean(0)
                tensor.zero_()
            _copy(tensor, kept[name], _parts(name), blind=module.endswith(BLIND))
    return wide


def _parts(name: str) -> int:
    return next((parts for part, parts in PARTS.items() if part in name.split(".")), 1)


def _take_back(state: dict[str, Tensor], factor: float) -> None:
    """Divide all that follows a layer norm of tokens by `factor`."""
    for name, tensor in state.items():
        if name.endswith(("mlp_norm.weight", "cross.query.weight")):
            tensor /= factor
        elif "modulation" in name:
            scales = tensor.unflatten(0, (_parts(name), -1))[1::2]
            if name.startswith("modulations.0."):
                scales = scales[:1]  # behind its own weights, which have been divided
            if name.endswith("bias"):
                scales += 1
            scales /= factor
            if name.endswith("bias"):
                scales -= 1


def _copy(wide: Tensor, old: Tensor, parts: int, *, blind: bool) -> None:
    wide, old = (x.unflatten(0, (parts, -1)) for x in (wide, old))
    if blind and wide.dim() == 3:
        wide[:, : old.shape[1], old.shape[2] :] = 0
    wide[tuple(slice(0, n) for n in old.shape)] = old

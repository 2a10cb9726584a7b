"""Where training starts: from a file, or from nothing with the low-resolution picture already passing through.

c_in shrinks `up` to 1/σ, so at large σ the LR cross-attention is the only clear view of the input. Its two tables of
positions therefore start as Fourier features of the place of query and key in the window: their product peaks where
the places agree, and each patch looks at its own place of the low-resolution picture from the first step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from infdit.config import InfDiTConfig
from infdit.model import InfDiT, LRCrossAttention

AMPLITUDE, CYCLES = 4.0, (0.5, 3.0)  # of the Fourier features; cycles a block, lowest and highest
SLOTS = 0.1  # size of the embeddings of the four slots
CONTENT = 0.2  # weight of the normalised query and key beside their places


def from_nothing(config: InfDiTConfig, seed: int) -> InfDiT:
    """Fan-in-scaled normal weights, no biases, zero modulation: all layers start as plain transformer layers."""
    model = InfDiT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5, generator=generator)
                module.bias.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith("slot_embed"):
                parameter.normal_(0, SLOTS, generator=generator)
            elif name.endswith(("out.weight", "mlp.2.weight")) and "cross" not in name:
                parameter.mul_((2 * config.num_layers) ** -0.5)  # the sum over layers keeps the size of its first term
            elif "modulation" in name:
                parameter.zero_()
        for module in model.modules():
            if isinstance(module, LRCrossAttention):
                _look_at_own_place(module, config)
    return model


def _look_at_own_place(cross: LRCrossAttention, config: InfDiTConfig) -> None:
    side = config.block_side
    patches = (torch.arange(side) + 0.5) / side  # in blocks, of the query's block
    window = (torch.arange(config.window_side) + 0.5) / (config.window_side // 3) - 1
    cross.query_position.copy_(_features(patches, config.head_dim)[:, None])
    cross.key_position.copy_(_features(window, config.head_dim)[:, None])
    for norm in (cross.query_norm, cross.key_norm):
        norm.weight.fill_(CONTENT)


def _features(places: Tensor, width: int) -> Tensor:
    """cos and sin of rows and of columns, (n², width) for n places along each axis, in row-major order."""
    low, high = CYCLES
    count = width // 4
    cycles = low * (high / low) ** (torch.arange(count) / max(1, count - 1))
    angles = 2 * math.pi * places[:, None] * cycles  # (n, width/4)
    along = torch.cat((angles.cos(), angles.sin()), -1)
    n = len(places)
    rows, columns = along[:, None].expand(n, n, -1), along[None].expand(n, n, -1)
    return AMPLITUDE * torch.cat((rows, columns), -1).flatten(0, 1)

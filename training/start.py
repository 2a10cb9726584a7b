"""Where training starts from nothing: with heads that know what a neighbourhood is.

Attention learns slowly what a convolution has from the start (d'Ascoli et al. 2021, ConViT). Here a neighbourhood is
free, because queries and keys are turned by their places and their layer norm keeps a constant: with q's bias
A·(cos f·o, sin f·o) and k's A·(1, 0) for the highest frequencies f of an axis, a head's logits peak at the key that
lies o patches further along it. Each head of a layer gets an offset of its own; the last layers are left free.

What is missing from an enlarged picture follows from its finest parts, which are a hundredth of its brightness: both
embeddings start in the basis of the discrete cosine transform, with gains that bring all parts to one size.

The LR cross-attention has tables of positions instead. They start as Fourier features of the place that a head looks
at: the query's own low-resolution token, or one of those around it that are nearest to the patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from infdit.config import LR_PATCH, InfDiTConfig
from infdit.model import InfDiT, Layer, LRCrossAttention

AMPLITUDE, CYCLES = 4.0, (0.5, 3.0)  # of the Fourier features; cycles a block, lowest and highest
SLOTS = 0.1  # size of the embeddings of the four slots
CONTENT = 0.2  # weight of the normalised query and key beside their places
LOCATED = 6.0  # A, beside content of about 1
SHARPNESS = 1.7  # weight of the layer norm of queries and keys: makes the peak fall to an eighth at the next patch
RISE, LEVEL = 0.9, 0.5  # gain of cosine (u, v) of a patch: exp(RISE·(u + v)); of its mean: LEVEL
LR_RISE = 1.6  # the same of a low-resolution token of 2×2
FREE = 2  # last layers without places
_CROSS = ((0, 0), (-1, 0), (0, -1), (0, 1), (1, 0))  # (rows, columns) in patches
_DIAGONALS = ((-1, -1), (1, 1), (-1, 1), (1, -1))


def from_nothing(config: InfDiTConfig, seed: int) -> InfDiT:
    """Fan-in-scaled normal weights, no biases, zero modulation and head: F starts as 0, so D as c_skip·x."""
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
            elif "modulation" in name or name == "head.weight":
                parameter.zero_()
        _equalise(model.patch_embed, config.patch_size, RISE)
        _equalise(model.lr_embed, LR_PATCH, LR_RISE)
        for index, layer in enumerate(model.layers):
            if isinstance(layer, Layer) and index < max(1, config.num_layers - FREE) and config.head_dim >= 8:
                _look_around(layer, config, index)
        for module in model.modules():
            if isinstance(module, LRCrossAttention):
                _look_at_nearest(module, config)
    return model


def _equalise(embedding: nn.Linear, side: int, rise: float) -> None:
    """Turn random weights over the pixels of a patch into random weights over its cosines, times their gains."""
    n = torch.arange(side)
    cosines = torch.cos(math.pi * (n[None] + 0.5) * n[:, None] / side) * (2 / side) ** 0.5
    cosines[0] *= 0.5**0.5
    gains = torch.exp(rise * (n[:, None] + n))
    gains[0, 0] = LEVEL
    weights = embedding.weight.view(len(embedding.weight), -1, side, side)
    weights.copy_(torch.einsum("ocuv,uv,up,vq->ocpq", weights.clone(), gains, cosines, cosines))


def _look_around(layer: Layer, config: InfDiTConfig, index: int) -> None:
    """Give each head of a layer an offset: itself, up, left, right, down, then a diagonal that changes by the layer."""
    offsets = (*_CROSS, *(_DIAGONALS[(index + i) % 4] for i in range(4)))
    quarter = config.head_dim // 4
    frequencies = torch.exp(-math.log(10000) / quarter * torch.arange(2))
    bias = layer.qkv.bias.view(3, config.num_heads, config.head_dim)
    for head in range(config.num_heads):
        for axis, offset in enumerate(offsets[head % len(offsets)]):
            for pair, frequency in enumerate(frequencies.tolist()):
                sign = LOCATED * (-1) ** (pair + axis)  # the layer norm's mean stays near 0
                at = axis * config.head_dim // 2 + 2 * pair
                turn = frequency * offset
                bias[0, head, at : at + 2] = sign * torch.tensor([math.cos(turn), math.sin(turn)])
                bias[1, head, at : at + 2] = sign * torch.tensor([1.0, 0.0])
    layer.qk_norm.weight.fill_(SHARPNESS)


def _look_at_nearest(cross: LRCrossAttention, config: InfDiTConfig) -> None:
    side, tokens = config.block_side, config.window_side // 3  # patches and low-resolution tokens along a block
    window = (torch.arange(config.window_side) + 0.5) / tokens - 1
    cross.key_position.copy_(_features(window, window, config.head_dim)[:, None])
    patches = (torch.arange(side) + 0.5) * tokens / side  # in low-resolution tokens of the query's block
    own = patches.floor()
    near = torch.where(patches - own < 0.5, -1.0, 1.0)
    for head in range(config.num_heads):
        rows, columns = ((0, 0), (1, 0), (0, 1), (1, 1), (-1, 0), (0, -1), (-1, 1), (1, -1), (-1, -1))[head % 9]
        down, right = ((own + near * steps + 0.5) / tokens for steps in (rows, columns))
        cross.query_position[:, head] = _features(down, right, config.head_dim)
    for norm in (cross.query_norm, cross.key_norm):
        norm.weight.fill_(CONTENT)


def _features(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """cos and sin of rows and of columns, (n², width) for n places along each axis, in row-major order."""
    low, high = CYCLES
    count = width // 4
    cycles = low * (high / low) ** (torch.arange(count) / max(1, count - 1))

    def along(places: Tensor) -> Tensor:
        angles = 2 * math.pi * places[:, None] * cycles  # (n, width/4)
        return torch.cat((angles.cos(), angles.sin()), -1)

    n = len(rows)
    both = along(rows)[:, None].expand(n, n, -1), along(columns)[None].expand(n, n, -1)
    return AMPLITUDE * torch.cat(both, -1).flatten(0, 1)

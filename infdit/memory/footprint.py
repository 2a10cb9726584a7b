"""Bytes in closed form: of a model's weights, of a chunk of blocks at work, and of a run by what they are for.

Counted as they are when most is held, tensor by tensor, from the code of `model`, `uniba` and `attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..attention import fused, piece_bytes
from ..config import InfDiTConfig
from ..grid import BlockGrid

CPU = torch.device("cpu")
LEVELS = 20  # noise levels whose modulations are kept at a time: those of the published schedule
FLOAT32 = 4  # bytes: sampler state, pictures, rotary angles


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's parameters, by how they are moved.

    Attributes:
        resident: embeddings and head, always on the device; modulation: of one layer; layers: of each layer.
        largest: of the tensors that are streamed.
    """

    resident: int
    modulation: int
    layers: tuple[int, ...]
    largest: int

    @classmethod
    @cache
    def of(cls, config: InfDiTConfig, dtype: torch.dtype) -> Weights:
        """From the sizes alone."""
        D, d, e = config.hidden_size, config.head_dim, dtype.itemsize
        patch = config.patch_size**2

        def linear(inputs: int, outputs: int) -> int:
            return (inputs + 1) * outputs

        resident = linear(6 * patch, D) + linear(12, D) + linear(192, D) + linear(D, D) + linear(D, 2 * D)
        resident += linear(D, 3 * patch)
        if config.vector_dim:
            resident += linear(config.vector_dim, D) + linear(D, D)
        layer = linear(D, 3 * D) + linear(D, D) + linear(D, 4 * D) + linear(4 * D, D) + 2 * d + 4 * D
        cross = 2 * linear(D, D) + linear(D, 2 * D) + 4 * d + D * (config.block_tokens + config.window_tokens) + 2 * D
        layers = tuple(e * (layer + (cross if i == 0 else 0)) for i in range(config.num_layers))
        largest = max(4 * D * D, D * config.window_tokens)
        return cls(e * resident, e * linear(D, 4 * D), layers, e * largest)

    @property
    def streamable(self) -> int:
        """What is on the host when weights are streamed."""
        return self.modulation * len(self.layers) + sum(self.layers)

    @property
    def total(self) -> int:
        """All parameters."""
        return self.resident + self.streamable

    def streamed(self, group: int) -> int:
        """At most on the device while layers come in groups: a group and the next one, or two modulations."""
        sums = [sum(self.layers[i : i + group]) for i in range(0, len(self.layers), group)]
        pairs = [a + b for a, b in zip(sums, [*sums[1:], 0], strict=True)]
        return max(*pairs, min(2, len(self.layers)) * self.modulation)


@dataclass(frozen=True)
class Footprint:
    """What fills the device, the host and the disk when a run holds most, in bytes."""

    weights: int
    ring: int
    hidden: int
    images: int
    workspace: int
    host_weights: int
    host_hidden: int
    host_images: int
    disk: int = 0

    @property
    def device(self) -> int:
        """All of the device."""
        return sum(self.device_parts.values())

    @property
    def host(self) -> int:
        """All of the host."""
        return sum(self.host_parts.values())

    @property
    def device_parts(self) -> dict[str, int]:
        """What fills the device, by name for people."""
        return {
            "weights": self.weights,
            "keys and values": self.ring,
            "hidden states": self.hidden,
            "pictures": self.images,
            "workspace": self.workspace,
        }

    @property
    def host_parts(self) -> dict[str, int]:
        """What fills the host, by name for people."""
        return {"weights": self.host_weights, "hidden states": self.host_hidden, "pictures": self.host_images}


def workspace(
    config: InfDiTConfig, dtype: torch.dtype, grid: BlockGrid, chunk: int, device: torch.device = CPU
) -> int:
    """Bytes of a chunk of blocks while it is computed, of modulations and of their making."""
    D, e = config.hidden_size, dtype.itemsize
    vectors = (4 * config.num_layers + 8) * (LEVELS + 1) * D * e + 18 * D * max(FLOAT32, e)
    return chunk_workspace(config, dtype, grid, chunk, device) + vectors


def chunk_workspace(
    config: InfDiTConfig, dtype: torch.dtype, grid: BlockGrid, chunk: int, device: torch.device
) -> int:
    """The same of a chunk of blocks alone."""
    unit = config.block_tokens * config.hidden_size * dtype.itemsize
    # of one block's keys at a time, where they are turned into their reader's frame
    crosses = max(grid.rows, grid.columns) * config.block_side > config.position_period
    held = chunk * _workspace(config, dtype) + crosses * _turning(dtype.itemsize) * unit
    if fused(device, dtype, config.head_dim):
        return held
    shape, T = (chunk, config.num_heads, config.block_tokens), config.block_tokens
    return held + max(
        piece_bytes(shape, keys, config.head_dim, dtype.itemsize) for keys in (4 * T, config.window_tokens)
    )


def _turning(itemsize: int) -> int:
    """Units that turning takes at most beside what is turned: the result, and in float32 a copy and its product."""
    wide = FLOAT32 // itemsize
    return 1 + (2 * wide if wide > 1 else 0)


def _workspace(config: InfDiTConfig, dtype: torch.dtype) -> int:
    """Bytes of one block while it is computed, its hidden state included: the largest of the steps of a layer."""
    T, D, W, e = config.block_tokens, config.hidden_size, config.window_tokens, dtype.itemsize
    unit, window = T * D * e, W * D * e
    turns = T * config.head_dim * max(FLOAT32, e)
    # hidden state; the same modulated; q and k; the same normed; the same turned
    rotation = (1 + 1 + 2 + 2 + 2 * max(1, FLOAT32 // e)) * unit
    gathered = (2 + 4 + 4 + 1) * unit  # hidden state, q turned; the keys and the values of four blocks, the result
    cross = 3 * unit + 3 * window  # hidden state, q, result; the window's keys and values, its tokens or keys
    mlp = (2 + 4 + 4) * unit
    normalisers = (config.num_heads + 4) * T * FLOAT32  # of the softmax and of layer norms
    return max(rotation, gathered, cross, mlp) + turns + normalisers + pixel_bytes(config)


def pixel_bytes(config: InfDiTConfig) -> int:
    """Bytes of one block while it is read: x and up cut, joined and scaled, and its window of the lr picture."""
    return 18 * config.block_size**2 * FLOAT32 + 9 * (3 * config.lr_block_size) ** 2 * FLOAT32


def staged_bytes(config: InfDiTConfig, dtype: torch.dtype) -> int:
    """Bytes of one block in pinned memory: what is read of two chunks, and what is written of two, by powers of two."""
    read = 6 * config.block_size**2 + 3 * (3 * config.lr_block_size) ** 2
    return 2 * 2 * (read + 3 * config.block_size**2) * dtype.itemsize

"""Inf-DiT's network (Yang et al., ECCV 2024, section 3): the whole of it, for any number of blocks at once.

A picture is cut into blocks; tokens of a block attend to those of its own block and of its upper-left, left and
upper neighbour (Unidirectional Block Attention). Nothing here knows how many blocks there are, in which order they
come or where their neighbours' keys and values are kept: `uniba` hands that in as `keep_neighbours`.

B batch, N blocks, T tokens of a block, W low-resolution tokens that it sees, H heads, D width, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import attention
from .config import LR_PATCH, InfDiTConfig, SamplingDefaults
from .fuse import queries_and_keys

if TYPE_CHECKING:
    from .tensorfile import MappedFile

EPS = 1e-6
NOISE_CHANNELS = 192
# takes keys, maybe of a wider dtype, (B, N, T, H, d) of the blocks at hand, and what their values are made of: tokens
# (B, N, T, D), weight and bias; gives what then gives keys and values that each attends to, of four blocks,
# (B, N, 4, T, H, d), with what is added to the keys in each slot, (4, H, d)
KeepNeighbours = Callable[[Tensor, Tensor, Tensor, Tensor], Callable[[Tensor], tuple[Tensor, Tensor]]]
MakeWindow = Callable[[], Tensor]  # low-resolution tokens (B, N, W, D)


class InfDiT(nn.Module):
    """The network F: its parameters and the steps of its evaluation.

    Attributes:
        config: the sizes.
        defaults: how this model is sampled unless the user says otherwise.
        digest: the SHA-256 that its file states and was held to; "" where none does.
        file: that its parameters are read from while they are used, as long as they are nowhere else.
    """

    digest = ""
    file: MappedFile | None = None

    def __init__(self, config: InfDiTConfig, defaults: SamplingDefaults | None = None) -> None:
        super().__init__()
        self.config, self.defaults = config, defaults or SamplingDefaults()
        D, depth = config.hidden_size, config.num_layers
        self.patch_embed = nn.Linear(6 * config.patch_size**2, D)
        self.lr_embed = nn.Linear(3 * LR_PATCH**2, D)
        self.noise_embed = nn.Sequential(nn.Linear(NOISE_CHANNELS, D), nn.SiLU(), nn.Linear(D, D))
        self.vector_embed = (
            nn.Sequential(nn.Linear(config.vector_dim, D), nn.SiLU(), nn.Linear(D, D)) if config.vector_dim else None
        )
        self.modulations = nn.ModuleList(nn.Linear(D, 4 * D) for _ in range(depth))
        self.layers = nn.ModuleList(Layer(config, first=i == 0) for i in range(depth))
        self.head_modulation = nn.Linear(D, 2 * D)
        self.head = nn.Linear(D, 3 * config.patch_size**2)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are, of several devices the last."""
        return self.head.weight.device

    def forward(
        self, pixels: Tensor, windows: Tensor, inside: Tensor, turns: Tensor, keep_neighbours: KeepNeighbours,
        c_noise: Tensor, vector: Tensor | None = None,
    ) -> Tensor:
        """F for all blocks of a picture at once, (B, N, 3, h, w); `uniba.sweep` computes the same in pieces.

        The arguments are those of the steps below.
        """
        modulations, head_modulation = self.modulations_for(c_noise, vector, self.modulations)
        h, window = self.embed(pixels), partial(self.embed_lr, windows, inside)
        for layer, modulation in zip(self.layers, modulations, strict=True):
            h = layer(h, modulation, turns, keep_neighbours, window)
        return self.unembed(h, head_modulation)

    def modulations_for(
        self, c_noise: Tensor, vector: Tensor | None, linears: Iterable[Callable[[Tensor], Tensor]]
    ) -> tuple[list[Tensor], Tensor]:
        """Shifts and scales of all layers and of the head, from the noise level: once an evaluation.

        Args:
            c_noise: (B,), ¼·ln σ.
            vector: (B, vector_dim), the CLIP embedding of the picture; None stands for zeros.
            linears: `self.modulations`, or what computes them from weights that are elsewhere.

        Returns:
            For each layer (4, B, 1, 1, D): shift and 1 + scale of the attention, the same of the MLP; and
            (2, B, 1, 1, D) for the head.
        """
        half = NOISE_CHANNELS // 2
        channels = torch.arange(half, device=c_noise.device, dtype=c_noise.dtype)
        angles = c_noise[:, None] * torch.exp(-math.log(10000) / half * channels)  # (B, 96)
        c = self.noise_embed(torch.cat((angles.cos(), angles.sin()), -1).to(self.dtype))  # (B, D)
        if self.vector_embed is not None:
            given = c.new_zeros(len(c), self.config.vector_dim) if vector is None else vector
            c = c + self.vector_embed(given.to(c))
        c = F.silu(F.silu(c))  # published: SiLU after the embedding, and once more before every modulation
        layers = [_shifts_and_scales(linear(c), 4) for linear in linears]
        return layers, _shifts_and_scales(self.head_modulation(c.to(self.device)), 2)

    def embed(self, pixels: Tensor) -> Tensor:
        """Blocks of pixels (B, N, 6, h, w), noisy picture ⊕ upscaled picture, → tokens (B, N, T, D)."""
        p = self.config.patch_size
        return self.patch_embed(rearrange(pixels, "b n c (r p) (s q) -> b n (r s) (c p q)", p=p, q=p))

    def embed_lr(self, windows: Tensor, inside: Tensor) -> Tensor:
        """Low-resolution windows (B, N, 3, w, w) of 3×3 blocks → tokens (B, N, W, D).

        Args:
            windows: the pixels; those outside the picture may be anything.
            inside: (N, 3, 3), 1 where a block of the window lies in the picture, else 0: there the tokens are zeros,
                without the embedding's bias.
        """
        side = self.config.window_side // 3
        tokens = self.lr_embed(rearrange(windows, "b n c (r p) (s q) -> b n r s (c p q)", p=LR_PATCH, q=LR_PATCH))
        mask = inside.to(tokens.dtype).repeat_interleave(side, 1).repeat_interleave(side, 2)
        return tokens.mul_(mask[..., None]).flatten(2, 3)

    def unembed(self, h: Tensor, modulation: Tensor) -> Tensor:
        """Tokens (B, N, T, D) after the last layer → pixels (B, N, 3, h, w), the network's F."""
        shift, scale = modulation
        # published: normalised twice
        pixels = self.head(_modulated_norm(_norm(h), shift, scale))  # (B, N, T, 4·4·3)
        p, side = self.config.patch_size, self.config.block_side
        return rearrange(pixels, "b n (r s) (p q c) -> b n c (r p) (s q)", r=side, p=p, q=p)


class Layer(nn.Module):
    """Modulated block attention, in the first layer also cross-attention to the low-resolution picture, and an MLP."""

    def __init__(self, config: InfDiTConfig, first: bool) -> None:
        super().__init__()
        D, H, d = config.hidden_size, config.num_heads, config.head_dim
        self.heads = H
        self.qkv = nn.Linear(D, 3 * D)
        # published: the weights named q_layer_norm serve queries and keys; k_layer_norm is never used
        self.qk_norm = nn.LayerNorm(d, eps=EPS)
        self.slot_embed = nn.Parameter(torch.empty(4, H, d))
        self.out = nn.Linear(D, D)
        self.cross = LRCrossAttention(config) if first else None
        self.mlp_norm = nn.LayerNorm(D, eps=EPS, elementwise_affine=first)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D))

    def forward(
        self, h: Tensor, modulation: Tensor, turns: Tensor, keep_neighbours: KeepNeighbours,
        window: MakeWindow | None = None,
    ) -> Tensor:
        """One layer over N blocks.

        Args:
            h: (B, N, T, D) tokens; may be changed in place.
            modulation: (4, B, 1, 1, D), see `InfDiT.modulations_for`.
            turns: (N, T, d/2) rotary positions of the tokens, see `rotary_turns`.
            keep_neighbours: see `KeepNeighbours`.
            window: in the first layer.
        """
        attention_shift, attention_scale, mlp_shift, mlp_scale = modulation
        h = _add(h, self.attend(h, attention_shift, attention_scale, turns, keep_neighbours))
        if self.cross is not None:
            h = _add(h, self.cross(h, window))
            norm = self.mlp_norm  # (x·weight + bias)·scale + shift
            mlp_shift, mlp_scale = torch.addcmul(mlp_shift, norm.bias, mlp_scale), norm.weight * mlp_scale
        return _add(h, self.mlp(_modulated_norm(h, mlp_shift, mlp_scale)))

    def attend(
        self, h: Tensor, shift: Tensor, scale: Tensor, turns: Tensor, keep_neighbours: KeepNeighbours
    ) -> Tensor:
        """Block attention of tokens (B, N, T, D): what it adds to them, (B, N, T, D)."""
        x, parts = _modulated_norm(h, shift, scale), (2 * h.shape[-1], h.shape[-1])
        weight, bias = self.qkv.weight.split(parts), self.qkv.bias.split(parts)  # of queries and keys; of values
        qk = rearrange(F.linear(x, weight[0], bias[0]), "b n t (two h d) -> b n t (two h) d", two=2, h=self.heads)
        q, k = queries_and_keys(qk, self.qk_norm, turns)  # (B, N, T, H, d)
        find_neighbours = keep_neighbours(k, x, weight[1], bias[1])
        if not q.requires_grad:  # x has done its work: elsewhere queries would part the room for those of four blocks
            q = x.view(q.shape).copy_(q)
        del x, qk, k  # what is kept of them is elsewhere
        keys, values = find_neighbours(self.slot_embed)  # (B, N, 4, T, H, d)
        del find_neighbours
        found = _attention(q, keys.flatten(2, 3), values.flatten(2, 3))
        del q, keys, values
        return self.out(_merge_heads(found, h))


class LRCrossAttention(nn.Module):
    """Each block looks at the 3×3 blocks of the low-resolution picture around it; learned positions, no rotation."""

    def __init__(self, config: InfDiTConfig) -> None:
        super().__init__()
        D, H, d = config.hidden_size, config.num_heads, config.head_dim
        self.heads = H
        self.query = nn.Linear(D, D)
        self.key_value = nn.Linear(D, 2 * D)
        self.query_norm = nn.LayerNorm(d, eps=EPS)
        self.key_norm = nn.LayerNorm(d, eps=EPS)
        self.query_position = nn.Parameter(torch.empty(config.block_tokens, H, d))
        self.key_position = nn.Parameter(torch.empty(config.window_tokens, H, d))
        self.out = nn.Linear(D, D)

    def forward(self, h: Tensor, window: MakeWindow) -> Tensor:
        """What the low-resolution tokens of `window` add to tokens (B, N, T, D), of the same shape."""
        q = rearrange(self.query(_norm(h)), "b n t (h d) -> b n t h d", h=self.heads)
        q = self.query_norm(q).add_(self.query_position)
        k, v = rearrange(self.key_value(window()), "b n w (two h d) -> two b n w h d", two=2, h=self.heads)
        k = self.key_norm(k).add_(self.key_position)
        return self.out(_merge_heads(_attention(q, k, v), h))


def _shifts_and_scales(made: Tensor, parts: int) -> Tensor:
    """What a linear layer makes of the noise level, (B, parts·D): shift, 1 + scale, …, (parts, B, 1, 1, D)."""
    made = rearrange(made, "b (parts d) -> parts b 1 1 d", parts=parts)
    made[1::2] += 1
    return made


def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x)·scale + shift of x (B, N, T, D) by (B, 1, 1, D): of one picture, as a run has it, in one kernel."""
    if len(x) == 1:
        return F.layer_norm(x, x.shape[-1:], scale.flatten(), shift.flatten(), EPS)
    return torch.addcmul(shift, _norm(x), scale)


def _add(h: Tensor, more: Tensor) -> Tensor:
    """The sum, in the place of `h` unless it is to be differentiated: tokens stay where an allocator has put them."""
    return h + more if more.requires_grad else h.add_(more)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q (B, N, T, H, d) to k and v (B, N, K, H, d): (B·N, H, T, d)."""
    q, k, v = (rearrange(x, "b n t h d -> (b n) h t d") for x in (q, k, v))
    return attention(q, k, v)


def _merge_heads(x: Tensor, like: Tensor) -> Tensor:
    """(B·N, H, T, d) → (B, N, T, D), as `like`."""
    return rearrange(x, "(b n) h t d -> b n t (h d)", b=len(like))

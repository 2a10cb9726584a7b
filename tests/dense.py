"""Inf-DiT written down densely: the reference that the tests compare with.

    D(x; σ) = c_skip·x + c_out·F(c_in·[x, up]; ¼·ln σ, lr, clip)

The tokens of the whole picture lie in one tensor (B, Y, X, D) and every layer is done for the whole picture
before the next, block by block in Python loops: no cache, no chunks, no fused kernel. It shares nothing with
infdit/; `weights` is a state dict under the published names. Slow and plain on purpose.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
MIXIN = "mixins.adaln_layer."
SIGMA_DATA = 0.5
SLOTS = ((0, 0), (1, 1), (0, 1), (1, 0))  # (rows up, columns left): itself, upper-left, left, upper


class Frame(NamedTuple):
    """How tokens lie: `side` tokens to a block side, and how their positions are counted."""

    side: int
    period: int
    positions: str
    origin: tuple[int, int]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def affine_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return layer_norm(x) * w[name + ".weight"] + w[name + ".bias"]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None, None]) + shift[:, None, None]  # (B,Y,X,D) with (B,D)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(qkᵀ/√d)·v of q (B,T,H,d) and k, v (B,K,H,d), heads joined: (B,T,D)."""
    scores = torch.einsum("bthd,bkhd->bhtk", q, k) / math.sqrt(q.shape[-1])
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    shares = powers / powers.sum(-1, keepdim=True)
    return torch.einsum("bhtk,bkhd->bthd", shares, v).flatten(2)


def rotate(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Turn x (B,T,H,d): interleaved pairs of the first half by the row, of the second by the column."""
    d = x.shape[-1]
    turned = []
    for first, position in ((0, rows), (d // 2, columns)):
        for j in range(d // 4):
            angle = (position.to(x.dtype) * 10000 ** (-4 * j / d))[:, None]  # (T,1)
            a, b = x[..., first + 2 * j], x[..., first + 2 * j + 1]  # (B,T,H)
            turned += [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
    return torch.stack(turned, -1)


def token_positions(frame: Frame, r: int, c: int, up: int, left: int) -> tuple[Tensor, Tensor]:
    """Row and column (T,) of the tokens of the neighbour `up`, `left` of block (r, c), as (r, c) sees them.

    up = left = 0 is the block itself, and so its queries.
    """
    place, side = torch.arange(frame.side), frame.side
    if frame.positions == "wrapped":  # every token where it lies in the picture, modulo the period
        rows = (frame.origin[0] + max(r - up, 0) * side + place) % frame.period
        columns = (frame.origin[1] + max(c - left, 0) * side + place) % frame.period
    else:  # in the frame of block (r, c); a neighbour that was clamped lies no side before it
        rows = (frame.origin[0] + r * side) % frame.period - side * (up == 1 and r > 0) + place
        columns = (frame.origin[1] + c * side) % frame.period - side * (left == 1 and c > 0) + place
    return rows.repeat_interleave(side), columns.repeat(side)


def area(r: int, c: int, side: int) -> tuple[slice, slice, slice]:
    """Where block (r, c) lies in (B, Y, X, …)."""
    return slice(None), slice(r * side, (r + 1) * side), slice(c * side, (c + 1) * side)


def self_attention(w: Weights, i: int, a: Tensor, frame: Frame) -> Tensor:
    B, Y, X, D = a.shape
    side, table = frame.side, w[MIXIN + "re_pos_embed"][i]  # table (slot,H,d)
    H, d = table.shape[1:]
    qkv = linear(w, f"transformer.layers.{i}.attention.query_key_value", a)
    q, k, v = qkv.reshape(B, Y, X, 3, H, d).unbind(3)
    q = affine_norm(w, f"{MIXIN}q_layer_norm.{i}", q)
    k = affine_norm(w, f"{MIXIN}q_layer_norm.{i}", k)  # published: the norm of q serves both
    out = torch.zeros_like(a)
    for r in range(Y // side):
        for c in range(X // side):
            queries = rotate(q[area(r, c, side)].flatten(1, 2), *token_positions(frame, r, c, 0, 0))
            keys, values = [], []
            for slot, (up, left) in enumerate(SLOTS):
                there = area(max(r - up, 0), max(c - left, 0), side)
                key = rotate(k[there].flatten(1, 2), *token_positions(frame, r, c, up, left))
                keys.append(key + table[slot])
                values.append(v[there].flatten(1, 2))
            seen = attend(queries, torch.cat(keys, 1), torch.cat(values, 1))  # (B,T,D)
            out[area(r, c, side)] = seen.reshape(B, side, side, D)
    return linear(w, f"transformer.layers.{i}.attention.dense", out)


def cross_attention(w: Weights, h: Tensor, lr: Tensor, frame: Frame) -> Tensor:
    """Each block looks at the 3×3 blocks of low-resolution tokens around it; zeros outside the picture."""
    B, Y, X, D = h.shape
    side, s = frame.side, frame.side // 2  # an LR token is 2×2 LR pixels: 8×8 pixels of the picture
    H, d = w[MIXIN + "re_pos_embed"].shape[2:]
    tokens = F.conv2d(lr, w[MIXIN + "proj_lr.weight"], w[MIXIN + "proj_lr.bias"], stride=2)  # (B,D,y,x)
    padded = torch.zeros(B, Y // 2 + 2 * s, X // 2 + 2 * s, D, dtype=h.dtype)
    padded[:, s:-s, s:-s] = tokens.permute(0, 2, 3, 1)
    q = linear(w, MIXIN + "cross_attention.query", layer_norm(h)).reshape(B, Y, X, H, d)
    q = affine_norm(w, MIXIN + "cross_q_ln", q)
    out = torch.zeros_like(h)
    for r in range(Y // side):
        for c in range(X // side):
            queries = q[area(r, c, side)].flatten(1, 2) + w[MIXIN + "lr_query_position_embedding"]
            window = padded[:, r * s : (r + 3) * s, c * s : (c + 3) * s].flatten(1, 2)  # (B,9ss,D)
            k, v = linear(w, MIXIN + "cross_attention.key_value", window).reshape(B, -1, 2, H, d).unbind(2)
            keys = affine_norm(w, MIXIN + "cross_k_ln", k) + w[MIXIN + "lr_key_position_embedding"]
            out[area(r, c, side)] = attend(queries, keys, v).reshape(B, side, side, D)
    return linear(w, MIXIN + "cross_attention.dense", out)


def embed(w: Weights, c_noise: Tensor, clip: Tensor | None) -> Tensor:
    """Noise level (B,) and CLIP vector (B,vector_dim) to the embedding (B,D)."""
    n = w["time_embed.mlp.0.weight"].shape[1] // 2
    angles = c_noise[:, None] * 10000 ** (-torch.arange(n, dtype=c_noise.dtype) / n)
    waves = torch.cat([angles.cos(), angles.sin()], -1)
    embedding = linear(w, "time_embed.mlp.2", silu(linear(w, "time_embed.mlp.0", waves)))
    if "cond_embed.map_vector.0.weight" in w:
        if clip is None:
            clip = torch.zeros(len(c_noise), w["cond_embed.map_vector.0.weight"].shape[1])
        hidden = silu(linear(w, "cond_embed.map_vector.0", clip.to(c_noise.dtype)))
        embedding = embedding + linear(w, "cond_embed.map_vector.2", hidden)
    return silu(embedding)


def network(w: Weights, pixels: Tensor, embedding: Tensor, lr: Tensor, frame: Frame) -> Tensor:
    """F: six channels (B,6,h,w) and the embedding (B,D) to three channels (B,3,h,w)."""
    patch = w["mixins.patch_embed.proj.weight"].shape[-1]
    h = F.conv2d(pixels, w["mixins.patch_embed.proj.weight"], w["mixins.patch_embed.proj.bias"], stride=patch)
    h = h.permute(0, 2, 3, 1)  # (B,Y,X,D)
    for i in range(len(w[MIXIN + "re_pos_embed"])):
        modulation = linear(w, f"{MIXIN}adaLN_modulations.{i}.1", silu(embedding))  # published: SiLU again
        shift, scale, mlp_shift, mlp_scale = modulation.chunk(4, -1)
        h = h + self_attention(w, i, modulate(layer_norm(h), shift, scale), frame)
        normed = layer_norm(h)
        if i == 0:
            h = h + cross_attention(w, h, lr, frame)
            normed = affine_norm(w, MIXIN + "post_cross_attention_layernorm", h)
        inner = linear(w, f"transformer.layers.{i}.mlp.dense_h_to_4h", modulate(normed, mlp_shift, mlp_scale))
        h = h + linear(w, f"transformer.layers.{i}.mlp.dense_4h_to_h", gelu_tanh(inner))
    shift, scale = linear(w, "mixins.final_layer.adaLN_modulation.1", silu(embedding)).chunk(2, -1)
    h = modulate(layer_norm(layer_norm(h)), shift, scale)  # published: normed twice
    B, Y, X, _ = h.shape
    out = linear(w, "mixins.final_layer.linear", h).reshape(B, Y, X, patch, patch, 3)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(B, 3, Y * patch, X * patch)


def denoise(weights: Weights, x: Tensor, sigma: Tensor | float, lr: Tensor, up: Tensor,
            clip: Tensor | None = None, *, patch: int = 4, block: int = 32, period: int = 128,
            positions: str = "wrapped", origin: tuple[int, int] = (0, 0)) -> Tensor:  # fmt: skip
    """D(x; σ) in x's dtype.

    x, up (B,3,h,w) with h, w multiples of block; lr (B,3,h/4,w/4); sigma 0-d or (B,); clip (B,vector_dim), or
    None for zeros. origin is the (row, column) in patches of the first token, period counts patches too.
    """
    if positions not in ("wrapped", "continuous") or x.shape[2] % block or x.shape[3] % block:
        raise ValueError(f"positions {positions!r} or size {tuple(x.shape)} is not for blocks of {block} px")
    w = {name: tensor.to(x.dtype) for name, tensor in weights.items()}
    frame = Frame(block // patch, period, positions, origin)
    sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1).expand(len(x))
    s = sigma[:, None, None, None]
    c_skip = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2)
    c_out = s * SIGMA_DATA / torch.sqrt(s**2 + SIGMA_DATA**2)
    c_in = 1 / torch.sqrt(s**2 + SIGMA_DATA**2)
    pixels = c_in * torch.cat([x, up.to(x.dtype)], 1)  # published: c_in scales `up` too
    embedding = embed(w, torch.log(sigma) / 4, clip)
    return c_skip * x + c_out * network(w, pixels, embedding, lr.to(x.dtype), frame)


def heun(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
    """Heun's method down the levels `sigmas` (the last 0), whose last step is Euler's."""
    for now, then in pairwise(sigmas):
        slope = (x - denoise(x, now)) / now
        euler = x + (then - now) * slope
        if then == 0:
            return euler
        x = x + (then - now) * (slope + (euler - denoise(euler, then)) / then) / 2
    return x


def weight_shapes(layers: int, D: int, heads: int, block: int, vector_dim: int) -> dict[str, tuple[int, ...]]:
    """Shape of every weight that is read; `biased` are those whose bias stands beside them."""
    d = D // heads
    biased: dict[str, tuple[int, ...]] = {
        "mixins.patch_embed.proj": (D, 6, 4, 4), MIXIN + "proj_lr": (D, 3, 2, 2),
        "time_embed.mlp.0": (D, 192), "time_embed.mlp.2": (D, D),
        MIXIN + "cross_attention.query": (D, D), MIXIN + "cross_attention.key_value": (2 * D, D),
        MIXIN + "cross_attention.dense": (D, D), MIXIN + "post_cross_attention_layernorm": (D,),
        MIXIN + "cross_q_ln": (d,), MIXIN + "cross_k_ln": (d,),
        "mixins.final_layer.adaLN_modulation.1": (2 * D, D), "mixins.final_layer.linear": (48, D),
    }  # fmt: skip
    if vector_dim:
        biased |= {"cond_embed.map_vector.0": (D, vector_dim), "cond_embed.map_vector.2": (D, D)}
    for i in range(layers):
        biased |= {
            f"{MIXIN}adaLN_modulations.{i}.1": (4 * D, D), f"{MIXIN}q_layer_norm.{i}": (d,),
            f"transformer.layers.{i}.attention.query_key_value": (3 * D, D),
            f"transformer.layers.{i}.attention.dense": (D, D),
            f"transformer.layers.{i}.mlp.dense_h_to_4h": (4 * D, D),
            f"transformer.layers.{i}.mlp.dense_4h_to_h": (D, 4 * D),
        }  # fmt: skip
    return {
        MIXIN + "re_pos_embed": (layers, 4, heads, d),
        MIXIN + "lr_query_position_embedding": (1, (block // 4) ** 2, heads, d),
        MIXIN + "lr_key_position_embedding": (1, (3 * block // 8) ** 2, heads, d),
        **{name + ".weight": shape for name, shape in biased.items()},
        **{name + ".bias": shape[:1] for name, shape in biased.items()},
    }


def random_weights(seed: int, *, layers: int = 3, hidden: int = 16, heads: int = 2, block: int = 32,
                   vector_dim: int = 8, dtype: torch.dtype = torch.float64) -> Weights:  # fmt: skip
    """Weights under the published names (vector_dim 0: no CLIP input), each large enough to be seen in D.

    The same seed gives the same values in every dtype, up to its rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(layers, hidden, heads, block, vector_dim).items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith(("embed", "embedding")):  # position tables
            value = 0.5 * value
        elif name.endswith(".bias"):
            value = 0.3 * value
        elif len(shape) == 1:  # weights of layer norms
            value = 1 + 0.2 * value
        else:
            value = value / math.sqrt(math.prod(shape[1:]))
        weights[name] = value.to(dtype)
    return weights

"""Teachers: networks of other people that enlarge by four, and whose answers a small Inf-DiT learns.

A teacher that was trained on the mean absolute error alone answers with the certain part of a picture and none of the
original's noise; it also answers for pictures that have no larger original.

DATLight  Dual Aggregation Transformer, light (Chen et al. 2023), Apache-2.0: the sharpest picture that is certain.
RRDB      ESRGAN's generator (Wang et al. 2018). Real-ESRGAN x4plus (Wang et al. 2021), BSD-3-Clause: crisp, cleaned.

Shapes and the order of operations follow the papers and the published weights. All run in float32.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

MEAN = (0.4488, 0.4371, 0.4040)


def load(path: str | Path) -> nn.Module:
    """A teacher's file → (B, 3, h, w) in 0..1 ↦ (B, 3, 4h, 4w), not clamped."""
    w = {k: v.float() for k, v in load_file(path).items()}
    return (DATLight if "first.w" in w else RRDB)(w).eval()


def digest(path: str | Path) -> str:
    """What tells a teacher's answers from another's: the start of the SHA-256 of its file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


class Weights(nn.Module):
    """Layers by the names of their weights."""

    def __init__(self, w: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = list(w)
        for k, v in w.items():
            self.register_buffer(k.replace(".", "/"), v)

    def __getitem__(self, k: str) -> Tensor:
        return getattr(self, k.replace(".", "/"))

    def conv(self, x: Tensor, k: str, groups: int = 1) -> Tensor:
        w = self[k + ".w"]
        return F.conv2d(x, w, self[k + ".b"], padding=w.shape[-1] // 2, groups=groups)

    def linear(self, x: Tensor, k: str) -> Tensor:
        return F.linear(x, self[k + ".w"], self[k + ".b"])

    def norm(self, x: Tensor, k: str) -> Tensor:
        w = self[k + ".w"]
        return F.layer_norm(x, w.shape, w, self[k + ".b"])


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


class DATLight(Weights):
    """Blocks alternate: attention in 8×32 and 32×8 windows (every other one shifted by half), and between channels."""

    WINDOW, HEADS, DEPTH = (8, 32), 6, 18

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        mean = x.new_tensor(MEAN).view(1, 3, 1, 1)
        shallow = self.conv(x - mean, "first")
        masks: dict = {}
        y = self.norm(last(shallow), "norm0")
        into = y
        for i in range(self.DEPTH):
            k = f"{i}."
            z = self.norm(y, k + "norm1")
            y = y + (self.spatial(z, k, i % 4 == 2, masks) if i % 2 == 0 else self.channel(z, k))
            y = y + self.ffn(self.norm(y, k + "norm2"), k)
        y = into + last(self.three(first(y), "group"))
        y = self.three(first(self.norm(y, "norm")), "body") + shallow
        return F.pixel_shuffle(self.conv(y, "up"), 4) + mean

    def three(self, x: Tensor, k: str) -> Tensor:
        x = F.leaky_relu(self.conv(x, k + ".0"), 0.2)
        return self.conv(F.leaky_relu(self.conv(x, k + ".1"), 0.2), k + ".2")

    def ffn(self, x: Tensor, k: str) -> Tensor:
        a, b = F.gelu(self.linear(x, k + "fc1")).chunk(2, -1)
        b = last(self.conv(first(self.norm(b, k + "gate")), k + "gateconv", b.shape[-1]))
        return self.linear(a * b, k + "fc2")

    def mix(self, x: Tensor, k: str, kind: str) -> Tensor:
        """The two gates, before their sigmoid: "c" for each channel, "s" for each place."""
        if kind == "c":
            x = x.mean((2, 3), keepdim=True)
        return torch.sigmoid(self.conv(F.gelu(self.conv(x, k + kind + "1")), k + kind + "2"))

    def local(self, v: Tensor, k: str) -> Tensor:
        return F.gelu(self.conv(v, k + "dw", v.shape[1]))

    def spatial(self, x: Tensor, k: str, shifted: bool, masks: dict) -> Tensor:
        h, w = x.shape[1:3]
        qkv = self.linear(x, k + "qkv")
        c = x.shape[-1]
        near = self.local(first(qkv[..., 2 * c :]), k)
        side = max(self.WINDOW)
        qkv = F.pad(qkv, (0, 0, 0, -w % side, 0, -h % side)).unflatten(-1, (3, 2, self.HEADS // 2, c // self.HEADS))
        out = []
        for i, (wh, ww) in enumerate((self.WINDOW, self.WINDOW[::-1])):
            part = qkv[:, :, :, :, i]
            shift = (wh // 2, ww // 2) if shifted else (0, 0)
            if shifted:
                part = part.roll((-shift[0], -shift[1]), (1, 2))
            b, hh, wp = part.shape[:3]
            p = part.unflatten(2, (wp // ww, ww)).unflatten(1, (hh // wh, wh))  # b, ny, wh, nx, ww, 3, heads, d
            q, kk, v = p.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3)  # each b·ny·nx, heads, n, d
            bias = self.bias(k + f"pos{i}", wh, ww)[None]
            if shifted:
                key = (i, hh, wp)
                if key not in masks:
                    masks[key] = self.mask(hh, wp, wh, ww, shift, x)
                bias = (bias + masks[key][:, None]).repeat(b, 1, 1, 1)
            y = F.scaled_dot_product_attention(q, kk, v, bias.expand(len(q), -1, -1, -1))
            y = y.transpose(1, 2).flatten(2).view(b, hh // wh, wp // ww, wh, ww, -1)
            y = y.transpose(2, 3).reshape(b, hh, wp, -1)
            out.append((y.roll(shift, (1, 2)) if shifted else y)[:, :h, :w])
        far = first(torch.cat(out, -1))
        y = far * self.mix(near, k, "c") + near * self.mix(far, k, "s")
        return self.linear(last(y), k + "proj")

    def bias(self, k: str, wh: int, ww: int) -> Tensor:
        """(heads, n, n) of a table over offsets, (2wh − 1)·(2ww − 1) × heads."""
        y, x = torch.arange(wh), torch.arange(ww)
        dy, dx = y[:, None] - y + wh - 1, x[:, None] - x + ww - 1
        index = (dy[:, None, :, None] * (2 * ww - 1) + dx[None, :, None, :]).reshape(wh * ww, wh * ww)
        return self[k][index.to(self[k].device)].permute(2, 0, 1)

    def mask(self, h: int, w: int, wh: int, ww: int, shift: tuple[int, int], like: Tensor) -> Tensor:
        """(windows, n, n): 0 between places that were neighbours before the roll, −100 elsewhere."""
        def zone(n: int, win: int, s: int) -> Tensor:
            return (torch.arange(n) >= n - win).long() + (torch.arange(n) >= n - s).long()

        z = zone(h, wh, shift[0])[:, None] * 3 + zone(w, ww, shift[1])
        z = z.view(h // wh, wh, w // ww, ww).transpose(1, 2).reshape(-1, wh * ww)
        return (z[:, None] != z[:, :, None]).to(like) * -100

    def channel(self, x: Tensor, k: str) -> Tensor:
        h, w = x.shape[1:3]
        q, kk, v = self.linear(x, k + "qkv").flatten(1, 2).unflatten(-1, (3, self.HEADS, -1)).permute(2, 0, 3, 4, 1)
        near = self.local(v.flatten(1, 2).unflatten(-1, (h, w)), k)
        a = (F.normalize(q, dim=-1) @ F.normalize(kk, dim=-1).transpose(-1, -2)) * self[k + "heat"]
        far = (a.softmax(-1) @ v).flatten(1, 2).unflatten(-1, (h, w))
        y = far * self.mix(near, k, "s") + near * self.mix(far, k, "c")
        return self.linear(last(y), k + "proj")


class RRDB(Weights):
    """Residual in residual dense blocks of 64 channels growing by 32 (ESRGAN); nearest neighbour ×2 twice."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        names = (f"c{i}" for i in range(len(self.names) // 2))
        blocks = (len(self.names) // 2 - 6) // 15

        def conv(t: Tensor) -> Tensor:
            return self.conv(t, next(names))

        y = into = conv(x)
        for _ in range(blocks):
            block = y
            for _ in range(3):
                parts = [y]
                for _ in range(4):
                    parts.append(F.leaky_relu(conv(torch.cat(parts, 1)), 0.2))
                y = y + 0.2 * conv(torch.cat(parts, 1))
            y = block + 0.2 * y
        y = into + conv(y)
        for _ in range(2):
            y = F.leaky_relu(conv(F.interpolate(y, scale_factor=2, mode="nearest")), 0.2)
        return conv(F.leaky_relu(conv(y), 0.2))

"""ST-LPIPS (Ghildyal and Liu, ECCV 2022): how different two pictures look, by the features of a network.

    d = Σ_layers mean_positions Σ_channels w · (a/|a| − b/|b|)²

of features a, b that are subsampled through a small blur, so that a shift of a pixel costs little. 0 is no difference.
The weights come with the package stlpips-pytorch (BSD-2-Clause), of which nothing else is used: `pip install
stlpips-pytorch --no-deps`. The form of both networks is read off the shapes and numbers in its files.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Network = Literal["alex", "vgg"]
_PADDING = {11: 2, 5: 2, 3: 1}  # of a convolution by its side
_POOL = {"alex": 3, "vgg": 2}  # side of the maximum before a blur
EPS = 1e-10


def weights_file(network: Network) -> Path | None:
    """Where the package has its weights; None without the package."""
    spec = importlib.util.find_spec("stlpips_pytorch")
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders))) / "weights" / "vST0.0" / f"{network}_shift_tolerant.pth" if folders else None
    return path if path is not None and path.is_file() else None


@cache
def st_lpips(network: Network = "alex") -> STLPIPS | None:
    """The score, or None without the package."""
    path = weights_file(network)
    return None if path is None else STLPIPS(network, torch.load(path, map_location="cpu", weights_only=True))


class STLPIPS(nn.Module):
    """(B, 3, h, w) and (B, 3, h, w) in [-1, 1] → (B,) distances; gradients flow to both."""

    def __init__(self, network: Network, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.network = network
        self.slices: list[list[str]] = [[] for _ in range(5)]  # convolutions and blurs of each of five parts, in order
        for name, tensor in state.items():
            if match := re.fullmatch(r"net\.slice(\d)\.(\d+)\.(weight|filt)", name):
                self.slices[int(match[1]) - 1].append(name)
            self.register_buffer(name.replace(".", "/"), tensor)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """How different a and b look."""
        total = a.new_zeros(len(a))
        for i, (x, y) in enumerate(zip(self.features(a), self.features(b), strict=True)):
            difference = (_unit(x) - _unit(y)).square()
            total = total + F.conv2d(difference, self._of(f"lin{i}.model.1.weight")).mean((1, 2, 3))
        return total

    def features(self, x: Tensor) -> list[Tensor]:
        """Of the five parts."""
        x = (x - self._of("scaling_layer.shift")) / self._of("scaling_layer.scale")
        found: list[Tensor] = []
        for number, names in enumerate(self.slices):
            # alex begins with a convolution that is not strided, blurred at once, and only then cut at 0
            first = self.network == "alex" and number == 0
            for name in names:
                weight = self._of(name)
                if name.endswith("filt"):
                    x = x if first else F.max_pool2d(x, _POOL[self.network], 1)
                    x = F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), weight, stride=2, groups=len(weight))
                    x = F.relu(x) if first else x
                else:
                    bias, side = self._of(name.replace("weight", "bias")), weight.shape[-1]
                    x = F.conv2d(x, weight, bias, padding=_PADDING[side])
                    x = x if first else F.relu(x)
            found.append(x)
        return found

    def _of(self, name: str) -> Tensor:
        return self.get_buffer(name.replace(".", "/"))


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x / (x.square().sum(1, keepdim=True).add(EPS**2).sqrt() + EPS)

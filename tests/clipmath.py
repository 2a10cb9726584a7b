"""CLIP written out in float64, after its paper and open_clip's tensor names: what the tests of infdit.clip go by.

The picture's tower is small. The text's has all tokens and places, for the tokenizer is the real one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infdit.clip import CLIPEncoder, TextConfig, VisionConfig, load_clip

try:
    import open_clip.transformer  # noqa: F401

    PROBLEM = ""
except (ImportError, RuntimeError, AttributeError, OSError) as error:
    PROBLEM = f"open_clip cannot be imported: {error}"
needs_open_clip = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)

Weights = dict[str, torch.Tensor]

SMALL = VisionConfig(image_size=28, patch_size=14, width=32, layers=2, heads=4, output_dim=24)
SMALL_TEXT = TextConfig(width=32, layers=2, heads=4, output_dim=24)
START, END = 49406, 49407  # the last two of the 49408 tokens


def block_shapes(prefix: str, D: int, hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    linears = {"attn.out_proj": (D, D), "mlp.c_fc": (hidden, D), "mlp.c_proj": (D, hidden)}
    for i in range(layers):
        block = f"{prefix}transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * D, D), f"{block}.attn.in_proj_bias": (3 * D,)}
        for name, shape in linears.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{name}.weight": (D,), f"{block}.{name}.bias": (D,)}
    return shapes


def tower_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """open_clip's names and shapes of the picture's tower, written out."""
    D = config.width
    shapes = {
        "visual.class_embedding": (D,),
        "visual.positional_embedding": ((config.image_size // config.patch_size) ** 2 + 1, D),
        "visual.proj": (D, config.output_dim),
        "visual.conv1.weight": (D, 3, config.patch_size, config.patch_size),
    }
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{name}.weight": (D,), f"visual.{name}.bias": (D,)}
    return shapes | block_shapes("visual.", D, int(D * config.mlp_ratio), config.layers)


def text_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """The same of the text's tower."""
    D = config.width
    shapes = {
        "token_embedding.weight": (config.vocab_size, D),
        "positional_embedding": (config.context_length, D),
        "text_projection": (D, config.output_dim),
        "ln_final.weight": (D,),
        "ln_final.bias": (D,),
    }
    return shapes | block_shapes("", D, int(D * config.mlp_ratio), config.layers)


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Every tensor random (biases and norms too), large enough for the activations to leave the linear range."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1]) * 2
        for name, shape in shapes.items()
    }


def tower_weights(config: VisionConfig = SMALL) -> Weights:
    return random_weights(tower_shapes(config), seed=0)


def text_weights(config: TextConfig = SMALL_TEXT) -> Weights:
    return random_weights(text_shapes(config), seed=1)


def save(tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = tmp_path / "clip.safetensors"
    save_file(tensors, path, metadata)
    return path


def load_small(path: Path, dtype: torch.dtype = torch.float64) -> CLIPEncoder:
    return load_clip(path, dtype=dtype, device="cpu", config=SMALL, text_config=SMALL_TEXT)


def random_image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


# ---- the formulas


def keys_cubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resize_matrix(length: int, size: int) -> torch.Tensor:
    """(size, length): the kernel stretched by length/size when shrinking, cut at the edges, each row summing to 1."""
    scale = length / size
    stretch = max(scale, 1.0)
    rows = []
    for i in range(size):
        row = [keys_cubic((j + 0.5 - (i + 0.5) * scale) / stretch) for j in range(length)]
        rows.append([weight / sum(row) for weight in row])
    return torch.tensor(rows, dtype=torch.float64)


def preprocess_by_hand(image: torch.Tensor, side: int) -> torch.Tensor:
    h, w = image.shape[2:]
    height, width = side * h // min(h, w), side * w // min(h, w)
    resized = torch.einsum("yi,bcij,xj->bcyx", resize_matrix(h, height), (image + 1) / 2, resize_matrix(w, width))
    top, left = round((height - side) / 2), round((width - side) / 2)
    return standardised(resized[:, :, top : top + side, left : left + side])


def preprocess_whole_by_hand(image: torch.Tensor, side: int) -> torch.Tensor:
    """The long side fills the square, the rest of which is nothing."""
    h, w = image.shape[2:]
    height, width = (max(side * length // max(h, w), 1) for length in (h, w))
    resized = torch.einsum("yi,bcij,xj->bcyx", resize_matrix(h, height), (image + 1) / 2, resize_matrix(w, width))
    square = torch.zeros(len(image), 3, side, side, dtype=torch.float64)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, :, top : top + height, left : left + width] = standardised(resized)
    return square


def standardised(pixels: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def layer_norm(x: torch.Tensor, p: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred**2).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def attention(x: torch.Tensor, p: Weights, block: str, heads: int, causal: bool = False) -> torch.Tensor:
    B, T, D = x.shape
    projected = x @ p[f"{block}.attn.in_proj_weight"].T + p[f"{block}.attn.in_proj_bias"]
    q, k, v = (t.reshape(B, T, heads, -1).transpose(1, 2) for t in projected.split(D, dim=-1))  # (B, H, T, d)
    weights = torch.exp(q @ k.transpose(2, 3) / math.sqrt(D // heads))
    if causal:  # token i sees tokens 0…i
        weights = weights * torch.tensor([[float(j <= i) for j in range(T)] for i in range(T)], dtype=x.dtype)
    read = weights / weights.sum(dim=-1, keepdim=True) @ v
    joined = read.transpose(1, 2).reshape(B, T, D)
    return joined @ p[f"{block}.attn.out_proj.weight"].T + p[f"{block}.attn.out_proj.bias"]


def blocks_by_hand(
    x: torch.Tensor,
    p: Weights,
    prefix: str,
    config: VisionConfig | TextConfig,
    activation: Callable[[torch.Tensor], torch.Tensor] = exact_gelu,
    causal: bool = False,
) -> torch.Tensor:
    for i in range(config.layers):
        block = f"{prefix}transformer.resblocks.{i}"
        x = x + attention(layer_norm(x, p, f"{block}.ln_1"), p, block, config.heads, causal)
        hidden = layer_norm(x, p, f"{block}.ln_2") @ p[f"{block}.mlp.c_fc.weight"].T + p[f"{block}.mlp.c_fc.bias"]
        x = x + activation(hidden) @ p[f"{block}.mlp.c_proj.weight"].T + p[f"{block}.mlp.c_proj.bias"]
    return x


def unit(features: torch.Tensor) -> torch.Tensor:
    return features / torch.sqrt((features**2).sum(dim=-1, keepdim=True))


def tower_by_hand(
    pixels: torch.Tensor,
    p: Weights,
    activation: Callable[[torch.Tensor], torch.Tensor] = exact_gelu,
    config: VisionConfig = SMALL,
) -> torch.Tensor:
    B, side = len(pixels), config.image_size // config.patch_size
    patches = pixels.reshape(B, 3, side, config.patch_size, side, config.patch_size)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(B, side * side, -1)  # row by row; channel, row, column
    tokens = patches @ p["visual.conv1.weight"].reshape(config.width, -1).T
    x = torch.cat([p["visual.class_embedding"].expand(B, 1, -1), tokens], dim=1) + p["visual.positional_embedding"]
    x = blocks_by_hand(layer_norm(x, p, "visual.ln_pre"), p, "visual.", config, activation)
    return unit(layer_norm(x[:, 0], p, "visual.ln_post") @ p["visual.proj"])


def text_by_hand(
    tokens: list[int],
    p: Weights,
    activation: Callable[[torch.Tensor], torch.Tensor] = exact_gelu,
    config: TextConfig = SMALL_TEXT,
) -> torch.Tensor:
    """(1, output_dim) of one text, whose tokens are without start, end and padding."""
    row = [START, *tokens, END]
    ids = torch.tensor(row + [0] * (config.context_length - len(row)))
    x = (p["token_embedding.weight"][ids] + p["positional_embedding"])[None]
    x = blocks_by_hand(x, p, "", config, activation, causal=True)
    return unit(layer_norm(x[:, len(row) - 1], p, "ln_final") @ p["text_projection"])

"""CLIP's two towers, which put pictures and texts into one space.

picture   I = v/|v|, v = ViT-L/14 of the 224×224 pixels, read at the class token
text      C = v/|v|, v = causal transformer of [start, at most 75 tokens, end, 0 …], read at the first end

What CLIP sees of a picture is a square of its middle, or all of it on a square of nothing:

crop  short side → 224, centre 224×224: as published; of a panorama only the middle is seen
pad   long side → 224, centred, the rest 0 after (p − mean) ÷ std: all of it is seen, smaller

The padding is CLIP's mean colour because that is 0 once standardised, and CLIP's patch convolution has no bias: a
patch of padding adds nothing of its own to its token but the place where it is. Models that show CLIP whole pictures
(LLaVA's) pad with the same colour.

Both towers are open_clip's, built from the sizes below and not from open_clip's own configurations, because the
activation is part of the weights: `datacomp_xl_s13b_b90k` was trained with the exact GELU x·Φ(x), OpenAI's
ViT-L-14 with x·σ(1.702·x). Both have the same tensors, so a mix-up shows only as wrong vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditioning import resample

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

_log = logging.getLogger(__name__)

_IMAGES_AT_ONCE = 8  # bounds the memory of a long batch; the tower is no faster with more
_SHOWN = 60  # characters of an ignored text


MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)

View = Literal["crop", "pad"]
_SIDE_THAT_FITS: dict[str, Callable[[int, int], int]] = {"crop": min, "pad": max}
VIEWS: tuple[str, ...] = tuple(_SIDE_THAT_FITS)


class OpenCLIPMissingError(ImportError):
    """open_clip cannot be imported, so there is no CLIP vector."""


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a CLIP vision tower; the defaults are ViT-L/14."""

    image_size: int = 224  # pixels
    patch_size: int = 14  # pixels
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    output_dim: int = 768


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a CLIP text tower; the defaults are those beside ViT-L/14."""

    context_length: int = 77  # tokens, start and end among them
    vocab_size: int = 49408  # byte pairs; the last two are start and end
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    output_dim: int = 768


VIT_L_14 = VisionConfig()
VIT_L_14_TEXT = TextConfig()


class CLIPEncoder(nn.Module):
    """Pictures and texts to CLIP vectors, with exact GELU whatever the installed open_clip has as default.

    The picture's tower is held. The text's is made by `load_text` for one call of `text` and let go after it, for
    most runs have no text: see `load_clip`.

    Raises:
        OpenCLIPMissingError: open_clip cannot be imported.
    """

    def __init__(
        self, config: VisionConfig = VIT_L_14, load_text: Callable[[Tensor], CLIPTextEncoder] | None = None
    ) -> None:
        """load_text: gets a tensor of the picture's tower, whose device and precision the text's tower shall have."""
        super().__init__()
        self.config = config
        self.tower: nn.Module = open_clip().transformer.VisionTransformer(**asdict(config), act_layer=nn.GELU)
        self._load_text = load_text

    def forward(self, image: Tensor, view: View = "crop") -> Tensor:
        """(B, 3, h, w) in [-1, 1], any size → (B, 768) of length 1, float32 (float64 from a float64 tower).

        Raises:
            ValueError: see `preprocess`.
        """
        like = next(self.tower.parameters())
        features = [
            self.tower(preprocess(images, self.config.image_size, view).to(like))  # (≤ 8, 768), on the tower's device
            for images in image.split(_IMAGES_AT_ONCE)
        ]
        return _unit(torch.cat(features))

    def text(self, texts: Sequence[str]) -> Tensor:
        """n texts → (n, 768) of length 1, float32 (float64 from a float64 tower): see `CLIPTextEncoder`.

        Raises:
            CheckpointError: the file has no text tower, or a wrong or damaged one.
        """
        if self._load_text is None:
            raise ValueError("this encoder was not read from a file and has no text tower: use load_clip")
        return self._load_text(next(self.tower.parameters()))(texts)


def preprocess(image: Tensor, side: int = 224, view: View = "crop") -> Tensor:
    """One side to `side` by antialiased bicubic, centre crop or padding, CLIP's mean and standard deviation.

    "crop" equals torchvision's Resize(side, BICUBIC), CenterCrop(side), Normalize on tensors. Only what it keeps
    is computed: resized whole, a strip of 1×10000 pixels would fill gigabytes.

    Args:
        image: (B, 3, h, w) in [-1, 1], from 1×1 up.
        side: of the result, pixels.
        view: "crop" or "pad"; of a square picture they are the same.

    Returns:
        (B, 3, side, side), float32 (float64 from float64); padding is 0.

    Raises:
        ValueError: not a batch of RGB images in floating point, or another view.
    """
    if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape[2:] or not image.is_floating_point():
        raise ValueError(
            f"image is {image.dtype} {tuple(image.shape)}, must be floating point (B, 3, h, w): scale it to [-1, 1]"
        )
    if view not in VIEWS:
        raise ValueError(f"view is {view!r}, must be one of {', '.join(VIEWS)}")
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    fitted = _SIDE_THAT_FITS[view](*image.shape[2:])
    ratios, kept, padding = [], [], []
    for length in image.shape[2:]:
        size = max(int(side * length / fitted), 1)  # rounds down, as torchvision does
        first = round((size - min(size, side)) / 2)  # half to even, likewise
        kept.append(range(first, first + min(size, side)))
        before = (side - len(kept[-1])) // 2
        padding = [before, side - len(kept[-1]) - before, *padding]
        ratios.append(length / size)
    image = resample(image, (ratios[0], ratios[1]), kept[0], kept[1])
    mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return F.pad((image / 2 + 0.5 - mean) / std, padding)


class CLIPTextEncoder(nn.Module):
    """Texts to CLIP vectors: open_clip's tokenizer, whose vocabulary is part of that package, and text tower.

    Raises:
        OpenCLIPMissingError: open_clip cannot be imported.
    """

    def __init__(self, config: TextConfig = VIT_L_14_TEXT) -> None:
        super().__init__()
        self.config = config
        self.tower: nn.Module = open_clip().transformer.TextTransformer(**asdict(config), act_layer=nn.GELU)
        # a token sees itself and those before it; no tensor of the file, so here even where the tower is built on meta
        shape = config.context_length, config.context_length
        mask = torch.full(shape, float("-inf"), dtype=torch.float32, device="cpu").triu(1)
        self.tower.register_buffer("attn_mask", mask, persistent=False)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """n texts → (n, 768) of length 1, at least float32. Texts that are too long are cut, with a warning."""
        tokens = tokenize(texts, self.config.context_length)  # (n, 77)
        return _unit(self.tower(tokens.to(next(self.tower.parameters()).device)))


def tokenize(texts: Sequence[str], length: int = VIT_L_14_TEXT.context_length) -> Tensor:
    """n texts → (n, length) int64: start, byte pairs, end, then 0.

    Case and repeated spaces do not count. Of a text with more than length − 2 byte pairs the rest is left out, with a
    warning that says what.
    """
    tokenizer = _tokenizer()
    rows = torch.zeros(len(texts), length, dtype=torch.int64, device="cpu")
    for row, text in zip(rows, texts, strict=True):
        pairs: list[int] = tokenizer.encode(text)
        if len(pairs) > length - 2:
            rest = tokenizer.decode(pairs[length - 2 :]).strip()
            rest = rest if len(rest) <= _SHOWN else rest[:_SHOWN].rstrip() + "…"
            told = "CLIP reads %d tokens and this text has %d: what comes from %r on is ignored."
            _log.warning(told, length - 2, len(pairs), rest)
        ids = [tokenizer.sot_token_id, *pairs[: length - 2], tokenizer.eot_token_id]
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64, device="cpu")
    return rows


def open_clip() -> ModuleType:
    """The package, imported only now: it is slow, and broken beside a torchvision made for another torch.

    Raises:
        OpenCLIPMissingError: it cannot be imported.
    """
    try:
        import open_clip
        import open_clip.tokenizer
        import open_clip.transformer
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        # more than ImportError, for open_clip brings torchvision, and one built for another torch fails in many ways
        cause = " ".join(str(error).split())
        raise OpenCLIPMissingError(
            f"open_clip cannot be imported ({cause}), and CLIP conditioning needs it: pip install open_clip_torch, "
            "beside a torchvision made for the installed torch, or upscale without CLIP."
        ) from error
    return open_clip


@lru_cache(maxsize=1)
def _tokenizer() -> SimpleTokenizer:
    return open_clip().tokenizer.SimpleTokenizer()


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)

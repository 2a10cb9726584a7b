"""CLIP's two towers, which put pictures and texts into one space.

picture   I = v/|v|, v = ViT-L/14 of the 224×224 pixels, read at the class token
text      C = v/|v|, v = causal transformer of [start, at most 75 tokens, end, 0 …], read at the first end

Both are open_clip's, built from the sizes below and not from open_clip's own configurations, because the
activation is part of the weights: `datacomp_xl_s13b_b90k` was trained with the exact GELU x·Φ(x), OpenAI's
ViT-L-14 with x·σ(1.702·x). Both have the same tensors, so a mix-up shows only as wrong vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .view import View, preprocess

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

_log = logging.getLogger(__name__)

_IMAGES_AT_ONCE = 8  # bounds the memory of a long batch; the tower is no faster with more
_SHOWN = 60  # characters of an ignored text


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


class CLIPTextEncoder(nn.Module):
    """Texts to CLIP vectors: open_clip's tokenizer, whose vocabulary is part of that package, and text tower.

    Raises:
        OpenCLIPMissingError: open_clip cannot be imported.
    """

    def __init__(self, config: TextConfig = VIT_L_14_TEXT) -> None:
        super().__init__()
        self.config = config
        self.tower: nn.Module = open_clip().transformer.TextTransformer(**asdict(config), act_layer=nn.GELU)
        # no tensor of the file, so it is here even where the tower is built on meta to be filled from one
        n = config.context_length
        mask = torch.full((n, n), float("-inf"), device="cpu").triu(1)  # a token sees itself and those before it
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
    rows = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        pairs: list[int] = tokenizer.encode(text)
        kept, rest = pairs[: length - 2], pairs[length - 2 :]
        if rest:
            ignored = tokenizer.decode(rest).strip()
            ignored = ignored if len(ignored) <= _SHOWN else ignored[:_SHOWN].rstrip() + "…"
            _log.warning(
                "CLIP reads %d tokens and this text has %d: what comes from %r on is ignored.",
                length - 2,
                len(pairs),
                ignored,
            )
        ids = [tokenizer.sot_token_id, *kept, tokenizer.eot_token_id]
        row[: len(ids)] = torch.tensor(ids)
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

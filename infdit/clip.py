"""The picture's CLIP vector: what the network is told about the whole image while it works on blocks.

embedding = v / |v|,  v = ViT-L/14(((image + 1)/2, short side to 224, centre 224×224, − mean, ÷ std))

The tower is open_clip's, built from the sizes below and not from open_clip's own configurations, because the
activation is part of the weights: `datacomp_xl_s13b_b90k` was trained with the exact GELU x·Φ(x), OpenAI's
ViT-L-14 with x·σ(1.702·x). Both have the same tensors, so a mix-up shows only as wrong vectors.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .device import default_device, default_dtype
from .tensorfile import CheckpointError, TensorFile, read_tensors, tensor_digest

_log = logging.getLogger(__name__)

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)

WEIGHTS = "open_clip_pytorch_model.bin of laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K"

# SHA-256 of whole files. The first is the name (a Hugging Face cache names large files by SHA-256) under which
# LokiXun/diffusion_video_paper_list on GitHub, in its notes on Inf-DiT, found that file (its commit 84c9828e).
KNOWN = {"6509f07e6fc0da68f8e1ee881bf90803f0b053d2f7ed2013cc7c3a49ac4dd3db": WEIGHTS}
# The digest is part of the address from which open_clip and OpenAI's own code download it.
KNOWN_WRONG = {
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "OpenAI's ViT-L-14.pt, made for quick-GELU"
}
CHECKPOINT_PREFIX = "image_encoder."  # of the CLIP model inside a published checkpoint
CONVERTED = "Inf-DiT checkpoint"  # metadata "source" of a file split off the published checkpoint by `convert`

# module. is DeepSpeed's or DistributedDataParallel's; image_encoder.model. that of the published checkpoint
_VISUAL = re.compile(r"(?:module\.|image_encoder\.(?:model\.)?)*visual\.(.+)")


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


VIT_L_14 = VisionConfig()


class CLIPImageEncoder(nn.Module):
    """Images to CLIP vectors, with exact GELU whatever the installed open_clip has as default.

    Raises:
        OpenCLIPMissingError: open_clip cannot be imported.
    """

    def __init__(self, config: VisionConfig = VIT_L_14) -> None:
        super().__init__()
        self.config = config
        self.tower = _vision_transformer_class()(**asdict(config), act_layer=nn.GELU)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, h, w) in [-1, 1], any size → (B, 768) of length 1, float32 (float64 from a float64 tower)."""
        pixels = preprocess(image, self.config.image_size)  # (B, 3, 224, 224)
        features = self.tower(pixels.to(next(self.tower.parameters())))  # (B, 768), on the tower's device
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def preprocess(image: Tensor, side: int = VIT_L_14.image_size) -> Tensor:
    """Short side to `side` by antialiased bicubic, centre crop, CLIP's mean and standard deviation.

    Equals torchvision's Resize(side, BICUBIC), CenterCrop(side), Normalize on tensors. Only what the crop keeps
    is computed: resized whole, a strip of 1×10000 pixels would fill gigabytes.

    Args:
        image: (B, 3, h, w) in [-1, 1], from 1×1 up.
        side: of the result, pixels.

    Returns:
        (B, 3, side, side), float32 (float64 from float64).

    Raises:
        ValueError: not a batch of RGB images in floating point.
    """
    if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape[2:] or not image.is_floating_point():
        raise ValueError(
            f"image is {image.dtype} {tuple(image.shape)}, must be floating point (B, 3, h, w): scale it to [-1, 1]"
        )
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    matrices: list[Tensor] = []
    short = min(image.shape[2:])
    for axis in (2, 3):
        length = image.shape[axis]
        size = int(side * length / short)  # rounds down, and the half below to even, as torchvision does
        start, weights = _resize_weights(length, size, first=round((size - side) / 2), count=side)
        matrices.append(weights.to(image.dtype).to(image.device))  # in two steps: MPS has no float64
        image = image.narrow(axis, start, weights.shape[1])
    image = matrices[0] @ image @ matrices[1].T  # (B, 3, side, side)
    mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (image / 2 + 0.5 - mean) / std


def load_clip(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    config: VisionConfig = VIT_L_14,
) -> CLIPImageEncoder:
    """Read the vision tower out of an open_clip file, the published Inf-DiT checkpoint, or our own conversion.

    No code of the file is run, and its text tower is passed over. A file that is not known to be the right one
    gives a warning, since no shape tells the wrong one from it.

    Args:
        path: .safetensors, .bin or .pt with open_clip's tensor names.
        dtype: of the weights and the arithmetic; None: see `default_dtype`.
        device: where the weights go; None: see `default_device`. Memory grows by little more than their size there.
        config: sizes that the file must have.

    Raises:
        CheckpointError: unreadable, other names or shapes, numbers that are not finite, or known to be wrong.
        OpenCLIPMissingError: open_clip cannot be imported.
    """
    path = Path(path)
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype or default_dtype(device)
    _vision_transformer_class()  # now, for modules imported below would make their own tensors on meta too
    with torch.device("meta"):
        encoder = CLIPImageEncoder(config)
    digest = _file_digest(path)
    if digest in KNOWN_WRONG:
        raise CheckpointError(
            path, f"is {KNOWN_WRONG[digest]}, and Inf-DiT needs the model trained with plain GELU", f"give {WEIGHTS}"
        )
    file = read_tensors(path)
    visual = _visual_tensors(path, file.tensors)
    _check_shapes(path, visual, encoder.tower.state_dict())
    _check_origin(path, file, digest)
    encoder.tower.load_state_dict(_place(path, visual, dtype, device), strict=True, assign=True)
    return encoder.eval().requires_grad_(False)


def _vision_transformer_class() -> type[nn.Module]:
    try:
        from open_clip.transformer import VisionTransformer
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        # more than ImportError, for open_clip brings torchvision, and one built for another torch fails in many ways
        cause = " ".join(str(error).split())
        raise OpenCLIPMissingError(
            f"open_clip cannot be imported ({cause}), and CLIP conditioning needs it: pip install open_clip_torch, "
            "beside a torchvision made for the installed torch, or upscale without CLIP."
        ) from error
    return VisionTransformer


def _resize_weights(length: int, size: int, first: int, count: int) -> tuple[int, Tensor]:
    """Antialiased bicubic (a = −0.5) from `length` to `size` pixels: rows first…first+count−1 of its matrix.

    Row i weighs source pixel j by k((j + ½ − (i + ½)·s) / max(s, 1)), s = length/size, made to sum to 1.

    Returns:
        The first source pixel in reach, and (count, pixels in reach) in float64.
    """
    scale = length / size
    reach = 2 * max(scale, 1.0)  # of the kernel, in source pixels
    start = max(int((first + 0.5) * scale - reach), 0)
    stop = min(int((first + count - 0.5) * scale + reach) + 1, length)
    centre = (torch.arange(first, first + count, dtype=torch.float64) + 0.5) * scale  # (count)
    pixel = torch.arange(start, stop, dtype=torch.float64) + 0.5
    d = (pixel - centre[:, None]).abs() / max(scale, 1.0)  # (count, pixels)
    near = (1.5 * d - 2.5) * d**2 + 1
    far = ((2.5 - 0.5 * d) * d - 4) * d + 2
    weights = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    return start, weights / weights.sum(dim=1, keepdim=True)


def _visual_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower's tensors by their names inside the tower."""
    visual: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _VISUAL.fullmatch(name)
        if match and match[1] in visual:
            raise CheckpointError(path, f"holds visual.{match[1]} twice, under different prefixes", f"give {WEIGHTS}")
        if match:
            visual[match[1]] = tensor
    if not visual and any("vision_model." in name for name in tensors):
        raise CheckpointError(
            path, "has the tensor names of Hugging Face's transformers (vision_model.…)", f"give {WEIGHTS}"
        )
    if not visual:
        raise CheckpointError(path, "holds no CLIP vision tower (no visual.… tensors)", f"give {WEIGHTS}")
    return visual


def _check_shapes(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    problems = {
        "lacks": expected.keys() - found.keys(),
        "holds unknown": found.keys() - expected.keys(),
        "has another shape or no floating point in": {
            f"{name} ({found[name].dtype} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)})"
            for name in found.keys() & expected.keys()
            if found[name].shape != expected[name].shape or not found[name].is_floating_point()
        },
    }
    sentences = [f"{problem} {_enumerate(names)}" for problem, names in problems.items() if names]
    if sentences:
        raise CheckpointError(path, f"is no CLIP ViT-L-14 vision tower: it {', '.join(sentences)}", f"give {WEIGHTS}")


def _enumerate(names: Iterable[str], most: int = 3) -> str:
    ordered = [f"visual.{name}" for name in sorted(names)]
    more = len(ordered) - most
    return ", ".join(ordered[:most]) + (f" and {more} more" if more > 0 else "")


def _place(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """One by one, and without a copy where nothing changes: the peak is the weights and one tensor."""
    placed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        placed[name] = tensor.to(device, dtype)
        if not placed[name].isfinite().all():
            raise CheckpointError(path, f"visual.{name} is not finite in {dtype}", f"give {WEIGHTS}")
    return placed


def _check_origin(path: Path, file: TensorFile, digest: str) -> None:
    """Refuse a conversion whose tensors changed since; warn of a file that nobody vouches for."""
    if any(name.startswith(CHECKPOINT_PREFIX) for name in file.tensors):
        return  # it came with the model that was trained with it
    if file.metadata.get("source") == CONVERTED:
        if file.metadata.get("sha256") != tensor_digest(file.tensors):
            raise CheckpointError(path, "does not match the SHA-256 written in it", "convert the checkpoint again")
    elif digest not in KNOWN:
        _log.warning(
            "%s (SHA-256 %s) is not known to be the CLIP that Inf-DiT was trained with (%s): other ViT-L-14 files, "
            "such as OpenAI's for quick-GELU, have the same shapes, load just as well and give wrong vectors.",
            path,
            digest,
            WEIGHTS,
        )


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be opened ({error.strerror or error})", "check the path and its permissions"
        ) from error
    return digest.hexdigest()

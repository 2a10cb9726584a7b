"""CLIP's weights out of a file: which tensors, of which tower, and whether they are the right ones.

Two kinds of file hold them under open_clip's names: open_clip's own, and the published Inf-DiT checkpoint (or what
`convert` split off it), which puts `image_encoder.` before the names and has the picture's tower only. Nothing in
the shapes tells the CLIP that Inf-DiT was trained with from others, so whole files are known by their SHA-256.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ..device import default_device, default_dtype
from ..tensorfile import CheckpointError, TensorFile, check_file, read_tensors, some, tensor_digest, why
from .encoder import VIT_L_14, VIT_L_14_TEXT, CLIPEncoder, CLIPTextEncoder, TextConfig, VisionConfig, open_clip

_log = logging.getLogger(__name__)

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
_NAME = re.compile(r"((?:module\.|image_encoder\.(?:model\.)?)*)(.+)", re.DOTALL)
_TEXT = re.compile(r"(?:token_embedding|transformer|ln_final)\..+|positional_embedding|text_projection")


def load_clip(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    config: VisionConfig = VIT_L_14, text_config: TextConfig = VIT_L_14_TEXT,
) -> CLIPEncoder:
    """Read CLIP out of an open_clip file, the published Inf-DiT checkpoint, or what `convert` split off it.

    No code of the file is run. The picture's tower is placed now. The text's, where the file has one, stays mapped
    to the file until a text is given, and is placed for that one call in float32 at least: the difference of two
    similar vectors loses digits. On a CPU, tensors that have their dtype already stay mapped and take no memory. A
    file that is not known to be the right one gives a warning, since no shape tells the wrong one from it.

    Args:
        path: .safetensors, .bin or .pt with open_clip's tensor names.
        dtype: of the picture's tower and its arithmetic; None: see `default_dtype`, but float32 where a file of
            float32, as open_clip's is, goes to a CPU: exact, and it takes no memory.
        device: where the weights go; None: see `default_device`. Memory grows by little more than their size there.
        config, text_config: sizes that the file must have.

    Raises:
        CheckpointError: unreadable, other names or shapes, numbers that are not finite, or known to be wrong.
        OpenCLIPMissingError: open_clip cannot be imported.
    """
    path = Path(path)
    device = torch.device(device) if device is not None else default_device()
    open_clip()  # now, for modules imported below would make their own tensors on meta too
    digest = _file_digest(path)
    if digest in KNOWN_WRONG:
        raise CheckpointError(
            path, f"is {KNOWN_WRONG[digest]}, and Inf-DiT needs the model trained with plain GELU", f"give {WEIGHTS}"
        )
    file = read_tensors(path)
    visual, text = _towers(path, file.tensors)
    with torch.device("meta"):
        encoder = CLIPEncoder(config, partial(_load_text, path, text, text_config))
    expected = encoder.tower.state_dict()
    _check_shapes(path, "vision", visual, {f"visual.{name}": tensor for name, tensor in expected.items()})
    _check_origin(path, file, digest)
    if dtype is None and device.type == "cpu" and all(tensor.dtype == torch.float32 for tensor in visual.values()):
        dtype = torch.float32
    placed = _place(path, visual, dtype or default_dtype(device), device)
    state = {name.removeprefix("visual."): tensor for name, tensor in placed.items()}
    encoder.tower.load_state_dict(state, strict=True, assign=True)
    return encoder.eval().requires_grad_(False)


def _load_text(path: Path, tensors: Mapping[str, Tensor], config: TextConfig, like: Tensor) -> CLIPTextEncoder:
    """The text's tower on the device of `like`, which is of the picture's, and at least in float32."""
    if not any(name.startswith("transformer.") for name in tensors):
        raise CheckpointError(
            path,
            "holds only the half of CLIP that sees pictures, as published Inf-DiT checkpoints do, and cannot read text",
            f"give {WEIGHTS} as the CLIP file, or no text",
        )
    with torch.device("meta"):
        encoder = CLIPTextEncoder(config)
    _check_shapes(path, "text", tensors, encoder.tower.state_dict())
    placed = _place(path, tensors, torch.promote_types(like.dtype, torch.float32), like.device)
    encoder.tower.load_state_dict(placed, strict=True, assign=True)
    return encoder.to(like.device).eval().requires_grad_(False)  # the mask too, which is no weight


def _towers(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the vision and of the text tower by open_clip's names.

    The text's are those with the prefix of the vision's: in a checkpoint, transformer.… is Inf-DiT's own.
    """
    parts = {name: (match[1], match[2]) for name in tensors if (match := _NAME.fullmatch(name))}
    prefixes = {prefix for prefix, inner in parts.values() if inner.startswith("visual.")}
    visual: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    for name, (prefix, inner) in parts.items():
        found = visual if inner.startswith("visual.") else text
        if found is text and not (prefix in prefixes and _TEXT.fullmatch(inner)):
            continue
        if inner in found:
            raise CheckpointError(path, f"holds {inner} twice, under different prefixes", f"give {WEIGHTS}")
        found[inner] = tensors[name]
    if not visual and any("vision_model." in name for name in tensors):
        raise CheckpointError(
            path, "has the tensor names of Hugging Face's transformers (vision_model.…)", f"give {WEIGHTS}"
        )
    if not visual:
        raise CheckpointError(path, "holds no CLIP vision tower (no visual.… tensors)", f"give {WEIGHTS}")
    return visual, text


def _check_shapes(path: Path, tower: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    problems = {
        "lacks": expected.keys() - found.keys(),
        "holds unknown": found.keys() - expected.keys(),
        "has another shape or no floating point in": {
            f"{name} ({found[name].dtype} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)})"
            for name in found.keys() & expected.keys()
            if found[name].shape != expected[name].shape or not found[name].is_floating_point()
        },
    }
    sentences = [f"{problem} {some(sorted(names))}" for problem, names in problems.items() if names]
    if sentences:
        raise CheckpointError(path, f"is no CLIP ViT-L-14: its {tower} tower {', '.join(sentences)}", f"give {WEIGHTS}")


def _place(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """One by one, and without a copy where nothing changes: the peak is the weights and one tensor."""
    placed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        placed[name] = tensor.to(device, dtype)
        if not placed[name].isfinite().all():
            raise CheckpointError(path, f"{name} is not finite in {dtype}", f"give {WEIGHTS}")
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
    """SHA-256 of a file, computed once for a file as it is: reading it whole takes longer than loading it."""
    try:
        check_file(path)
        stat = path.stat()
        return _digest_of(path.resolve(), stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be opened ({why(error)})", "check the path and its permissions"
        ) from error


@cache
def _digest_of(path: Path, changed: int, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()

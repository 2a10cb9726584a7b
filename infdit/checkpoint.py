"""Checkpoints: a published or converted file → InfDiT, and a published file → .safetensors.

On disk the tensors have the published names and shapes, so one table (`names`) serves the DeepSpeed .pt, our
.safetensors and anybody else's copy. Every source key is mapped, dropped with a reason, or an error. All sizes are
read from shapes.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .clip.loader import CHECKPOINT_PREFIX, CONVERTED
from .config import InfDiTConfig, SamplingDefaults
from .device import default_device, default_dtype
from .draft import draft, put, sweep
from .grid import SLOTS
from .model import InfDiT
from .names import DROPPED, QKV_WEIGHT, SLOT_EMBED, from_published, is_published
from .samplers import SAMPLERS, karras_sigmas
from .sidecar import checked_levels, tuned_levels
from .tensorfile import CheckpointError, MappedFile, TensorFile, read_tensors, some, tensor_digest, why

BUNDLED = {"mini": Path(__file__).parent / "weights" / "mini.safetensors"}

_MAX_SIZE = 2**20  # of anything in a configuration: far beyond what exists, and safe to compute with
_MAX_STEPS, _MAX_LAYERS = 10_000, 1024
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_verified: set[MappedFile] = set()
_WRONG_FILE = "give the file that the authors published, or one that `convert` wrote from it"


@dataclass(frozen=True)
class Checkpoint:
    """A file whose every key is accounted for.

    Attributes:
        config, defaults: see `InfDiTConfig`, `SamplingDefaults`.
        tensors: what the model is made of, by published name.
        clip: the CLIP model, where the file holds one as `image_encoder.*`, by open_clip's names.
        dropped: other keys that are not needed, with the reason.
        metadata: the file's own.
    """

    path: Path
    config: InfDiTConfig
    defaults: SamplingDefaults
    tensors: dict[str, Tensor]
    clip: dict[str, Tensor]
    dropped: dict[str, str]
    metadata: dict[str, str]

    def verify(self) -> bool:
        """Check the SHA-256 of the tensor data against the file's own; False where the file states none.

        Raises:
            CheckpointError: they differ.
        """
        stated = self.metadata.get("sha256")
        if stated is not None and stated != tensor_digest(self.tensors):
            raise CheckpointError(
                self.path, "does not match the SHA-256 of its tensors in its metadata", "download or convert it again"
            )
        return stated is not None

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters of `InfDiT` by their names there, as views of `tensors`."""
        return from_published(self.tensors)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a published .pt, a .safetensors, or the bundled "mini"; tensors stay mapped to the file.

    Raises:
        CheckpointError: no readable file; keys that are unknown or missing, wrong shapes, weights that are not finite.
    """
    path = BUNDLED.get(str(path), Path(path))
    file = read_tensors(path)
    tensors: dict[str, Tensor] = {}
    clip: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    unknown: list[str] = []
    for name, tensor in file.tensors.items():
        reason = next((reason for pattern, reason in DROPPED if re.fullmatch(pattern, name)), None)
        if name.startswith(CHECKPOINT_PREFIX):
            clip_name = name.removeprefix(CHECKPOINT_PREFIX).removeprefix("model.")
            if clip_name in clip:
                raise CheckpointError(path, f"holds {clip_name} of the CLIP model twice", _WRONG_FILE)
            clip[clip_name] = tensor
        elif reason is not None:
            dropped[name] = reason
        elif is_published(name):
            tensors[name] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(path, f"holds keys that no Inf-DiT has: {some(unknown)}", _WRONG_FILE)
    tuned = tuned_levels(path, file.metadata.get("sha256"))
    defaults = _defaults(path, file, {"tuned": tuned} if tuned else {})
    checkpoint = Checkpoint(path, _config(path, file), defaults, tensors, clip, dropped, file.metadata)
    _check(checkpoint)
    return checkpoint


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> InfDiT:
    """A published .pt, a .safetensors, or the bundled model → the network, ready to evaluate.

    Args:
        path: the file, or a name of BUNDLED.
        dtype: what the network computes in; None: see `default_dtype`.
        device: where its parameters go; None: see `default_device`. Memory grows by little more than their size there.

    Raises:
        CheckpointError: see `read_checkpoint`; a SHA-256 that does not match, checked once for a file; weights that
            overflow `dtype`.
    """
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype or default_dtype(device)
    checkpoint = read_checkpoint(path)
    file = MappedFile.of(checkpoint.path.resolve())
    if file not in _verified:  # hashing takes longer than mapping: once for a file as it is, not at every load
        checkpoint.verify()
        _verified.add(file)
    with torch.device("meta"):
        model = InfDiT(checkpoint.config, checkpoint.defaults)
    state: dict[str, Tensor] = {}
    source = checkpoint.state_dict()
    for name, tensor in source.items():
        state[name] = tensor.to(device, dtype)
        narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
        if narrower and not torch.isfinite(state[name]).all():
            raise CheckpointError(checkpoint.path, f"{name} overflows {dtype}", "load it as bfloat16 or float32")
    model.load_state_dict(state, assign=True)
    model.digest = checkpoint.metadata.get("sha256", "")
    if any(tensor is state[name] for name, tensor in source.items()):
        model.file = file
    return model.requires_grad_(False).eval()


def convert(
    source: str | Path,
    target: str | Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    note: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a checkpoint as .safetensors: what the model needs, its configuration, defaults and a SHA-256.

    The CLIP model, where the source holds one, goes to TARGET's name with .clip.safetensors. Each file appears whole
    or not at all; an existing one is replaced. `progress` is told (done, total) while it goes on, and an exception
    that it raises ends it; `note` is written into the model's metadata.

    Returns:
        The files written.

    Raises:
        CheckpointError: see `read_checkpoint`; a target that cannot be written.
    """
    checkpoint, target = read_checkpoint(source), Path(target)
    if target.suffix != ".safetensors":
        raise CheckpointError(target, "is not a name of a .safetensors file", "let the target end in .safetensors")
    checkpoint.verify()
    written: list[Path] = []
    clip = clip_path(target)
    if checkpoint.path.absolute() == clip.absolute():
        raise CheckpointError(target, f"would take the place of its source {clip.name}", "choose another name")
    count = len(checkpoint.clip) + len(checkpoint.tensors)
    done = itertools.count(count + 1)  # they are read, hashed and written

    def tell() -> None:
        progress(next(done), 2 * count)

    if checkpoint.clip:
        _save(clip, checkpoint.clip, {"source": CONVERTED, "model": "ViT-L-14"}, tell)
        written.append(clip)
    metadata = checkpoint.metadata | {
        "config": json.dumps(asdict(checkpoint.config)),
        "defaults": json.dumps(checkpoint.defaults.stated()),
    }
    _save(target, checkpoint.tensors, metadata | dict(note or {}), tell)
    if not checkpoint.clip and checkpoint.path.absolute() != target.absolute():
        with suppress(OSError, CheckpointError):
            if clip.exists() and read_tensors(clip).metadata.get("source") == CONVERTED:
                clip.unlink()  # that of another model would be taken for this one's; what is not ours is not touched
    return [*written, target]


def clip_path(path: str | Path) -> Path:
    """Where `convert` puts the CLIP model that belongs to a converted model: X.safetensors → X.clip.safetensors."""
    return Path(path).with_suffix(".clip.safetensors")


# ---- what a file says


def _config(path: Path, file: TensorFile) -> InfDiTConfig:
    """All sizes from shapes; the period of positions from the dropped rotary tables, or from our metadata."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        tensor = file.tensors.get(name)
        if tensor is None or tensor.dim() != rank:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise CheckpointError(path, f"is no Inf-DiT checkpoint: {name} {found}", _WRONG_FILE)
        return tuple(tensor.shape)

    stated = _json(path, file, "config")
    num_layers, slots, num_heads, head_dim = shape(SLOT_EMBED, 4)
    layers = sum(re.fullmatch(QKV_WEIGHT, name) is not None for name in file.tensors)
    if (num_layers, slots) != (layers, len(SLOTS)) or layers > _MAX_LAYERS:
        problem = f"has a {SLOT_EMBED} for {slots} slots of {num_layers} layers, and {layers} layers"
        raise CheckpointError(path, problem, _WRONG_FILE)
    patch_size = shape("mixins.patch_embed.proj.weight", 4)[-1]
    block_tokens = shape("mixins.adaln_layer.lr_query_position_embedding", 4)[1]
    vector = "cond_embed.map_vector.0.weight"
    rope = "mixins.adaln_layer.rope.freqs_cos"
    period = shape(rope, 3)[0] if rope in file.tensors else stated.get("position_period", InfDiTConfig.position_period)
    if any(0 in tensor.shape for tensor in file.tensors.values()):
        raise CheckpointError(path, "holds tensors without elements", _WRONG_FILE)
    sizes = {
        "num_layers": num_layers,
        "hidden_size": num_heads * head_dim,
        "num_heads": num_heads,
        "patch_size": patch_size,
        "block_size": math.isqrt(block_tokens) * patch_size,
        "vector_dim": shape(vector, 2)[1] if vector in file.tensors else 0,
        "position_period": period,
    }
    wrong = [f"{name} {stated[name]!r} for {size}" for name, size in sizes.items() if stated.get(name, size) != size]
    try:
        if not all(type(size) is int and size < _MAX_SIZE for size in sizes.values()):
            raise ValueError(f"sizes must be whole numbers under {_MAX_SIZE}")
        if wrong:
            raise ValueError(f"the metadata contradicts the tensors: {some(wrong)}")
        return InfDiTConfig(**sizes)
    except (ValueError, TypeError) as error:
        raise CheckpointError(path, f"has sizes that make no Inf-DiT ({error})", _WRONG_FILE) from error


def _defaults(path: Path, file: TensorFile, beside: Mapping[str, Any]) -> SamplingDefaults:
    stated = {**_json(path, file, "defaults"), **beside}
    known = {field.name for field in fields(SamplingDefaults)}
    try:
        stated["tuned"] = tuple(map(checked_levels, stated.get("tuned", ())))
        stated["scales"] = tuple((scale, share) for scale, share in stated.get("scales", ()))
        defaults = SamplingDefaults(**{name: value for name, value in stated.items() if name in known})
        if defaults.sampler not in SAMPLERS:
            raise ValueError(f"sampler {defaults.sampler!r} is none of {', '.join(SAMPLERS)}")
        for steps in (defaults.steps, defaults.most_steps or defaults.steps):
            if type(steps) is not int or steps > _MAX_STEPS:
                raise ValueError(f"steps must be a whole number up to {_MAX_STEPS}")
        karras_sigmas(defaults.steps, defaults.sigma_min, defaults.sigma_max)
    except (ArithmeticError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(path, f"states defaults that cannot be used ({error})", "convert it again") from error
    return defaults


def _json(path: Path, file: TensorFile, key: str) -> dict[str, Any]:
    try:
        stated = json.loads(file.metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"has unreadable metadata in {key!r} ({error})", "convert it again") from error
    return stated if isinstance(stated, dict) else {}


def _check(checkpoint: Checkpoint) -> None:
    """Every parameter there, of the right shape, of floating point, finite."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in InfDiT(checkpoint.config).state_dict().items()}
    found = checkpoint.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is one layer too many" for name in found if name not in expected]
    for name, tensor in found.items():
        if tuple(tensor.shape) != expected.get(name, tuple(tensor.shape)):
            problems.append(f"{name} has shape {tuple(tensor.shape)} instead of {expected[name]}")
        elif tensor.dtype not in _DTYPES:
            problems.append(f"{name} holds {tensor.dtype}, not one of {', '.join(map(str, _DTYPES))}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} holds values that are not finite")
    if problems:
        raise CheckpointError(checkpoint.path, f"is no whole Inf-DiT checkpoint: {some(problems)}", _WRONG_FILE)


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], hashed: Callable[[], None]) -> None:
    """Write a file that appears whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = metadata | {"format": "pt", "sha256": tensor_digest(tensors, hashed)}
    try:
        sweep(path.parent)
        with draft(path) as part:
            save_file(tensors, str(part), metadata)
            put(part, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        remedy = "try another folder, free some space, or close the program that has it open"
        raise CheckpointError(path, f"cannot be written ({why(error)})", remedy) from error

"""convert and info: model files."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoint import clip_path, convert, read_checkpoint
from ..config import SamplingDefaults
from ..tensorfile import CheckpointError, printable

_CANNOT_VERIFY = "a .pt was checked by the checksums of its zip, which say nothing of where it comes from"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands."""
    p = commands.add_parser("convert", help="published .pt → .safetensors", description=convert.__doc__)
    p.set_defaults(command=_convert)
    p.add_argument("source", type=Path, metavar="SRC")
    p.add_argument("target", type=Path, metavar="DST")
    p.add_argument("--force", action="store_true", help="replace an existing file")

    p = commands.add_parser("info", help="what a checkpoint is")
    p.set_defaults(command=_info)
    p.add_argument("model", metavar="FILE", help="published .pt, .safetensors, or mini")
    p.add_argument("--verify", action="store_true", help="check the SHA-256 of the tensors")


def _convert(options: argparse.Namespace) -> int:
    existing = [path for path in (options.target, clip_path(options.target)) if path.exists()]
    if existing and not options.force:
        raise CheckpointError(existing[0], "exists already", "choose another name, or replace it with --force")
    for path in convert(options.source, options.target):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return 0


def _info(options: argparse.Namespace) -> int:
    checkpoint = read_checkpoint(options.model)
    config = checkpoint.config
    parameters = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.tensors.values()})
    lines = {
        "file": checkpoint.path,
        "parameters": f"{parameters:,} ({', '.join(dtypes)})",
        "layers": f"{config.num_layers} of width {config.hidden_size}, {config.num_heads} heads of {config.head_dim}",
        "block": f"{config.block_size} px, patches of {config.patch_size} px, positions repeat after "
        f"{config.position_period} patches",
        "CLIP input": f"{config.vector_dim} values" if config.vector_dim else "none",
        "CLIP model": f"{len(checkpoint.clip)} tensors in the same file" if checkpoint.clip else "not in this file",
        "defaults": _defaults(checkpoint.defaults),
        "provenance": printable(checkpoint.metadata.get("provenance", "not stated")),
        "not used": "; ".join(sorted(set(checkpoint.dropped.values()))) or "nothing",
    }
    for name, text in lines.items():
        print(f"{name:12}{text}")
    if options.verify:
        print(f"{'SHA-256':12}{'matches' if checkpoint.verify() else 'none in this file: ' + _CANNOT_VERIFY}")
    return 0


def _defaults(defaults: SamplingDefaults) -> str:
    """How a model is sampled, in words."""
    most = f" (at most {defaults.most_steps})" if defaults.most_steps else ""
    words = f"{defaults.steps} steps{most} of {defaults.sampler}, σ {defaults.sigma_max:g} to {defaults.sigma_min:g}"
    asked = f"asked for {' and '.join(f'×{scale}' for scale, _ in defaults.scales)}" if defaults.scales else ""
    return "; ".join(filter(None, (words, defaults.start, asked)))

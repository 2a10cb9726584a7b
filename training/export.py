"""A trained model as a file of the library: published names, bf16, with configuration, defaults and provenance.

How a model is best sampled is known only once it is trained:
`python -m training.export MODEL TARGET --steps 8 --sampler heun --sigma-max 1 --sigma-min 0.01` writes that in.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import infdit
from infdit.config import LR_PATCH, InfDiTConfig, SamplingDefaults
from infdit.draft import draft, sweep
from infdit.names import SLOT_EMBED, TO_PUBLISHED, translated

DEFAULTS = SamplingDefaults(steps=4, sampler="dpmpp_2m", sigma_max=1.0, sigma_min=0.01)
KINDS = {"steps": int, "sampler": str, "sigma_max": float, "sigma_min": float, "start_noise": float, "most_steps": int}


def to_published(state: Mapping[str, Tensor], config: InfDiTConfig) -> dict[str, Tensor]:
    """The parameters of `InfDiT` by published name and shape: the inverse of `names.from_published`.

    Raises:
        ValueError: a parameter that the table does not know.
    """
    depth = config.num_layers
    tensors = {SLOT_EMBED: torch.stack([state[f"layers.{i}.slot_embed"] for i in range(depth)])}
    for name, tensor in state.items():
        if name.endswith("slot_embed"):
            continue
        published = translated(name, TO_PUBLISHED)
        if published is None:
            raise ValueError(f"parameter {name} has no published name: add it to the table")
        if name.endswith("embed.weight"):
            side = config.patch_size if name.startswith("patch") else LR_PATCH
            tensor = tensor.unflatten(1, (-1, side, side))
        tensors[published] = tensor[None] if name.endswith("_position") else tensor
    return tensors


def export(
    path: Path, state: dict[str, Tensor], config: InfDiTConfig, provenance: str, defaults: SamplingDefaults = DEFAULTS
) -> None:
    """Write a .safetensors that `infdit.load_model` opens; it appears whole or not at all."""
    tensors = to_published({k: v.detach().cpu().bfloat16().contiguous() for k, v in state.items()}, config)
    _write(path, tensors, {"config": json.dumps(asdict(config)), "provenance": provenance}, defaults)


def restate(source: Path, target: Path, defaults: SamplingDefaults, provenance: str | None = None) -> None:
    """Write a model again with other defaults, for the scales that it knows, and another provenance if one is given."""
    checkpoint = infdit.checkpoint.read_checkpoint(source)
    told = {} if provenance is None else {"provenance": provenance}
    _write(target, checkpoint.tensors, checkpoint.metadata | told, replace(defaults, scales=checkpoint.defaults.scales))


def bridge_defaults(sigma_max: float, scales: Mapping[int, float]) -> SamplingDefaults:
    """How a bridge is sampled: one step from the enlarged picture; its goal is certain, so a second adds nothing."""
    taught = tuple(sorted(scales.items()))
    return SamplingDefaults(1, "euler", sigma_max, sigma_max / 10, start_noise=0.0, most_steps=1, scales=taught)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], defaults: SamplingDefaults) -> None:
    metadata = metadata | {"defaults": json.dumps(defaults.stated())}
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    with draft(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(part), metadata)
        infdit.convert(part, path)  # checks every tensor, adds a SHA-256, puts the file in place


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m training.export`."""
    parser = argparse.ArgumentParser(prog="python -m training.export", description="State how a model is sampled.")
    parser.add_argument("model", type=Path)
    parser.add_argument("target", type=Path)
    for name, default in DEFAULTS.stated().items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=KINDS[name], default=default, help=f"default {default}")
    parser.add_argument("--provenance", help="in place of the model's own")
    args = parser.parse_args(argv)
    defaults = SamplingDefaults(**{name: getattr(args, name) for name in DEFAULTS.stated()})
    restate(args.model, args.target, defaults, args.provenance)


if __name__ == "__main__":
    main()

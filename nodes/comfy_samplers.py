"""ComfyUI's own samplers and noise, as the library takes them.

A SAMPLER carries a k-diffusion function f(model, x, sigmas, extra_args, callback, disable, **options). For those named
here model(x, σ) may be D(x, σ). Others ask the model for more: text guidance to subtract, its schedule, noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..infdit.samplers import Callback, Denoise, SamplerInfo

# evaluations of a step; pictures held at most between two evaluations, and during one: counted, see SamplerInfo
WORKING = {
    "euler": (1, 6, 5),
    "heun": (2, 10, 9),
    "heunpp2": (3, 15, 13),
    "dpm_2": (2, 9, 8),
    "lms": (1, 10, 8),
    "dpmpp_2m": (1, 8, 5),
    "ipndm": (1, 10, 7),
    "deis": (1, 9, 6),
    "gradient_estimation": (1, 8, 6),
}
LMS_ORDER = 4  # steps that lms looks back unless its node says otherwise


class CoreNoise(Protocol):
    """What a NOISE link carries."""

    def generate_noise(self, input_latent: Mapping[str, object]) -> Tensor:
        """Noise of the shape of input_latent["samples"]."""
        ...


class CoreSampler(Protocol):
    """What a SAMPLER link carries; only ComfyUI's KSAMPLER has a function and options."""

    sampler_function: Callable[..., Tensor]
    extra_options: Mapping[str, Any]


def seed_of(noise: CoreNoise) -> int:
    """Its seed; noise of other packs may have none."""
    seed = getattr(noise, "seed", 0)
    return seed if isinstance(seed, int) else 0


def core_noise(noise: CoreNoise, shape: tuple[int, int, int, int]) -> Tensor:
    """Its noise of this shape; what it is given has only a shape and takes no memory."""
    return noise.generate_noise({"samples": torch.zeros((), dtype=torch.float32, device="cpu").expand(shape)})


def core_sampler(sampler: CoreSampler, seed: int, kept: int) -> tuple[SamplerInfo, str]:
    """A sampler for `infdit.upscale`, and its name. seed: of its noise; kept: pictures that the caller holds beside it.

    Raises:
        ValueError: one that needs more than D(x, σ).
    """
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_").removesuffix("_function")
    options = dict(getattr(sampler, "extra_options", {}))
    if function is None or name not in WORKING or options.get("cfg_pp"):
        raise ValueError(
            f"sampler {name} needs a diffusion model of ComfyUI's own kind and cannot work here: choose one of "
            f"{', '.join(WORKING)}"
        )

    def sample(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback) -> Tensor:
        return function(
            lambda x, sigma, **kwargs: denoise(x, sigma),
            x,
            sigmas.to(x.device),
            extra_args={"seed": seed},
            callback=callback,
            disable=True,
            **options,
        )

    evaluations, between, during = WORKING[name]
    more = kept + (max(0, int(options.get("order", LMS_ORDER)) - LMS_ORDER) if name == "lms" else 0)
    return SamplerInfo(sample, evaluations, between + more, during + more), name

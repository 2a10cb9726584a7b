"""ComfyUI's own samplers and noise, as the library takes them.

A SAMPLER carries a k-diffusion function f(model, x, sigmas, extra_args, callback, disable, **options). For those named
here model(x, σ) may be D(x, σ) and x = picture + σ·noise. Others ask for more: text guidance to subtract, steps of
their own choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import comfy.model_sampling
import torch
from torch import Tensor

from ..infdit.denoiser import SIGMA_DATA
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
    "ipndm_v": (1, 10, 7),
    "res_multistep": (1, 9, 5),
    "exp_heun_2_x0": (2, 9, 6),
}
ADDING_NOISE = {  # while they run
    "euler_ancestral": (1, 7, 5),
    "dpm_2_ancestral": (2, 8, 8),
    "dpmpp_2s_ancestral": (2, 8, 6),
    "dpmpp_sde": (2, 10, 8),
    "dpmpp_2m_sde": (1, 7, 4),
    "dpmpp_2m_sde_heun": (1, 7, 4),
    "dpmpp_3m_sde": (1, 13, 10),
    "ddpm": (1, 8, 4),
    "res_multistep_ancestral": (1, 9, 5),
    "exp_heun_2_x0_sde": (2, 10, 7),
    "er_sde": (1, 9, 6),
    "seeds_2": (2, 10, 8),
    "seeds_3": (3, 12, 9),
    "sa_solver": (1, 16, 13),
    "sa_solver_pece": (2, 16, 14),
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


class _Model:
    """What these samplers ask of a model: D(x, σ), and how noise lies over its pictures."""

    def __init__(self, denoise: Denoise, sigmas: Tensor) -> None:
        self._denoise = denoise
        self.model_sampling = Levels(max(float(sigmas[-1]), 1e-4), float(sigmas[0]))

    @property
    def inner_model(self) -> _Model:
        """ComfyUI wraps its models, once or twice."""
        return self

    model_patcher = inner_model

    def get_model_object(self, name: str) -> object:
        """Its part of this name."""
        return getattr(self, name)

    def __call__(self, x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        return self._denoise(x, sigma)


class Levels(comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EDM):
    """Noise levels of Karras et al. (2022): x = picture + share·σ·noise, at sigma_max too, where core would have more.

    share: see `SamplingDefaults.start_noise`.
    """

    share = 1.0

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        super().__init__()
        self.set_parameters(sigma_min, sigma_max, SIGMA_DATA)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        """Where sampling begins."""
        return super().noise_scaling(sigma, noise * self.share, latent_image)


class _Brownian:
    """Noise that a sampler adds between two levels: increments of one Brownian motion over σ, of variance 1.

    What is asked for twice from the same level, first not so far and then further, as dpmpp_sde does, goes the same way
    as far as the first.
    """

    def __init__(self, shape: torch.Size, device: torch.device, generator: torch.Generator, twice: bool) -> None:
        self._shape, self._device, self._generator, self._twice = shape, device, generator, twice
        self._from, self._length, self._way = math.nan, 0.0, None

    def __call__(self, start: Tensor, end: Tensor) -> Tensor:
        begin, length = float(start), abs(float(end) - float(start))
        noise = torch.randn(self._shape, generator=self._generator, dtype=torch.float32, device="cpu")
        noise = noise.to(self._device)
        if not self._twice:
            return noise
        if self._way is not None and math.isclose(begin, self._from) and length > self._length:
            noise = noise.mul_(math.sqrt(length - self._length)).add_(self._way)
        else:
            noise = noise.mul_(math.sqrt(length))
        self._from, self._length, self._way = begin, length, noise
        return noise / math.sqrt(length)


def named(sampler: object) -> tuple[str, str]:
    """Its name, and the one under which it is counted: where noise is drawn is not told apart."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_").removesuffix("_function")
    return name, name.removesuffix("_gpu")  # noise is always drawn on the CPU here


def counted_sampler(sampler: object, batch: int, conds: int, different: int) -> SamplerInfo:
    """What core itself samples with: all pictures at once, their latent kept beside. What is unknown counts as most.

    conds: of guidance, for each of which core holds four more pictures meanwhile; different: which are evaluated.
    """
    evaluations, between, during = (WORKING | ADDING_NOISE).get(named(sampler)[1], (1, 16, 14))
    held = (between + 1) * batch, (during + 1 + 4 * conds) * batch
    return SamplerInfo(lambda _, x, *__: x, evaluations * different, *held)  # core calls its own


def core_sampler(sampler: CoreSampler, seed: int, kept: int, start_noise: float = 1.0) -> tuple[SamplerInfo, str]:
    """A sampler for `infdit.upscale`, and its name.

    Args:
        sampler: from a SAMPLER link.
        seed: of the noise that is given; what the sampler adds is of the next one.
        kept: pictures that the caller holds beside it.
        start_noise: of the model, see `SamplingDefaults`.

    Raises:
        ValueError: one that needs more than D(x, σ), or that adds noise for a model that is to have none.
    """
    function = getattr(sampler, "sampler_function", None)
    name, known = named(sampler)
    options = dict(getattr(sampler, "extra_options", {}))
    adds = known in ADDING_NOISE
    if function is None or not (adds or known in WORKING) or options.get("cfg_pp"):
        raise ValueError(
            f"sampler {name} needs a diffusion model of ComfyUI's own kind and cannot work here: choose one of "
            f"{', '.join(WORKING)}"
        )
    if adds and start_noise == 0:
        raise ValueError(
            f"sampler {name} adds noise while it runs, and this model starts without any: choose one of "
            f"{', '.join(WORKING)}"
        )
    generator = torch.Generator("cpu").manual_seed((seed + 1) % 2**64)

    def sample(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback) -> Tensor:
        if len(sigmas) < 2:
            return x
        added = {}
        if adds:
            added = {"noise_sampler": _Brownian(x.shape, x.device, generator, known == "dpmpp_sde")}
        return function(
            _Model(denoise, sigmas[sigmas > 0]),
            x,
            sigmas.to(x.device),
            extra_args={"seed": seed},
            callback=callback,
            disable=True,
            **options,
            **added,
        )

    evaluations, between, during = (ADDING_NOISE if adds else WORKING)[known]
    more = kept + (max(0, int(options.get("order", LMS_ORDER)) - LMS_ORDER) if name == "lms" else 0)
    return SamplerInfo(sample, evaluations, between + more, during + more), name

"""Inf-DiT as ComfyUI's own MODEL: for KSampler, core's schedulers and guiders, and what hangs on a MODEL.

The latent is the picture itself, enlarged: pixels in [-1, 1], of whole blocks. Core lays σ·noise over it, which is
where Inf-DiT begins, and asks for D(x; σ). To ComfyUI this MODEL has no weights: those are of the model that it is made
of, and come for the time of a sampling, under the plan that any other run would have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.model_management as mm
import torch
from comfy.latent_formats import ChromaRadiance
from comfy.model_base import BaseModel, ModelType
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import CONST
from comfy.patcher_extension import WrappersMP
from comfy.sd import VAE
from comfy.supported_models_base import BASE
from torch import Tensor

from ..infdit import Conditioning, Report, SamplingDefaults
from ..infdit.conditioning import conditioning_pictures, visible_colour, without_colour
from ..infdit.device import same_device
from ..infdit.memory.plan import Workload
from ..infdit.model import InfDiT
from ..infdit.run import Run
from ..infdit.selfcheck import check_device
from ..infdit.upscale import begin_run, finish_pixels
from .comfy_memory import ManagedModel, plan_run, with_weights
from .comfy_page import Bar, to_image, told
from .comfy_samplers import Levels, counted_sampler

log = logging.getLogger(__name__)

UNFIT = "%s cannot change an Inf-DiT model: leave it out between Inf-DiT to Model and the sampler"


@dataclass(frozen=True, eq=False)
class Pictures:
    """What is enlarged.

    Attributes:
        given: (B, h, w, 3 or 4) in 0..1; size: (height, width) of the result.
        lr, up: (B, 3, H/4, W/4) and (B, 3, H, W), see `conditioning_pictures`; greys: of each, see `without_colour`.
    """

    given: Tensor
    size: tuple[int, int]
    lr: Tensor
    up: Tensor
    greys: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, given: Tensor, workload: Workload, defaults: SamplingDefaults) -> Pictures:
        """Pictures as `upscale` would prepare them."""
        colour, size = visible_colour(given.clamp(0, 1)) * 2 - 1, (workload.height, workload.width)
        padded = workload.grid.height, workload.grid.width
        stop: Callable[[int], None] = lambda rows: mm.throw_exception_if_processing_interrupted()  # noqa: E731
        lr, up = conditioning_pictures(colour, size, padded, stop)
        # a bridge invents nothing, colour neither
        greys = tuple(None if defaults.start_noise else without_colour(one) for one in colour.split(1))
        return cls(given, size, lr, up, greys)

    def check(self, latent: Tensor) -> None:
        """Whether a latent is one of these pictures', or of some repeats of all of them."""
        if latent.shape[1:] != self.up.shape[1:] or len(latent) % len(self.up):
            raise ValueError(
                f"latent of shape {tuple(latent.shape)} must be {tuple(self.up.shape)}: connect the one that Inf-DiT "
                "to Model gives; areas and latents that are cut, scaled or taken out of a batch do not fit the picture"
            )


class _Sampling:
    """D of a batch, one picture at a time, for as long as a sampler runs."""

    def __init__(
        self, run: Run, pictures: Pictures, sigmas: Tensor, defaults: SamplingDefaults, strength: float
    ) -> None:
        self._run, self._pictures = run, pictures
        self._levels = [level for level in sigmas.tolist() if level > 0]
        bridged = (defaults.start_noise, defaults.most_steps) == (0, 1)
        self._bridged = strength * defaults.sigma_max if bridged else None
        self._kept: dict[object, Tensor] = {}
        self._of: object = None

    def __call__(self, i: int, x: Tensor, sigma: float, vector: Tensor | None) -> Tensor:
        """D(x; σ) of picture i, (1, 3, H, W), with what CLIP says, (1, width).

        A bridge of one step knows where it starts and nothing between. Its answer holds all along the straight way
        from there, whatever x and σ are asked about: it is asked once.
        """
        which = i, None if vector is None else tuple(vector.flatten().tolist())
        if which in self._kept:
            return self._kept[which].to(x.device)
        if which != self._of:
            lr, up = (part[i : i + 1].to(self._run.images) for part in (self._pictures.lr, self._pictures.up))
            self._denoise = self._run.denoiser(Conditioning(lr, up, vector), self._levels)
            del lr, up  # which the run gives back where memory runs out
            self._of = which
        if self._bridged is None:
            return self._denoise(x, _level(sigma))
        self._kept[which] = self._denoise(self._pictures.up[i : i + 1], _level(self._bridged))
        return self._kept[which].to(x.device)


def _level(sigma: float) -> Tensor:
    return torch.tensor(sigma, dtype=torch.float32, device="cpu")


class _PixelConfig(BASE):
    """What BaseModel wants to be told: no network of its own, a latent of pixels, no memory beside what is planned."""

    latent_format = ChromaRadiance
    memory_usage_factor = 0

    def __init__(self) -> None:
        super().__init__({"disable_unet_model_creation": True})


class NativeModel(BaseModel):
    """D(x; σ) of these pictures, as core's samplers ask for it while `sample` is around them."""

    def __init__(self, managed: ManagedModel, pictures: Pictures, budget: int | None) -> None:
        super().__init__(_PixelConfig(), ModelType.EDM)
        self.model_sampling = Levels(managed.defaults.sigma_min, managed.defaults.sigma_max)
        self.model_sampling.share = managed.defaults.start_noise
        self.managed, self.pictures, self.budget = managed, pictures, budget
        self.sampling: _Sampling | None = None

    def get_dtype(self) -> torch.dtype:
        """Of the latent; the network has its own."""
        return torch.float32

    @told
    def sample(
        self, executor: Callable[..., Tensor], guider: Any, sigmas: Tensor, extra_args: dict, callback: object,  # noqa: ANN401
        noise: Tensor, latent: Tensor, mask: Tensor | None = None, *silent: bool,
    ) -> Tensor:  # fmt: skip
        """Wraps core's sampling: with the weights there, under a plan, all pictures where that has them."""
        pictures, managed = self.pictures, self.managed
        pictures.check(noise)
        _refuse_unfit(guider.conds, extra_args["model_options"].get("transformer_options", {}))
        if isinstance(guider.model_patcher.get_model_object("model_sampling"), CONST):
            raise ValueError(UNFIT % "a node that shifts sampling")
        if not same_device(guider.model_patcher.load_device, managed.device):
            log.warning("Inf-DiT computes on %s: choose devices in Load Inf-DiT Model", managed.device)
        if not latent.any():  # an empty one stands for the picture
            latent = pictures.up.repeat(len(noise) // len(pictures.up), 1, 1, 1)
        conds = [cond["cross_attn"] for kind in guider.conds.values() for cond in kind if "cross_attn" in cond]
        different = {tuple(vector.flatten().tolist()) for vector in conds} if managed.listens else ()
        method = counted_sampler(
            getattr(executor, "class_obj", None), len(noise), max(1, len(conds)), max(1, len(different))
        )
        shape = len(noise), *pictures.given.shape[1:]
        asked = managed.workload(shape, pictures.size, method, noise_given=True)
        workload, strength = replace(asked, scales=()), asked.passes[-1].strength
        check_device(workload)
        planned, report, bar = plan_run(workload, self.budget), Report(), Bar()

        def work(network: InfDiT) -> Tensor:
            run, _ = begin_run(network, planned, method, [sigmas], partial(bar.show, report), None, report, None)
            run.begin("sampling", pictures.size)
            run.advance(workload.grid.height * workload.batch)  # rows that were prepared before
            self.sampling = _Sampling(run, pictures, sigmas, managed.defaults, strength)
            moved = (None if part is None else part.to(run.images) for part in (noise, latent, mask))
            try:
                with run.at_work():
                    return executor(guider, sigmas.to(run.images), extra_args, callback, *moved, *silent)
            finally:
                self.sampling = None

        result = with_weights(managed, planned.plan, work)
        bar.fill()
        return result

    def _apply_model(
        self, x: Tensor, t: Tensor, c_concat: None = None, c_crossattn: Tensor | None = None, *_: object, **__: object
    ) -> Tensor:
        """D(x; σ) of a batch, which may hold it twice, for two conditionings: what is the same is computed once."""
        self.pictures.check(x)
        width, listens = max(1, self.managed.network.config.vector_dim), self.managed.listens
        assert self.sampling is not None, "called outside of a sampling"
        if c_crossattn is None or c_crossattn.shape[1:] != (1, width):
            raise ValueError(
                "this conditioning is none of Inf-DiT's: connect positive and negative of Inf-DiT to Model; a prompt "
                "goes in by Inf-DiT CLIP Encode"
            )
        results: list[Tensor] = []
        vectors, count = c_crossattn[:, 0].float().cpu(), len(self.pictures.up)
        for i in range(len(x)):
            twins = (j for j in range(i % count, i, count) if x[j].equal(x[i]) and vectors[j].equal(vectors[i]))
            twin = next(twins, None)
            vector = vectors[i : i + 1] if listens else None
            if twin is None:
                results.append(self.sampling(i % count, x[i : i + 1].float(), float(t[i]), vector))
            else:
                results.append(results[twin])
        return torch.cat(results)


def _refuse_unfit(conds: Mapping[str, list[dict]], options: Mapping[str, Any]) -> None:
    """Raises a ValueError for what would be ignored."""
    found = {key for kind in conds.values() for cond in kind for key in cond}
    found |= {"patches" for key in ("patches", "patches_replace") if options.get(key)}
    wrapped = options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
    found |= {"wrapped" for wrappers in wrapped.values() if wrappers}
    for key, words in (
        ("control", "ControlNet"), ("gligen", "GLIGEN"), ("patches", "a patch of attention or blocks"),
        ("wrapped", "EasyCache, or what else works inside a network (LazyCache works around it)"),
    ):  # fmt: skip
        if key in found:
            raise ValueError(UNFIT % words)


class NativePatcher(ModelPatcher):
    """A patcher that says what cannot be patched."""

    @told
    def add_patches(self, *_: object, **__: object) -> list:
        """Refuses LoRA and whatever else changes weights: none of it was made for these."""
        raise ValueError(UNFIT % "LoRA")


def native_patcher(managed: ManagedModel, pictures: Pictures, budget: int | None) -> ModelPatcher:
    """What a MODEL link carries. budget: bytes on the device, None is automatic."""
    native = NativeModel(managed, pictures, budget)
    patcher = NativePatcher(native, managed.device, managed.patcher.offload_device)
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "inf-dit", native.sample)
    return patcher


class PixelVAE(VAE):
    """Latent to picture: of the size asked for, with the transparency of the picture given."""

    def __init__(self, pictures: Pictures) -> None:
        super().__init__(sd={"pixel_space_vae": torch.ones((), dtype=torch.float32, device="cpu")})
        self.pictures = pictures

    @told
    def decode(self, samples: Tensor, *_: object, **__: object) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → IMAGE (B, height, width, 3 or 4)."""
        pictures = self.pictures
        pictures.check(samples)
        shape = len(samples), *pictures.size, pictures.given.shape[-1]
        result = torch.empty(shape, dtype=torch.float32, device="cpu")
        for i, one in enumerate(samples.split(1)):
            at = i % len(pictures.given)
            given, grey = pictures.given[at : at + 1], pictures.greys[at]
            finish_pixels(one, given, grey, result[i : i + 1], mm.throw_exception_if_processing_interrupted)
        return to_image(result)

    decode_tiled = decode

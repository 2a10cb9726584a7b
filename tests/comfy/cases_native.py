"""Inf-DiT to Model under ComfyUI's own samplers, beside Inf-DiT Upscale (Advanced). See drive.py."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import comfy.controlnet
import comfy.model_management as mm
import torch
from cases_advanced import advanced
from cases_upscale import told_on_nodes
from harness import (
    BASE,
    BUNDLED,
    COMFYUI,
    NOISY,
    ODD,
    PACK_DIR,
    TAKEN,
    case,
    facts,
    give,
    load_prompt,
    loader,
    nodes,
    pack,
    patched,
    run,
    take,
)
from safetensors.torch import save_file

PUBLISHED = PACK_DIR / "tests" / "data" / "tiny.mp_rank_00_model_states.pt"  # the published layout, with a CLIP input
EASY = {"seed": 7, "steps": 6, "cfg": 1.0, "sampler_name": "heun", "scheduler": "karras", "denoise": 1.0}
DEFAULTS = {"seed": 7, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def to_model(picture: str, loading: dict | None = None, **changes: Any) -> dict:
    """Loader, picture and Inf-DiT to Model."""
    links = {"model": ["loader", 0], "image": ["give", 0]}
    asked = {"size": "scale by", "size.scale": 4.0, "memory_budget": 0.0} | changes
    native = {"class_type": "InfDiTToModel", "inputs": links | asked}
    return {"loader": loader(**(loading or {})), "give": give(picture), "native": native}


def decoded(source: str) -> dict:
    return {
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": [source, 0], "vae": ["native", 4]}},
        "take": take("IMAGE", "decode", 0),
    }


def ksampler(picture: str = "small", loading: dict | None = None, asked: dict | None = None, **changes: Any) -> dict:
    """KSampler with all that Inf-DiT to Model gives."""
    links = {name: ["native", i] for i, name in enumerate(("model", "positive", "negative", "latent_image"))}
    sampling = {"class_type": "KSampler", "inputs": links | (asked or EASY)}
    return to_model(picture, loading, **changes) | {"sampler": sampling} | decoded("sampler")


def custom(picture: str, loading: dict, sigmas: dict, sampler: str, noise: str, cfg: float = 1.0) -> dict:
    """SamplerCustomAdvanced in KSampler's place, and Upscale (Advanced) with the same noise, sampler and sigmas."""
    beside = advanced(picture, loading, sampler_name=sampler)
    for key in ("take denoised", "take report"):
        del beside[key]
    beside["noise"] = {"class_type": noise, "inputs": {"noise_seed": 7} if noise == "RandomNoise" else {}}
    beside["sigmas"], beside["take"]["inputs"]["key"] = sigmas, "advanced"
    links = {"model": ["native", 0], "positive": ["native", 1], "negative": ["native", 2]}
    parts = {name: [name, 0] for name in ("noise", "guider", "sampler", "sigmas")} | {"latent_image": ["native", 3]}
    return (
        {name: node for name, node in beside.items() if name != "take"}
        | {"take advanced": beside["take"]}
        | to_model(picture, loading)
        | {"guider": {"class_type": "CFGGuider", "inputs": links | {"cfg": cfg}}}
        | {"custom": {"class_type": "SamplerCustomAdvanced", "inputs": parts}}
        | decoded("custom")
    )


def basic(**asked: Any) -> dict:
    return {"class_type": "BasicScheduler", "inputs": {"model": ["native", 0], "denoise": 1.0} | asked}


def own(**asked: Any) -> dict:
    levels = {"steps": 0, "sigma_max": 0.0, "sigma_min": 0.0, "rho": 7.0, "denoise": 1.0, "model": ["loader", 0]}
    return {"class_type": "InfDiTScheduler", "inputs": levels | asked}


def counted(prompt: dict) -> tuple[dict, int]:
    """A run, and how many evaluations it took."""
    denoiser, count = pack("infdit.denoiser").Denoiser, itertools.count()
    call = denoiser.__call__

    def counting(self: object, *arguments: object) -> torch.Tensor:
        next(count)
        return call(self, *arguments)

    with patched(denoiser, __call__=counting):
        return run(prompt), next(count)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item() if a.shape == b.shape else float("inf")


@case
def native_equals() -> dict:
    """KSampler and SamplerCustomAdvanced beside Upscale (Advanced) with the same noise and sigmas: how far apart."""
    found = {}
    for picture, cfg in (("small", 8.0), ("batch", 1.0), ("alpha", 1.0)):
        karras = basic(scheduler="karras", steps=6)
        second = run(custom(picture, {"model_name": NOISY}, karras, "heun", "RandomNoise", cfg))
        reference, image = TAKEN.get("advanced"), TAKEN.get("value")
        first = run(ksampler(picture, {"model_name": NOISY}))
        found[picture] = {
            "ends": [second["end"], first["end"]],
            "message": second["message"] + first["message"],
            "custom": apart(image, reference),
            "ksampler": apart(TAKEN["value"], reference),
            "shape": list(reference.shape),
            "bar": first["bar"][-1][1:3],
        }
    return found


def in_two(loading: dict) -> dict:
    """Half of the steps by one KSampler (Advanced), the rest by another."""
    asked = ksampler("small", loading)
    said = asked["sampler"]["inputs"]
    noise = {"noise_seed": said.pop("seed"), "add_noise": "enable", "return_with_leftover_noise": "enable"}
    for name, latent, first, last in (("half", ["native", 3], 0, 3), ("sampler", ["half", 0], 3, 10)):
        steps = {"start_at_step": first, "end_at_step": last, "latent_image": latent}
        asked[name] = {"class_type": "KSamplerAdvanced", "inputs": said | noise | steps}
    return asked


@case
def native_bundled() -> dict:
    """The bundled model, which starts without noise and takes one step."""
    bundled, found = {"model_name": BUNDLED}, {}
    for name, sigmas in (("whole", own()), ("two fifths", own(denoise=0.4))):
        ended = run(custom("small", bundled, sigmas, "euler", "DisableNoise"))
        found[name] = {"message": ended["message"], "apart": apart(TAKEN["value"], TAKEN["advanced"])}
        reference = TAKEN["advanced"] if name == "whole" else reference  # noqa: F821 - the first has set it
    ended, evaluations = counted(ksampler("small", bundled, DEFAULTS))
    found["defaults"] = {"message": ended["message"], "apart": apart(TAKEN["value"], reference)}
    found["evaluations"] = evaluations
    ended = run(in_two(bundled))
    found["in two"] = {"message": ended["message"], "apart": apart(TAKEN["value"], reference)}
    return found


@case
def native_defaults() -> dict:
    """How far apart pictures are once another pack has left a default dtype behind."""
    found, model = {}, {"model_name": BUNDLED}
    run(custom("small", model, own(), "euler", "DisableNoise"))
    expected = TAKEN["value"]
    for i, dtype in enumerate((torch.bfloat16, torch.float64)):
        asked = custom("small", model, own(), "euler", "DisableNoise")
        asked["native"]["inputs"]["memory_budget"] = 4.0 + i  # so that nothing is taken from ComfyUI's cache
        torch.set_default_dtype(dtype)
        try:
            ended = run(asked)
        finally:
            torch.set_default_dtype(torch.float32)
        found[str(dtype)] = {"message": ended["message"], "apart": apart(TAKEN["value"], expected)}
    return found


@case
def native_samplers() -> dict:
    """Samplers that need more than a denoiser work here; cfg costs nothing where nothing differs."""
    found = {}
    for name in ("uni_pc", "lcm", "dpm_adaptive", "euler_cfg_pp", "euler_ancestral", "dpmpp_2m_sde"):
        ended = run(ksampler(asked=EASY | {"sampler_name": name}))
        found[name] = {"message": ended["message"], **(facts(TAKEN["value"]) if "value" in TAKEN else {})}
    _, found["evaluations"] = counted(ksampler(asked=EASY | {"cfg": 8.0, "sampler_name": "euler"}))
    image, empty = TAKEN["value"], ksampler(asked=EASY | {"sampler_name": "euler"})
    ODD["empty"] = {"samples": torch.zeros(1, 3, 64, 64)}
    empty["odd"] = {"class_type": "GiveAny", "inputs": {"name": "empty"}}
    empty["sampler"]["inputs"]["latent_image"] = ["odd", 0]
    run(empty)
    return found | {"empty": apart(TAKEN["value"], image)}


@case
def native_prompt() -> dict:
    """A model that listens to CLIP, told something, nothing, and both with guidance from one to the other."""
    (_folder("infdit") / "told.pt").write_bytes(PUBLISHED.read_bytes())
    loading, links = {"model_name": "told.pt"}, {"conditioning": ["odd", 0]}
    vector = torch.nn.functional.normalize(torch.randn(1, 768, generator=torch.Generator().manual_seed(3)))
    run(load_prompt(**loading))
    width = TAKEN["value"].network.config.vector_dim
    ODD["vector"] = pack("nodes.clip").GuidedVector(vector[:, :width], "a test")
    odd = {"odd": {"class_type": "GiveAny", "inputs": {"name": "vector"}}}
    asked = custom("small", loading, basic(scheduler="karras", steps=3), "heun", "RandomNoise") | odd
    for node in ("native", "upscale"):
        asked[node]["inputs"] |= links
    ended = run(asked)
    found = {"message": ended["message"], "apart": apart(TAKEN["value"], TAKEN["advanced"])}
    told = TAKEN["value"]
    both = ksampler("small", loading, EASY | {"steps": 3}, **links) | odd
    _, found["evaluations of one"] = counted(both)
    both["untold"] = to_model("small", loading)["native"]
    both["sampler"]["inputs"] |= {"negative": ["untold", 2], "cfg": 3.0}
    ended, found["evaluations of two"] = counted(both)
    found |= {"guided": apart(TAKEN["value"], told), "finite": bool(TAKEN["value"].isfinite().all())}
    return found


@case
def native_runs() -> dict:
    """Memory that runs out within an evaluation, a stop, and what core counts of the model."""
    run(ksampler())
    whole, denoiser, left = TAKEN["value"], pack("infdit.denoiser").Denoiser, [2]
    call = denoiser.__call__

    def full(self: object, *arguments: object) -> torch.Tensor:
        left[0] -= 1
        if not left[0]:
            raise torch.OutOfMemoryError("no room")
        return call(self, *arguments)

    with patched(denoiser, __call__=full):
        full_end = run(ksampler(asked=EASY | {"sampler_name": "heun"}, memory_budget=4.0))
    found = {"full": {"message": full_end["message"], "apart": apart(TAKEN["value"], whole)}}

    def stop(self: object, *arguments: object) -> torch.Tensor:
        mm.interrupt_current_processing()
        return call(self, *arguments)

    with patched(denoiser, __call__=stop):
        found["stop"] = run(ksampler(memory_budget=3.0))["end"]
    run(to_model("small") | {"take": take("MODEL", "native", 0)})
    found["bytes"] = TAKEN["value"].model_size()
    return found


@case
def native_around() -> dict:
    """Core's nodes that cache or choose a device, where this version has them: evaluations, how far apart."""
    for name in ("nodes_easycache", "nodes_multigpu"):
        file = COMFYUI / "comfy_extras" / f"{name}.py"
        if file.exists():
            asyncio.run(nodes.load_custom_node(str(file), module_parent="comfy_extras"))
    steps = EASY | {"sampler_name": "euler", "steps": 20}
    found = {"plain": counted(ksampler(asked=steps))[1]}
    plain = TAKEN["value"]
    caching = {"start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    for name, kind, inputs in (
        ("never", "LazyCache", caching | {"reuse_threshold": 0.0}),
        ("lazy", "LazyCache", caching | {"reuse_threshold": 0.2}),
        ("easy", "EasyCache", caching | {"reuse_threshold": 0.2}),
        ("default", "SelectModelDevice", {"device": "default"}),
        ("cpu", "SelectModelDevice", {"device": "cpu"}),
        ("gpu", "SelectModelDevice", {"device": "gpu:7"}),
    ):
        if kind not in nodes.NODE_CLASS_MAPPINGS:
            continue
        asked = ksampler(asked=steps)
        asked["between"] = {"class_type": kind, "inputs": {"model": ["native", 0]} | inputs}
        asked["sampler"]["inputs"]["model"] = ["between", 0]
        ended, evaluations = counted(asked)
        image = TAKEN.get("value", torch.empty(0))
        found[name] = {"message": ended["message"], "evaluations": evaluations, "apart": apart(image, plain)}
    return found


@case
def native_refusals() -> dict:
    """What each of these says, and what is written on which node of a page."""
    save_file({"lora_up.weight": torch.zeros(1)}, _folder("loras") / "any.safetensors")
    ODD["control"] = [[torch.zeros(1, 1, 1), {"control": comfy.controlnet.ControlBase()}]]
    ODD["text"] = [[torch.zeros(1, 77, 768), {}]]
    lora = ksampler()
    lora["lora"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["native", 0], "lora_name": "any.safetensors", "strength_model": 1.0},
    }
    lora["sampler"]["inputs"]["model"] = ["lora", 0]
    latent = ksampler()  # too small, also where empty latents are brought to the scale of the model
    latent["empty"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 256, "height": 256, "batch_size": 1}}
    latent["sampler"]["inputs"]["latent_image"] = ["empty", 0]
    vae = ksampler()
    vae["empty"], vae["decode"]["inputs"]["samples"] = latent["empty"], ["empty", 0]
    prompts = {
        "lora": lora,
        "latent": latent,
        "vae": vae,
        "passes": ksampler(**{"size.scale": 6.0}),
        "budget": ksampler(memory_budget=0.001),
    }
    for name in ("control", "text"):
        prompts[name] = asked = ksampler()
        asked["odd"] = {"class_type": "GiveAny", "inputs": {"name": name}}
        asked["sampler"]["inputs"]["positive"] = ["odd", 0]
    found = {}
    for name, asked in prompts.items():
        with told_on_nodes() as told:
            found[name] = {"message": run(asked)["message"], "told": [list(line) for line in told]}
    return found


def _folder(name: str) -> Any:
    path = BASE / "models" / name
    path.mkdir(parents=True, exist_ok=True)
    return path

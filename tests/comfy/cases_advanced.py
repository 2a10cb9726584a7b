"""Inf-DiT Upscale (Advanced) with ComfyUI's own sockets, its scheduler, and the memory plan. See drive.py."""

from __future__ import annotations

import json
from typing import Any

import comfy.samplers
import torch
from coresamplers import ADDING, OTHERS, WORKING
from harness import (
    BASE,
    BUNDLED,
    NOISY,
    ODD,
    PACK_DIR,
    PICTURES,
    TAKEN,
    case,
    facts,
    give,
    library,
    loader,
    pack,
    patched,
    prompt,
    run,
    take,
)
from safetensors.torch import load_file, save_file

MINI = {"sigma_max": 0.1, "sigma_min": 0.01}  # near what the bundled model is made for


def advanced(picture: str = "small", loading: dict | None = None, **changes: Any) -> dict:
    """Upscale (Advanced) with RandomNoise, KSamplerSelect and InfDiTScheduler; changes of any of their inputs."""
    asked = {"noise_seed": 7, "sampler_name": "heun", "memory_budget": 0.0, "scale": 4.0} | changes
    levels = {"steps": 20, "sigma_max": 40.0, "sigma_min": 0.002, "rho": 7.0, "denoise": 1.0}
    levels |= {name: asked[name] for name in levels if name in asked}
    links = {"model": ["loader", 0], "image": ["give", 0], "noise": ["noise", 0], "sigmas": ["sigmas", 0]}
    said = {"size": "scale by", "size.scale": asked["scale"], "memory_budget": asked["memory_budget"]}
    return {
        "loader": loader(**(loading or {})),
        "give": give(picture),
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": asked["noise_seed"]}},
        "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": asked["sampler_name"]}},
        "sigmas": {"class_type": "InfDiTScheduler", "inputs": levels},
        "upscale": {"class_type": "InfDiTUpscaleAdvanced", "inputs": links | {"sampler": ["sampler", 0]} | said},
        "take": take("IMAGE", "upscale", 0),
        "take denoised": take("IMAGE", "upscale", 1, "denoised"),
        "take report": take("STRING", "upscale", 2, "report"),
    }


def published_defaults() -> str:
    """The bundled model without its own sampling defaults, so that it has the paper's."""
    path = BASE / "models" / "infdit" / "paper.safetensors"
    if not path.exists():
        mini = PACK_DIR / "infdit" / "weights" / "mini.safetensors"
        save_file(load_file(mini), path, {"config": json.dumps({"position_period": 1024})})
    return path.name


@case
def advanced_equals() -> dict:
    """heun with everything else at its default beside Inf-DiT Upscale's heun; and the same for a batch."""
    loading = {"model_name": published_defaults()}
    found = {}
    for name, seed in (("small", 2**64 - 1), ("batch", 3)):
        first = run(prompt(name, loading, steps=0, sampler_name="heun", seed=seed))
        image = TAKEN["value"]
        second = run(advanced(name, loading, noise_seed=seed))
        found[name] = {
            "ends": [first["end"], second["end"]],
            "difference": (image - TAKEN["value"]).abs().max().item(),
            "denoised": (TAKEN["denoised"] - TAKEN["value"]).abs().max().item(),
            "contrast": image.std().item(),
            "bar": [list(move[1:3]) for move in second["bar"]],
            "pictures": sum(move[3] is not None for move in second["bar"]),
            "report": TAKEN["report"],
        }
    return found


@case
def core_samplers() -> dict:
    """Each sampler that works: how far its picture is from a finely stepped one, where the bar ends."""
    run(prompt("small", steps=24, sampler_name="heun"))
    fine = TAKEN["value"]
    run(prompt("small", steps=24, sampler_name="heun", seed=8))
    other = (TAKEN["value"] - fine).abs().mean().item()
    found = {}
    for name in (*WORKING, *ADDING, "dpmpp_2m_sde_gpu"):
        ended = run(advanced(sampler_name=name, steps=8, **MINI))
        found[name] = {"end": ended["end"], "message": ended["message"]}
        if ended["end"] == "success":
            found[name] |= facts(TAKEN["value"]) | {
                "difference": (TAKEN["value"] - fine).abs().mean().item(),
                "bar": list(ended["bar"][-1][1:3]),
                "report": TAKEN["report"],
            }
    run(prompt("small", steps=0, denoise=0.0))
    return {"samplers": found, "bicubic": (TAKEN["value"] - fine).abs().mean().item(), "other seed": other}


@case
def options() -> dict:
    """Linear multistep of order 1 is Euler's method; its order comes from its own node."""
    asked = advanced(sampler_name="euler", steps=5, **MINI)
    run(asked)
    euler = TAKEN["value"]
    found = {}
    for order in (1, 4):
        asked["sampler"] = {"class_type": "SamplerLMS", "inputs": {"order": order}}
        found[f"order {order}"] = run(asked) and (TAKEN["value"] - euler).abs().max().item()
    return found


@case
def refused_samplers() -> dict:
    """How samplers that need more than a denoiser are refused, and one that adds noise for a model without any."""
    found = {}
    for name in OTHERS:
        ended = run(advanced(sampler_name=name, steps=2, **MINI))
        found[name] = {key: ended.get(key) for key in ("end", "message", "type")}
    ended = run(advanced(loading={"model_name": BUNDLED}, sampler_name="euler_ancestral", steps=2, **MINI))
    found["without noise"] = {key: ended.get(key) for key in ("end", "message", "type")}
    ODD.update(none=None, text="4")
    for name, odd in (("noise", "none"), ("sampler", "text"), ("sigmas", "none"), ("sigmas", "text")):
        asked = advanced(**MINI) | {"odd": {"class_type": "GiveAny", "inputs": {"name": odd}}}
        asked["upscale"]["inputs"][name] = ["odd", 0]
        found[f"{name} {odd}"] = {key: run(asked).get(key) for key in ("end", "message", "type")}
    return found


@case
def gaussian() -> dict:
    """What each sampler makes of pure noise, with the exact denoiser of pictures that are Gaussian: their deviation."""
    core, levels = pack("nodes.comfy_samplers"), library().samplers.karras_sigmas(60, 0.01, 5.0)
    found = {}
    for name in (*WORKING, *ADDING):
        method, _ = core.core_sampler(comfy.samplers.sampler_object(name), 3, 0)
        x = torch.randn((1, 3, 96, 96), generator=torch.Generator().manual_seed(1)) * (25 + 0.25) ** 0.5

        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return x * 0.25 / (0.25 + sigma.reshape(-1, 1, 1, 1) ** 2)

        first = method.sample(denoise, x, levels, None)
        again = method.sample(denoise, x, levels, None)
        found[name] = [first.std().item(), (first - again).abs().mean().item()]
    return found


@case
def noise_notes() -> dict:
    """The report where the noise is what a model was made for, and where it is not."""
    found = {}
    disabled = {"class_type": "DisableNoise", "inputs": {}}
    for name, model, noise, level in (
        ("as made for", NOISY, None, 0.1),
        ("too much", NOISY, None, 0.25),
        ("too little", NOISY, None, 0.04),
        ("none", NOISY, disabled, 0.1),
        ("bundled", BUNDLED, disabled, 0.03),
        ("bundled, some", BUNDLED, None, 0.03),
    ):
        asked = advanced(loading={"model_name": model}, sampler_name="euler", steps=1, sigma_max=level, sigma_min=0.01)
        asked |= {} if noise is None else {"noise": noise}
        found[name] = run(asked) and TAKEN["report"].splitlines()
    return found


@case
def levels() -> dict:
    """The scheduler's noise levels, and those that cannot be."""
    found: dict[str, Any] = {}
    for name, changes in (
        ("default", {}),
        ("rho", {"rho": 3.0, "steps": 4}),
        ("half", {"denoise": 0.5, "steps": 4}),
        ("none", {"denoise": 0.0}),
        ("crossed", {"sigma_max": 0.01, "sigma_min": 1.0}),
        ("published", {"steps": 0, "sigma_max": 0.0, "sigma_min": 0.0}),
        ("of the model", {"steps": 0, "sigma_max": 0.0, "sigma_min": 0.0, "model": ["loader", 0]}),
        ("three of the model's", {"steps": 3, "sigma_max": 0.0, "sigma_min": 0.0, "model": ["loader", 0]}),
        ("of the bundled model", {"steps": 9, "sigma_max": 0.0, "sigma_min": 0.0, "model": ["bundled", 0]}),
    ):
        inputs = {"steps": 20, "sigma_max": 40.0, "sigma_min": 0.002, "rho": 7.0, "denoise": 1.0} | changes
        scheduler = {"class_type": "InfDiTScheduler", "inputs": inputs}
        models = {"loader": loader(), "bundled": loader(model_name=BUNDLED)}
        ended = run(models | {"sigmas": scheduler, "take": take("SIGMAS", "sigmas", 0)})
        found[name] = TAKEN["value"].tolist() if ended["end"] == "success" else ended["message"]
    return found


@case
def denoised() -> dict:
    """The second picture where noise is left in the first, where there is no step, and levels that do not fall."""
    asked = advanced("batch", sampler_name="euler", steps=4, **MINI)
    infdit = library()
    model = infdit.load_model(BASE / "models" / "infdit" / NOISY, dtype=torch.float32, device="cpu")
    levels, last = infdit.samplers.karras_sigmas(4, MINI["sigma_min"], MINI["sigma_max"])[:3], {}
    infdit.upscale(
        model,
        PICTURES["batch"],
        sampler="euler",
        sigmas=levels,
        seed=7,
        callback=lambda state: last.update({state["picture"]: state["denoised"][..., :36, :48]}),
    )
    expected = (torch.cat([last[0], last[1]]) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    asked["split"] = {"class_type": "SplitSigmas", "inputs": {"sigmas": ["sigmas", 0], "step": 2}}
    asked["upscale"]["inputs"]["sigmas"] = ["split", 0]
    ended = run(asked)
    found: dict[str, Any] = {
        "end": ended["end"],
        "shape": list(TAKEN["denoised"].shape),
        "noise left": (TAKEN["value"] - expected).abs().mean().item(),
        "denoised": (TAKEN["denoised"] - expected).abs().max().item(),
        "apart": (TAKEN["denoised"][0] - TAKEN["denoised"][1]).abs().mean().item(),
    }
    alpha = run(advanced("alpha", denoise=0.0))
    found["no step"] = {
        "end": alpha["end"],
        "shapes": [list(TAKEN["value"].shape), list(TAKEN["denoised"].shape)],
        "difference": (TAKEN["value"][..., :3] - TAKEN["denoised"]).abs().max().item(),
    }
    asked["flip"] = {"class_type": "FlipSigmas", "inputs": {"sigmas": ["sigmas", 0]}}
    asked["upscale"]["inputs"]["sigmas"] = ["flip", 0]
    found["rising"] = run(asked)["message"]
    return found


@case
def transparencies() -> dict:
    """A picture and its transparency by a mask, as Load Image gives them, beside the same with a fourth channel."""
    picture = PICTURES["alpha"].clone()
    picture[:, :4, :4, 3] = 0
    PICTURES["see-through"], PICTURES["colours"] = picture, picture[..., :3]
    PICTURES["unseen"], PICTURES["opaque"] = 1 - picture[..., 3], torch.zeros(1, 64, 64)
    PICTURES["two unseen"] = PICTURES["unseen"].expand(2, -1, -1)
    PICTURES["nan"] = PICTURES["unseen"] * float("nan")
    plain = {"steps": 1, "sampler_name": "euler"}
    run(prompt("see-through", **plain))
    expected = TAKEN["value"], TAKEN["mask"]
    run(prompt("colours", **plain))
    opaque = TAKEN["value"]
    found: dict[str, Any] = {}
    for node, ask in (("upscale", prompt("colours", **plain)), ("advanced", advanced("colours", steps=1))):
        for mask in ("unseen", "opaque", "two unseen", "nan"):
            ask["mask"] = {"class_type": "Give", "inputs": {"name": mask}}
            ask["upscale"]["inputs"]["transparency"] = ["mask", 1]
            ended = run(ask)
            found[f"{node} {mask}"] = ended["message"] or list(TAKEN["value"].shape)
            if ended["end"] != "success" or node == "advanced":
                continue
            wanted = (opaque, torch.zeros(opaque.shape[:3])) if mask == "opaque" else expected
            both = zip((TAKEN["value"], TAKEN["mask"]), wanted, strict=True)
            found[f"{mask}, difference"] = max((a - b).abs().max().item() for a, b in both)
    return found


@case
def core_memory() -> dict:
    """Pictures that each sampler holds, counted, beside what is foretold: more than one between evaluations, during."""
    infdit, core = library(), pack("nodes.comfy_samplers")
    from benchmarks.peak_meter import PeakMeter  # of the repository, on the path now

    upscale, plans, footprint = pack("infdit.upscale"), pack("infdit.memory.plan"), pack("infdit.memory.plan")
    config, defaults = pack("infdit.config").InfDiTConfig, pack("infdit.config").SamplingDefaults
    assert infdit.samplers

    def model(width: int, heads: int) -> torch.nn.Module:
        sizes = config(num_layers=1, hidden_size=width, num_heads=heads, patch_size=8, block_size=64, vector_dim=0)
        torch.manual_seed(0)
        network = pack("infdit.model").InfDiT(sizes, defaults()).requires_grad_(False).eval()
        for weight in network.parameters():  # what they were made with may be NaN, which ends a run
            weight.normal_(std=0.02)
        return network

    narrow, wide = model(16, 2), model(256, 4)
    found = {}
    for name in (*WORKING, *ADDING):
        method, _ = core.core_sampler(comfy.samplers.sampler_object(name), 7, 0)
        for kind, network, side, chunk in (("between", narrow, 192, 1), ("during", wide, 128, 4)):
            plan = plans.MemoryPlan(1, chunk)
            with PeakMeter(network.parameters()) as meter:
                upscale.upscale(network, torch.rand(1, side // 4, side // 4, 3), steps=6, sampler=method, plan=plan)
            source = (side // 4, side // 4, 3)
            workload = footprint.Workload(
                network.config, side, side, dtype=torch.float32, sampler=method, source=source
            )
            predicted = workload.footprint(plan)
            picture = 3 * 4 * side * side
            found[f"{name} {kind}"] = (predicted.device - meter.peak["device"]) / picture
    return found


# ---- the memory plan


def plan_prompt(loading: dict | None = None, **changes: Any) -> dict:
    asked = {"width": 64, "height": 48, "size": "scale by", "size.scale": 4.0, "memory_budget": 0.0} | changes
    return {
        "loader": loader(**(loading or {})),
        "plan": {"class_type": "InfDiTMemoryPlan", "inputs": {"model": ["loader", 0], **asked}},
        "take": take("IMAGE", "plan", 1),
        "take report": take("STRING", "plan", 0, "report"),
    }


@case
def plans() -> dict:
    """The memory plan: of a size, of pictures, with too little of this or that memory."""
    PICTURES["two with alpha"] = torch.rand(2, 48, 64, 4)
    found: dict[str, Any] = {}
    for name, changes in (
        ("size", {}),
        ("pictures", {"image": ["give", 0], "width": 1, "height": 1}),
        ("budget", {"memory_budget": 0.03}),
        ("too little", {"memory_budget": 0.01}),
        ("too large", {"width": 65536, "height": 65536, "size.scale": 1.01}),
        ("smaller", {"size": "longest side", "size.longest_side": 63}),
    ):
        asked = plan_prompt(**changes) | ({"give": give("two with alpha")} if "image" in changes else {})
        ended = run(asked)
        found[name] = {"end": ended["end"], "message": ended["message"], "report": TAKEN.get("report", "")}
        if ended["end"] == "success":
            plot = TAKEN["value"]
            colours = {tuple(round(255 * x) for x in colour) for colour in plot[0, ::4, ::4].reshape(-1, 3).tolist()}
            found[name] |= facts(plot) | {"colours": sorted(colours), "shown": ended["shown"]}
    run(prompt("two with alpha", steps=0, sampler_name="auto"))
    found["as it ran"] = TAKEN["report"]
    return found


@case
def plans_of_a_card() -> dict:
    """The same on a graphics card that is not there: what is said of both memories."""
    plan_node, config = pack("nodes.plan"), pack("infdit.config").InfDiTConfig()
    planner, gib = pack("infdit.memory.planner"), 2**30
    card = torch.device("cuda:0")
    workload = pack("infdit.memory.plan").Workload(config, 4096, 4096, device=card, source=(1024, 1024, 3))
    found = {}
    for name, budget, room, host_room in (
        ("automatic", None, 22 * gib, 64 * gib),
        ("little", gib // 2, 22 * gib, 64 * gib),
        ("too little", gib // 8, 22 * gib, 64 * gib),
        ("host too small", gib // 2, 22 * gib, 2 * gib),
        ("both too small", gib // 8, 22 * gib, gib),
        ("nothing free", None, -gib, gib),
    ):
        rooms = {"cuda": room, "cpu": host_room}
        with (
            patched(plan_node, obtainable=lambda device, others=True, rooms=rooms: rooms[device.type]),
            patched(pack("nodes.comfy_memory"), obtainable=lambda device, others=True, rooms=rooms: rooms[device.type]),
            patched(planner, free_bytes=lambda device, rooms=rooms: rooms[device.type]),
        ):
            preview = plan_node.preview_plan(workload, budget)
        found[name] = {
            "fits": preview.fits,
            "verdict": preview.verdict,
            "words": [bar.line for bar in preview.bars],
            "totals": [bar.total for bar in preview.bars],
            "limits": [bar.limit for bar in preview.bars],
            "alternatives": preview.alternatives(),
        }
    return found
